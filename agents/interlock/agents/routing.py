"""Which instance gets which request, and what becomes of it: the gateway's decisions, without sockets or clock. Pure.

A *request* comes from a client and ends in exactly one reply, an instance's answer or an error. A *copy* is a request
given to an instance: usually one; another one after the instance died (if asking twice is harmless), one more beside it
when a hung instance is rescued, and a mirrored one whose answer no client sees. The first answer of a copy that is not
mirrored wins; what comes later is dropped.

Every method takes the time (seconds, any monotone clock) and returns the commands for the shell to carry out, in order.
An instance holds at most `window` copies; the other requests wait here, where nothing can happen to them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, Generic

from interlock.agents import mirroring
from interlock.agents.latency import InstanceFigures
from interlock.agents.mirroring import Mirror
from interlock.agents.quarantine import Quarantine
from interlock.agents.routing_types import (
    Answered,
    AnswerT,
    BodyT,
    ClientT,
    Copy,
    Fail,
    Gone,
    Instance,
    Reply,
    Request,
    Send,
)
from interlock.agents.waiting import Shares, WaitingLine

MAX_ATTEMPTS = 3  # instances that one request may be given to: one that kills whoever answers it must not kill all
BLOCKED_S = 0.05  # an instance that takes nothing is tried again after so long


class Router(Generic[ClientT, BodyT, AnswerT]):
    """The state of one gateway. `request_timeout_s` and `hold_s` as in `AgentConfig`; `key_of` as in `Quarantine`."""

    def __init__(
        self, *, request_timeout_s: float, hold_s: float, key_of: Callable[[BodyT], Hashable] = lambda _: None
    ) -> None:
        self._quarantine: Quarantine[BodyT] = Quarantine(key_of)
        self._timeout = request_timeout_s
        self._hold = hold_s
        self._next_id = 1
        self._instances: dict[str, Instance[BodyT]] = {}
        self._pending: dict[int, Request[ClientT, BodyT]] = {}  # in the order they came, so of their deadlines
        self._line: WaitingLine[Request[ClientT, BodyT]] = WaitingLine()
        self._holds: dict[int, float] = {}  # request -> when it has waited for an instance for too long; in order
        self._hedges: list[Request[ClientT, BodyT]] = []
        self._routed: dict[str, float] = {}
        self._only: Instance[BodyT] | None = None  # the one that has all shares
        self._shares = Shares({})
        self._picked: str = ""  # whose turn it is, while it has no room
        self._mirror: Mirror[ClientT, BodyT] = Mirror()
        self._blocked = False
        self.late = 0  # answers that nobody waited for any more

    # --- what the host wants

    def attach(
        self,
        name: str,
        *,
        window: int,
        idempotent: Callable[[BodyT], bool],
        mirrorable: Callable[[BodyT], bool] | None = None,
    ) -> None:
        """An instance exists; it gets nothing until it is routed or mirrored to. The name must be free."""
        if name in self._instances:
            raise ValueError(f"instance {name} is attached already")
        self._instances[name] = Instance(name, max(1, window), idempotent, mirrorable or idempotent)

    def detach(self, name: str, now: float) -> list[Any]:
        """Forget the instance; what it still owed is handled as if it had died."""
        instance = self._instances.get(name)
        if instance is None:
            return []
        out: list[Any] = []
        self._retire(instance, now)
        if instance.ends_at > float("-inf"):
            self._end(instance, now, out)
        del self._instances[name]
        self._dispatch(now, out)
        return out

    def lost(self, name: str, now: float, *, grace: float = 0.0) -> list[Any]:
        """The process died. Answers that it gave before may come in for another `grace` seconds."""
        instance = self._instances.get(name)
        if instance is None or instance.lost:
            return []
        out: list[Any] = []
        instance.ends_at = now + grace
        self._retire(instance, now)
        if grace <= 0:
            self._end(instance, now, out)
        self._dispatch(now, out)
        return out

    def route(self, shares: Mapping[str, float], now: float) -> list[str]:
        """Live requests go to these from now on; returns names that can't be routed to (unknown, or dead).

        Call `settle` afterwards for what follows from it.
        """
        usable = {n: s for n, s in shares.items() if n in self._instances and not self._instances[n].lost and s > 0}
        self._set_routes(usable, now)
        return [name for name in shares if shares[name] > 0 and name not in usable]

    def settle(self, now: float) -> list[Any]:
        out: list[Any] = []
        self._dispatch(now, out)
        return out

    def mirror(self, name: str | None) -> None:
        """Idempotent requests are given to this instance too, from now on; None ends it. Open pairs are dropped."""
        for request in list(self._pending.values()):
            if request.pair is not None:
                request.pair = None
                self._forget_if_over(request)
        self._mirror.aim(self._instances.get(name) if name is not None else None)

    def reach(self, name: str, reachable: bool, now: float) -> list[Any]:
        """The way to the instance is cut, or open again: while it is cut it keeps what it has, and gets nothing."""
        instance = self._instances.get(name)
        out: list[Any] = []
        if instance is not None and instance.reachable != reachable:
            instance.reachable = reachable
            self._dispatch(now, out)
        return out

    def rescue(self, name: str, now: float) -> list[Any]:
        """What the instance owes and may be asked twice is given to a routed one too; the first answer wins."""
        instance = self._instances.get(name)
        out: list[Any] = []
        if instance is not None:
            for copy in list(instance.owed()):
                request = copy.request
                alone = all(other is copy or other.mirrored for other in request.copies)
                if alone and not request.done and not request.hedging and self._may_repeat(request, instance):
                    request.hedging = True
                    self._hedges.append(request)
            self._dispatch(now, out)
        return out

    def watch(self, name: str, tag: Any) -> None:
        """`Answered(tag)` once, at its first answer to a request that it is given after this."""
        instance = self._instances.get(name)
        if instance is not None:
            instance.watches.append((self._next_id, tag))

    def begin_trial(self, slow_s: float | None) -> None:
        """Count live requests of all instances anew from here, those above `slow_s` seconds apart; None: don't."""
        for instance in self._instances.values():
            instance.tally.begin_trial(slow_s)

    def compared(self, name: str, equal: bool, *, error: bool = False) -> None:
        """A pair was judged, or (`error`) could not be."""
        instance = self._instances.get(name)
        if instance is not None:
            instance.tally.unjudged += error
            instance.tally.compared += not error
            instance.tally.mismatches += not (equal or error)

    def dropped(self, name: str) -> None:
        """A pair of answers could not be compared."""
        instance = self._instances.get(name)
        if instance is not None:
            instance.tally.dropped += 1

    def close(self) -> list[Any]:
        """Every client that waits gets an error: the gateway ends."""
        waiting = [request for request in self._pending.values() if not request.done]
        for request in waiting:
            request.done = True
            if request.waits:
                self._leave_line(request)
        self._pending.clear()
        return [Fail(r.client, r.body, "no-instance", "the host of this agent is stopping") for r in waiting]

    # --- what happens

    def request(self, client: ClientT, peer: Hashable, body: BodyT, size: int, now: float) -> list[Any]:
        """A client asks. `peer`: who it is, for fairness; `size`: bytes."""
        out: list[Any] = []
        self._next_id += 1
        request = Request(self._next_id, client, peer, body, size=size, arrived=now)
        if why := self._quarantine.refusal(request, now):
            return [Fail(client, body, "quarantined", why)]
        instance = self._room(now) if not self._line.count else None
        if instance is not None:
            self._pending[request.id] = request
            self._give(request, instance, now, out)
            self._give_mirrored(now, out)
        elif self._line.add(request):
            self._pending[request.id] = request
            request.waits = True
            if not self._routed:
                self._holds[request.id] = now + self._hold
        else:
            out.append(Fail(client, body, "overloaded", f"{self._line.count} requests wait already"))
        return out

    def answer(self, name: str, copy_id: int, answer: AnswerT, now: float, *, error: bool) -> list[Any]:
        """A whole answer: `begin` and `finish` in one, with the Reply."""
        copy = self._copy_of(name, copy_id)
        if copy is None:
            self.late += 1
            return []
        out: list[Any] = []
        if self._begin(copy, now):
            out.append(Reply(copy.request.client, answer))
        self._finish(copy, answer, now, error, out)
        return out

    def begin(self, name: str, copy_id: int, now: float) -> bool:
        """The head of an answer is here. True if it is the client's: from now on nothing else is sent to it."""
        copy = self._copy_of(name, copy_id)
        return copy is not None and self._begin(copy, now)

    def finish(self, name: str, copy_id: int, answer: AnswerT | None, now: float, *, error: bool) -> list[Any]:
        """The answer that `begin` announced has ended. None: it can't be compared (too long, or cut off)."""
        copy = self._copy_of(name, copy_id)
        out: list[Any] = []
        if copy is not None:
            self._finish(copy, answer, now, error, out)
        return out

    def failed(self, name: str, copy_id: int, now: float, *, sent: bool) -> list[Any]:
        """The copy will get no answer. Not `sent`: the instance never saw it, so that it can safely go elsewhere."""
        copy = self._copy_of(name, copy_id)
        out: list[Any] = []
        if copy is not None:
            if not copy.request.done:
                copy.instance.blocked_until = now + BLOCKED_S
                self._blocked = True
            if sent:
                self._quarantine.broke(copy)
            self._drop(copy, now, out, sent=sent)
            self._dispatch(now, out)
        return out

    def cancelled(self, name: str, copy_id: int, now: float) -> list[Any]:
        """The shell gave up a copy whose request was answered by another one."""
        copy = self._copy_of(name, copy_id)
        out: list[Any] = []
        if copy is not None:
            self._take_off(copy)
            self._forget_if_over(copy.request)
            self._dispatch(now, out)
        return out

    def abandoned(self, name: str, copy_id: int, now: float) -> list[Any]:
        """As `cancelled`, because the client left before its request was whole: nobody waits for an answer."""
        copy = self._copy_of(name, copy_id)
        if copy is not None:
            copy.request.done = True
            copy.request.pair = None
        return self.cancelled(name, copy_id, now)

    def next_deadline(self) -> float:
        """When `expire` has something to do; infinity if never."""
        soonest = float("inf")
        if self._pending:
            soonest = next(iter(self._pending.values())).arrived + self._timeout
        if self._holds:
            soonest = min(soonest, next(iter(self._holds.values())))
        for instance in self._instances.values():
            if self._blocked and instance.blocked_until > float("-inf"):
                soonest = min(soonest, instance.blocked_until)
            if instance.ends_at > float("-inf"):
                soonest = min(soonest, instance.ends_at)
        return soonest

    def expire(self, now: float) -> list[Any]:
        """What is due by `now`: requests unanswered for too long, holds, the end of the lost."""
        out: list[Any] = []
        for instance in self._instances.values():
            if float("-inf") < instance.ends_at <= now:
                self._end(instance, now, out)
            if instance.blocked_until <= now:
                instance.blocked_until = float("-inf")
        self._blocked = any(i.blocked_until > float("-inf") for i in self._instances.values())
        while self._holds:
            number, until = next(iter(self._holds.items()))
            if until > now:
                break
            request = self._pending[number]
            self._leave_line(request)
            self._fail(request, "no-instance", f"no instance came to serve within {self._hold:g} s", out)
        while self._pending:
            request = next(iter(self._pending.values()))
            if request.arrived + self._timeout > now:
                break
            self._expire_request(request, now, out)
        self._dispatch(now, out)
        return out

    # --- what it says

    @property
    def waiting(self) -> int:
        return self._line.count

    def attached(self, name: str) -> bool:
        return name in self._instances

    def in_flight(self, name: str) -> int:
        """Requests whose client waits for this instance, or is getting its answer; 0 for an unknown one."""
        instance = self._instances.get(name)
        return sum(1 for _ in instance.owed()) if instance is not None else 0

    def outstanding(self, name: str) -> list[int]:
        """The copies that it was given and has not answered."""
        return list(self._instances[name].copies) if name in self._instances else []

    def latencies(self, name: str, seconds: float, now: float) -> list[float]:
        instance = self._instances.get(name)
        return instance.tally.latencies(seconds, now) if instance is not None else []

    def snapshot(self, now: float) -> dict[str, InstanceFigures]:
        figures = {}
        for name, instance in self._instances.items():
            owed = [copy.sent for copy in instance.owed() if not copy.wins]
            figures[name] = instance.tally.figures(
                now, in_flight=self.in_flight(name), oldest_s=now - min(owed) if owed else 0.0
            )
        return figures

    # --- inside: choosing

    def _set_routes(self, shares: Mapping[str, float], now: float) -> None:
        if dict(shares) == self._routed:
            return
        self._routed = dict(shares)
        self._shares = Shares(shares)
        self._picked = ""
        self._only = self._instances[next(iter(shares))] if len(shares) == 1 else None
        self._holds.clear()
        if not shares:
            waiting = [request for request in self._pending.values() if request.waits]
            self._holds.update((request.id, now + self._hold) for request in waiting)

    def _open(self, instance: Instance[BodyT], now: float) -> bool:
        return len(instance.copies) < instance.window and instance.blocked_until <= now and instance.reachable

    def _room(self, now: float) -> Instance[BodyT] | None:
        """The instance for the next request, or None while it has to wait.

        Nobody gets more than its share because another one is slow, except who has the largest: a candidate on
        trial must not be given all requests as soon as the old one is busy.
        """
        if self._only is not None:
            return self._only if self._open(self._only, now) else None
        if not self._routed:
            return None
        self._picked = self._picked or self._shares.pick()
        instance = self._instances[self._picked]
        if not self._open(instance, now):
            instance = self._instances[self._shares.most]
            if not self._open(instance, now):
                return None
        self._picked = ""
        return instance

    def _dispatch(self, now: float, out: list[Any]) -> None:
        if self._hedges:
            self._give_hedges(now, out)
        while self._line.count and (instance := self._room(now)) is not None:
            request = self._line.take()
            request.waits = False
            self._give(request, instance, now, out)
        self._give_mirrored(now, out)

    def _give(self, request: Request[ClientT, BodyT], instance: Instance[BodyT], now: float, out: list[Any]) -> None:
        request.attempts += 1
        self._copy(request, instance, now, out, mirrored=False)
        if self._mirror.target is not None and request.attempts == 1:
            self._mirror.offer(request, instance)

    def _give_mirrored(self, now: float, out: list[Any]) -> None:
        target = self._mirror.target
        if target is None or target.name in self._routed:
            return  # live requests come first
        while self._mirror.waiting and self._open(target, now) and (request := self._mirror.take()) is not None:
            self._copy(request, target, now, out, mirrored=True)

    def _copy_of(self, name: str, copy_id: int) -> Copy | None:
        return self._instances[name].copies.get(copy_id) if name in self._instances else None

    def _copy(
        self, request: Request[ClientT, BodyT], instance: Instance[BodyT], now: float, out: list[Any], *, mirrored: bool
    ) -> None:
        self._next_id += 1
        copy = Copy(self._next_id, request, instance, now, mirrored)
        instance.copies[copy.id] = copy
        request.copies.append(copy)
        out.append(Send(instance.name, copy.id, request.body, mirrored))

    def _give_hedges(self, now: float, out: list[Any]) -> None:
        """Second copies go wherever there is room but not to an instance that has the request already."""
        for request in [r for r in self._hedges if not r.done]:
            if not any(not copy.mirrored for copy in request.copies):
                request.hedging = False
                self._put_back(request, now)
                continue
            having = {copy.instance.name for copy in request.copies}
            for name in self._routed:
                if name not in having and self._open(self._instances[name], now):
                    request.hedging = False
                    self._give(request, self._instances[name], now, out)
                    break
        self._hedges = [request for request in self._hedges if request.hedging and not request.done]

    def _may_repeat(self, request: Request[ClientT, BodyT], instance: Instance[BodyT]) -> bool:
        return request.attempts < MAX_ATTEMPTS and instance.idempotent(request.body)

    # --- inside: ending

    def _begin(self, copy: Copy, now: float) -> bool:
        request = copy.request
        copy.latency = now - copy.sent
        if copy.mirrored or request.done:
            return False
        request.done = copy.wins = True
        if request.waits:
            self._leave_line(request)
        return True

    def _finish(self, copy: Copy, answer: AnswerT | None, now: float, error: bool, out: list[Any]) -> None:
        instance, request = copy.instance, copy.request
        latency = copy.latency if copy.latency is not None else now - copy.sent
        self._take_off(copy)
        self._quarantine.answered(copy)
        instance.tally.record(now, latency, error=error, live=not copy.mirrored)
        mirroring.answered(copy, answer, latency, out)
        if instance.watches and not copy.mirrored:
            out.extend(Answered(tag, now) for since, tag in instance.watches if copy.id > since)
            instance.watches = [watch for watch in instance.watches if copy.id <= watch[0]]
        self._forget_if_over(request)
        self._dispatch(now, out)

    def _drop(self, copy: Copy, now: float, out: list[Any], *, sent: bool) -> None:
        """No answer of this copy will come; its request goes elsewhere if it may, or ends in an error."""
        instance, request = copy.instance, copy.request
        self._take_off(copy)
        if copy.mirrored:
            mirroring.unanswered(request, out)
        elif sent:
            instance.tally.record(now, now - copy.sent, error=True, live=True)
        else:
            request.attempts -= 1
        others = any(not other.mirrored for other in request.copies)
        if request.done or copy.mirrored or request.hedging:
            self._forget_if_over(request)
        elif not sent and others:
            request.hedging = True
            self._hedges.append(request)
        elif others:
            pass  # the other one may still answer
        elif not sent and now - request.arrived > self._hold:
            self._fail(request, "instance-died", f"no instance could be reached for {self._hold:g} s", out)
        elif not sent or self._may_repeat(request, instance):
            self._put_back(request, now)
        else:
            reason = "the instance or its connection died before it answered; whether it acted on it is unknown"
            self._fail(request, "instance-died", reason, out)

    def _end(self, instance: Instance[BodyT], now: float, out: list[Any]) -> None:
        """A lost instance is past its grace."""
        instance.ends_at = float("-inf")
        refuses = self._quarantine.died(instance, now)
        for copy in list(instance.copies.values()):
            self._drop(copy, now, out, sent=True)
        for request in [r for r in self._pending.values() if r.waits] if refuses else []:
            if why := self._quarantine.refusal(request, now):
                self._leave_line(request)
                self._fail(request, "quarantined", why, out)
        out.append(Gone(instance.name))

    def _retire(self, instance: Instance[BodyT], now: float) -> None:
        """It gets nothing more."""
        if instance.name in self._routed:
            self._set_routes({n: s for n, s in self._routed.items() if n != instance.name}, now)
        if instance is self._mirror.target:
            for request in self._mirror.aim(None):
                self._forget_if_over(request)

    def _expire_request(self, request: Request[ClientT, BodyT], now: float, out: list[Any]) -> None:
        del self._pending[request.id]
        if request.waits:
            self._leave_line(request)
        mirroring.unanswered(request, out)
        for copy in list(request.copies):
            if not copy.wins:
                self._take_off(copy)
                copy.instance.tally.record(now, now - copy.sent, error=True, live=not copy.mirrored)
        request.pair = None
        if not request.done:
            self._fail(request, "timeout", f"no answer within {self._timeout:g} s", out)

    def _fail(self, request: Request[ClientT, BodyT], code: str, message: str, out: list[Any]) -> None:
        request.done = True
        request.pair = None
        out.append(Fail(request.client, request.body, code, message))
        self._forget_if_over(request)

    def _put_back(self, request: Request[ClientT, BodyT], now: float) -> None:
        request.waits = True
        self._line.put_back(request)
        if not self._routed:
            self._holds[request.id] = now + self._hold

    def _leave_line(self, request: Request[ClientT, BodyT]) -> None:
        self._line.remove(request)
        self._holds.pop(request.id, None)
        request.waits = False

    def _take_off(self, copy: Copy) -> None:
        copy.instance.copies.pop(copy.id, None)
        copy.request.copies.remove(copy)

    def _forget_if_over(self, request: Request[ClientT, BodyT]) -> None:
        if request.done and not request.copies and request.pair is None:
            self._pending.pop(request.id, None)
