"""The host's front for one agent: it owns the public endpoint, so that clients see no gap while instances change.

`Gateway` is what a host uses; `ZmqGateway` serves ZeroMQ clients (a plain REQ, or a DEALER with any envelope) and
speaks to instances through a DEALER each, so that an unmodified REP program and a ROUTER-based class agent both fit.
What goes where is decided in `routing.py`.
"""

from __future__ import annotations

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import trio

from interlock.agents.answers import MAX_BODY, error_answer, is_error
from interlock.agents.compare import Pair, action_in
from interlock.agents.comparing import Answers, Comparison, Judge, paired, verdict_of
from interlock.agents.latency import InstanceFigures
from interlock.agents.routing import Router
from interlock.agents.routing_types import Answered, Compare, Fail, Gone, Reply, Send
from interlock.broker.config import CompareConfig
from interlock.broker.connections import Happening
from interlock.broker.sockets import Socket, Sockets

MAX_FRAME = 2 * MAX_BODY  # bytes: up to here a client is told that it is too much; beyond, it is disconnected
MAX_FRAMES = 64  # of one request; nobody of ours sends more than a handful
UNREAD_REPLIES = 4096  # to one client that doesn't read; beyond, its replies (and only its) are dropped
LOST_GRACE_S = 0.01  # answers that a dead process gave just before are still on their way for so long
BREAK_GRACE_S = 0.1  # and those that came over a connection before it broke; whether the process died is known too
COMPARISONS = 256  # pairs that wait to be compared; beyond, they are dropped

_Waiting = tuple[Compare[Any, Any], Comparison]

log = logging.getLogger(__name__)


class Gateway(Protocol):
    """What a host needs of the front of an agent. Times are trio's (`trio.current_time()`), in seconds."""

    endpoint: str
    can_mirror: bool  # whether requests can be given to a candidate too

    async def run(self, *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED) -> None:
        """Bind and serve until cancelled; the status is the real endpoint. InUse or ConfigError if it can't bind."""

    def attach(
        self,
        instance: str,
        endpoint: str,
        *,
        window: int,
        idempotent: Callable[[bytes], bool],
        mirrorable: Callable[[bytes], bool] | None = None,
    ) -> None:
        """An instance exists at `endpoint`; it gets no live requests yet. A second one of that name replaces it.

        mirrorable: which requests may be given to a candidate too; None: the idempotent ones.
        """

    def detach(self, instance: str) -> None:
        """Forget the instance and its figures. What it still owed is handled as by `lost`."""

    def route(self, shares: Mapping[str, float]) -> None:
        """From now on live requests go to these instances by share; empty: they wait (up to `hold_s`)."""

    def mirror(
        self,
        instance: str | None,
        *,
        compare: CompareConfig | None = None,
        on_pair: Callable[[Pair], None] | None = None,
        judge: Judge | None = None,
        action_field: str = "action",
    ) -> None:
        """Give idempotent requests to this instance too, compare the answers, drop its own. None ends it.

        judge: of the handlers that have a comparison function; action_field: of a request, to know its handler.
        """

    def lost(self, instance: str) -> None:
        """Its process died: what it owed is retried elsewhere if idempotent, else answered with an error."""

    def reach(self, instance: str, reachable: bool) -> None:
        """The way to it is cut: it gets nothing new until the way is open again, or it is lost."""

    def rescue(self, instance: str) -> None:
        """Also give what it owes, if idempotent, to the routed instance; the first answer wins."""

    def in_flight(self, instance: str) -> int:
        """Requests whose client waits for this instance."""

    async def drained(self, instance: str) -> None:
        """Returns when nothing is in flight there."""

    def serves(self, instance: str) -> bool:
        """False: it has no requests to answer yet although it is routed to (it waits for the token)."""

    def snapshot(self, now: float) -> dict[str, InstanceFigures]:
        """The figures of every attached instance."""

    def latencies(self, instance: str, seconds: float, now: float) -> list[float]:
        """Of the last `seconds`, newest first (bounded)."""

    def begin_trial(self, slow_s: float | None) -> None:
        """Count live requests anew from here for the comparison of instances, those above `slow_s` seconds apart.

        None: don't, until told again.
        """

    def on_answer(self, instance: str, callback: Callable[[float], None]) -> None:
        """Call once, with the time, at its first answer to a live request that it is given after now."""


