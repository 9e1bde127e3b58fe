"""The gateway of an agent without a port: it moves no requests, but the right to work. `token_machine.py` decides.

Whoever has the largest share is to be the active one. `drained` waits until an instance has given the token up.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Protocol

import trio

from interlock.agents.compare import Pair
from interlock.agents.comparing import Judge
from interlock.agents.latency import InstanceFigures
from interlock.agents.token_machine import Give, Kill, Order, Phase, Take, Token
from interlock.broker.config import CompareConfig

log = logging.getLogger(__name__)


class Holder(Protocol):
    """An instance, as far as the token is concerned. Nothing here raises for what the instance does."""

    @property
    def limit_s(self) -> float:
        """Seconds that it may take to stop working."""

    async def give(self) -> bool:
        """Tell it to begin. True once it did; False if it could not: its health check says why."""

    async def take(self) -> bool:
        """Tell it to stop. True once it surely does not work any more; False if it can't be brought to that."""

    async def kill(self) -> None:
        """End it at once, and wait until nothing of it is left."""

    async def gone(self) -> None:
        """Wait until nothing of it is left."""


class TokenGateway:
    """A `Gateway` without an endpoint. Instances are admitted by `hold`, with what the token is handed over by."""

    can_mirror = False

    def __init__(self, agent: str) -> None:
        self.agent = agent
        self.endpoint = ""
        self.token = Token()
        self._holders: dict[str, Holder] = {}
        self._watches: dict[str, list[Callable[[float], None]]] = {}
        self._nursery: trio.Nursery | None = None
        self._timer_changed = trio.Event()
        self._settled = trio.lowlevel.ParkingLot()

    async def run(self, *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started(self.endpoint)
            try:
                await self._run_timer()
            finally:
                self._nursery = None

    def hold(self, instance: str, holder: Holder) -> None:
        """An instance exists, on standby."""
        self._holders[instance] = holder
        self._carry_out(self.token.attach(instance, holder.limit_s, trio.current_time()))

    def attach(
        self,
        instance: str,
        endpoint: str,
        *,
        window: int,
        idempotent: Callable[[bytes], bool],
        mirrorable: Callable[[bytes], bool] | None = None,
    ) -> None:
        """There is no way to an instance here; `hold` admits it."""
        raise ValueError(f"{self.agent} has no endpoint; instances are admitted by hold()")

    def detach(self, instance: str) -> None:
        """It is dead; so the token is free, if it had it."""
        self._holders.pop(instance, None)
        self._watches.pop(instance, None)
        self._carry_out(self.token.gone(instance, trio.current_time()))

    def route(self, shares: Mapping[str, float]) -> None:
        most = max(shares, key=lambda name: shares[name], default=None)
        self._carry_out(self.token.want(most, trio.current_time()))

    def mirror(
        self,
        instance: str | None,
        *,
        compare: CompareConfig | None = None,
        on_pair: Callable[[Pair], None] | None = None,
        judge: Judge | None = None,
        action_field: str = "action",
    ) -> None:
        """Not possible here (`can_mirror`): nothing is mirrored."""

    def lost(self, instance: str) -> None:
        """Its process died; what it started may still work, so that the token is free only when all of it is gone."""
        holder = self._holders.get(instance)
        if holder is not None and self._nursery is not None:
            self._nursery.start_soon(self._await_gone, instance, holder)

    def reach(self, instance: str, reachable: bool) -> None:
        """Nothing: it is told on its own machine."""

    def rescue(self, instance: str) -> None:
        """It has a second to give the token up."""
        self._carry_out(self.token.hurry(instance, trio.current_time()))

    def in_flight(self, instance: str) -> int:
        return int(self.token.holder == instance)

    async def drained(self, instance: str) -> None:
        await trio.lowlevel.checkpoint()
        while self.in_flight(instance):
            await self._settled.park()

    def serves(self, instance: str) -> bool:
        return self.token.holder == instance and self.token.phase is Phase.ACTIVE

    def snapshot(self, now: float) -> dict[str, InstanceFigures]:
        return {name: InstanceFigures(active=self.serves(name)) for name in self._holders}

    def latencies(self, instance: str, seconds: float, now: float) -> list[float]:
        return []

    def begin_trial(self, slow_s: float | None) -> None:
        """Nothing: there are no requests to compare by."""

    def on_answer(self, instance: str, callback: Callable[[float], None]) -> None:
        """Its answer is that it works: the next time that it is given the token."""
        self._watches.setdefault(instance, []).append(callback)

    # --- inside

    async def _run_timer(self) -> None:
        while True:
            self._timer_changed = trio.Event()
            with trio.move_on_at(self.token.next_deadline()):
                await self._timer_changed.wait()
            self._carry_out(self.token.expire(trio.current_time()))

    def _carry_out(self, orders: list[Order]) -> None:
        for order in orders:
            holder, nursery = self._holders.get(order.instance), self._nursery
            if holder is None or nursery is None:
                continue  # it is gone, or all ends
            match order:
                case Give(instance):
                    nursery.start_soon(self._give, instance, holder)
                case Take(instance):
                    nursery.start_soon(self._take, instance, holder)
                case Kill(instance):
                    log.warning("%s: %s did not stop working in its time, and is killed", self.agent, instance)
                    nursery.start_soon(self._kill, instance, holder)
        self._timer_changed.set()
        self._settled.unpark_all()

    async def _give(self, instance: str, holder: Holder) -> None:
        if not await holder.give():
            return  # it is not well, which its health check will say
        now = trio.current_time()
        self._carry_out(self.token.given(instance, now))
        if self.serves(instance):
            for callback in self._watches.pop(instance, []):
                try:
                    callback(now)
                except Exception:
                    log.exception("%s: a watcher of the token failed", self.agent)

    async def _take(self, instance: str, holder: Holder) -> None:
        stopped = await holder.take()
        now = trio.current_time()
        self._carry_out(self.token.released(instance, now) if stopped else self.token.refused(instance, now))

    async def _kill(self, instance: str, holder: Holder) -> None:
        await holder.kill()
        self._carry_out(self.token.gone(instance, trio.current_time()))

    async def _await_gone(self, instance: str, holder: Holder) -> None:
        await holder.gone()
        self._carry_out(self.token.gone(instance, trio.current_time()))