class RoutedGateway(ABC):
    """What both shells share: a `Router`, its timer, the comparison of pairs, and the part of `Gateway` they answer."""

    can_mirror = True

    def __init__(self, agent: str, endpoint: str, *, request_timeout_s: float, hold_s: float) -> None:
        self.agent = agent
        self.endpoint = endpoint
        self.router: Router[Any, Any, Any] = Router(
            request_timeout_s=request_timeout_s, hold_s=hold_s, key_of=self.key_of
        )
        self._settled = trio.lowlevel.ParkingLot()
        self._timer_at = float("inf")
        self._timer_changed = trio.Event()
        self._comparison = Comparison()
        self._to_compare, self._comparisons = trio.open_memory_channel[_Waiting](COMPARISONS)

    @staticmethod
    def key_of(body: Any) -> bytes | None:
        """Equal for equal requests; None where a request can't be told from another."""
        return None

    # --- Gateway

    def detach(self, instance: str) -> None:
        self._carry_out(self.router.detach(instance, trio.current_time()))

    def route(self, shares: Mapping[str, float]) -> None:
        now = trio.current_time()
        left_out = self.router.route(shares, now)
        if left_out:
            log.warning("%s: can't route to %s: not attached, or dead", self.agent, ", ".join(left_out))
        self._carry_out(self.router.settle(now))

    def mirror(
        self,
        instance: str | None,
        *,
        compare: CompareConfig | None = None,
        on_pair: Callable[[Pair], None] | None = None,
        judge: Judge | None = None,
        action_field: str = "action",
    ) -> None:
        self.router.mirror(instance)
        given = Comparison(compare or CompareConfig(), on_pair, judge, action_field)
        self._comparison = given if instance is not None else Comparison()

    def lost(self, instance: str) -> None:
        self._carry_out(self.router.lost(instance, trio.current_time(), grace=LOST_GRACE_S))

    def reach(self, instance: str, reachable: bool) -> None:
        self._carry_out(self.router.reach(instance, reachable, trio.current_time()))

    def rescue(self, instance: str) -> None:
        self._carry_out(self.router.rescue(instance, trio.current_time()))

    def in_flight(self, instance: str) -> int:
        return self.router.in_flight(instance)

    async def drained(self, instance: str) -> None:
        await trio.lowlevel.checkpoint()
        while self.in_flight(instance):
            await self._settled.park()

    def serves(self, instance: str) -> bool:
        return True

    def snapshot(self, now: float) -> dict[str, InstanceFigures]:
        return self.router.snapshot(now)

    def latencies(self, instance: str, seconds: float, now: float) -> list[float]:
        return self.router.latencies(instance, seconds, now)

    def begin_trial(self, slow_s: float | None) -> None:
        self.router.begin_trial(slow_s)

    def on_answer(self, instance: str, callback: Callable[[float], None]) -> None:
        self.router.watch(instance, callback)

    # --- inside

    def _carry_out(self, commands: list[Any]) -> None:
        """Do what the core says, in order; what follows from a command that can't be done comes after."""
        for command in commands:  # grows while a Send fails
            if isinstance(command, Reply):
                self._reply(command)
            elif isinstance(command, Send):
                if not self._send(command):
                    now = trio.current_time()
                    commands += self.router.failed(command.instance, command.copy, now, sent=False)
            elif isinstance(command, Fail):
                self._fail(command)
            elif isinstance(command, Compare):
                self._queue_comparison(command)
            elif isinstance(command, Answered):
                self.tell(command.tag, command.time)
            elif isinstance(command, Gone):
                self._gone(command.instance)
        self._after()

    def _after(self) -> None:
        if self.router.next_deadline() < self._timer_at:
            self._timer_changed.set()
        if self._settled:
            self._settled.unpark_all()

    @abstractmethod
    def _reply(self, command: Reply[Any, Any]) -> None: ...

    @abstractmethod
    def _send(self, command: Send[Any]) -> bool: ...

    @abstractmethod
    def _fail(self, command: Fail[Any, Any]) -> None: ...

    @abstractmethod
    def _gone(self, instance: str) -> None: ...

    async def _run_timer(self) -> None:
        while True:
            self._timer_at = self.router.next_deadline()
            self._timer_changed = trio.Event()
            with trio.move_on_at(self._timer_at):
                await self._timer_changed.wait()
            now = trio.current_time()
            if self.router.next_deadline() <= now:
                self._carry_out(self.router.expire(now))

    # --- comparing

    def _queue_comparison(self, command: Compare[Any, Any]) -> None:
        try:
            self._to_compare.send_nowait((command, self._comparison))
        except trio.WouldBlock:
            self.router.dropped(command.instance)

    async def _run_comparisons(self) -> None:
        async for command, comparison in self._comparisons:
            pair = await self._pair(command, comparison)
            self.router.compared(command.instance, pair.equal, error=bool(pair.error))
            if comparison.on_pair is not None:
                self.tell(comparison.on_pair, pair)

    async def _pair(self, command: Compare[Any, Any], comparison: Comparison) -> Pair:
        name = action_in(command.body, comparison.action_field) if comparison.config.handlers else ""
        answers = Answers(name, command.body, command.old, command.new)
        return paired(command, answers, command.body, await verdict_of(answers, comparison))

    def tell(self, callback: Callable[[Any], None], value: Any) -> None:
        """Whoever watches the traffic can't stop it: a fault there is logged."""
        try:
            callback(value)
        except Exception:
            log.exception("%s: a watcher of the gateway failed", self.agent)


class ZmqGateway(RoutedGateway):
    """The front of an agent that answers ZeroMQ requests. `sockets` outlive `run`."""

    def __init__(
        self, agent: str, endpoint: str, sockets: Sockets, *, request_timeout_s: float = 30.0, hold_s: float = 10.0
    ) -> None:
        super().__init__(agent, endpoint, request_timeout_s=request_timeout_s, hold_s=hold_s)
        self._sockets = sockets
        self._front: Socket | None = None
        self._backs: dict[str, Socket] = {}
        self._nursery: trio.Nursery | None = None
        self.malformed = 0  # messages, of clients and instances, that were dropped

    @staticmethod
    def key_of(body: Sequence[bytes]) -> bytes:
        return digest(*body)

    async def run(self, *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED) -> None:
        front = self._sockets.open(
            "router",
            bind=self.endpoint,
            label=f"{self.agent} gateway",
            max_message=MAX_FRAME,
            send_limit=UNREAD_REPLIES,
        )
        self._front, self.endpoint = front, front.endpoint
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._run_timer)
                nursery.start_soon(self._run_comparisons)
                for name, back in self._backs.items():
                    nursery.start_soon(self._receive_answers, name, back)
                    nursery.start_soon(self._watch_breaks, name, back)
                task_status.started(self.endpoint)
                await self._receive_requests(front)
        finally:
            self._nursery = None
            self._carry_out(self.router.close())
            self._front = None
            front.close()
            for back in self._backs.values():
                back.close(linger_ms=0)
            self._backs.clear()

    def attach(
        self,
        instance: str,
        endpoint: str,
        *,
        window: int,
        idempotent: Callable[[bytes], bool],
        mirrorable: Callable[[bytes], bool] | None = None,
    ) -> None:
        self.detach(instance)
        # no heartbeats: a process that is stopped, not dead, must find its connection when it goes on
        back = self._sockets.open(
            "dealer",
            connect=endpoint,
            label=f"{self.agent} {instance}",
            heartbeat=False,
            max_message=MAX_BODY,
            receive_limit=0,
            send_limit=0,
            watched=True,
        )
        self.router.attach(
            instance,
            window=window,
            idempotent=guarded(idempotent, self.agent),
            mirrorable=guarded(mirrorable or idempotent, self.agent),
        )
        self._backs[instance] = back
        if self._nursery is not None:
            self._nursery.start_soon(self._receive_answers, instance, back)
            self._nursery.start_soon(self._watch_breaks, instance, back)

    def detach(self, instance: str) -> None:
        super().detach(instance)
        self._gone(instance)

    # --- inside

    async def _receive_requests(self, front: Socket) -> None:
        request = self.router.request
        while True:
            for frames in await front.receive_batch():
                # [peer, anything..., b"", body...]; a REQ sends nothing between peer and delimiter
                try:
                    start = 2 if frames[1] == b"" else frames.index(b"", 1) + 1
                except (IndexError, ValueError):
                    start = 0
                body = frames[start:]
                size = sum(map(len, body))
                if not 0 < start < len(frames) <= MAX_FRAMES or size > MAX_BODY:
                    self._refuse(frames[:start], body, size)
                    continue
                self._carry_out(request(frames[:start], frames[0], body, size, trio.current_time()))

    def _refuse(self, client: list[bytes], body: list[bytes], size: int) -> None:
        """What is too much is told so, where there is an envelope; without one nobody waits for an answer."""
        self.malformed += 1
        if client and size > MAX_BODY:
            self._fail(Fail(client, body, "too-large", f"the request has {size} bytes, at most {MAX_BODY} are taken"))
        elif client:
            problem = f"the request has {len(body)} frames, it must have 1 to {MAX_FRAMES - 2}"
            self._fail(Fail(client, body, "bad-request", problem))

    async def _receive_answers(self, instance: str, back: Socket) -> None:
        answer = self.router.answer
        while not back.closed:
            try:
                batch = await back.receive_batch()
            except trio.ClosedResourceError:
                return
            for frames in batch:
                if len(frames) < 3 or len(frames[0]) != 8 or frames[1]:
                    self.malformed += 1
                    continue
                body = frames[2:]
                copy = int.from_bytes(frames[0], "big")
                self._carry_out(answer(instance, copy, body, trio.current_time(), error=is_error(body)))

    async def _watch_breaks(self, instance: str, back: Socket) -> None:
        """What was on a connection that broke gets no answer any more: it goes elsewhere if it may, or ends at once."""
        while not back.closed:
            if not any(what is Happening.ENDED for what, _ in back.happened()):
                try:
                    await back.until_happened()
                except trio.ClosedResourceError:
                    return
                continue
            given = set(self.router.outstanding(instance))
            if not given:
                continue
            await trio.sleep(BREAK_GRACE_S)
            lost = [copy for copy in self.router.outstanding(instance) if copy in given]
            if lost:
                log.warning("%s: the connection to %s broke with %d requests on it", self.agent, instance, len(lost))
            for copy in lost:
                self._carry_out(self.router.failed(instance, copy, trio.current_time(), sent=True))

    def _reply(self, command: Reply[Any, Any]) -> None:
        if self._front is not None:
            self._front.send_nowait([*command.client, *command.answer])

    def _send(self, command: Send[Any]) -> bool:
        back = self._backs.get(command.instance)
        return back is not None and back.send_nowait([command.copy.to_bytes(8, "big"), b"", *command.body])

    def _fail(self, command: Fail[Any, Any]) -> None:
        if self._front is not None:
            answer = error_answer(command.body, command.code, f"{self.agent}: {command.message}")
            self._front.send_nowait([*command.client, answer])

    def _gone(self, instance: str) -> None:
        back = self._backs.pop(instance, None)
        if back is not None:
            back.close(linger_ms=0)  # what it did not read must not reach the next process at this address


def digest(*parts: bytes) -> bytes:
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(len(part).to_bytes(8, "big"))
        found.update(part)
    return found.digest()


def guarded(idempotent: Callable[[bytes], bool], agent: str) -> Callable[[Sequence[bytes]], bool]:
    """Asks about the first frame of a request. A request that breaks the question may not be repeated."""

    def ask(body: Sequence[bytes]) -> bool:
        try:
            return bool(idempotent(body[0]))
        except Exception as error:
            log.warning("%s: whether a request may be repeated can't be told: %r", agent, error)
            return False

    return ask
