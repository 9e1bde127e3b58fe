"""The gateway of an agent that speaks a protocol of its own over TCP (`stream://`): it moves connections, not requests.

A new connection goes to an instance by share, and stays with it until one of both closes it, the instance dies, or has
been stopped (`stop_timeout_s` after it is no longer wanted). A rollback ends those of the candidate at once: clients
connect again, and reach the old revision. What is said on a connection is not looked at, so that nothing can be sent
twice or compared: there is no shadow.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import trio

from interlock.agents.compare import Pair
from interlock.agents.comparing import Judge
from interlock.agents.connections import Connections
from interlock.agents.latency import InstanceFigures
from interlock.agents.listening import open_listeners, place_of
from interlock.agents.waiting import Shares
from interlock.broker.config import CompareConfig

MAX_CLIENTS = 2000  # connections at once, each with a descriptor and one more to an instance
CONNECT_S = 1.0  # an instance on this machine that doesn't accept within this time doesn't listen
RETRY_S = 0.05  # before an instance that took no connection is tried again

log = logging.getLogger(__name__)


class StreamGateway:
    """A `Gateway` of connections. Its figures: requests are connections, errors those that an instance did not take,
    reset, or died with."""

    can_mirror = False

    def __init__(self, agent: str, endpoint: str, *, hold_s: float = 10.0) -> None:
        self.agent = agent
        self.endpoint = endpoint
        self.refused = 0  # connections closed because nobody could take them
        self._hold_s = hold_s
        self._places: dict[str, tuple[str, int]] = {}
        self._lost: set[str] = set()
        self._cut: set[str] = set()  # the way to them is
        self._wanted: dict[str, float] = {}  # shares as the host gave them
        self._routed: dict[str, float] = {}
        self._shares = Shares({})
        self._routes_changed = trio.Event()
        self._connections = Connections()
        self._settled = trio.lowlevel.ParkingLot()
        self._clients = 0

    async def run(self, *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED) -> None:
        listeners, self.endpoint = await open_listeners(self.endpoint)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, self._serve_client, listeners)
            task_status.started(self.endpoint)

    def attach(
        self,
        instance: str,
        endpoint: str,
        *,
        window: int,
        idempotent: Callable[[bytes], bool],
        mirrorable: Callable[[bytes], bool] | None = None,
    ) -> None:
        """As of `Gateway`; nothing is asked about requests, and there is no window."""
        self.detach(instance)
        self._places[instance] = place_of(endpoint)

    def detach(self, instance: str) -> None:
        self._places.pop(instance, None)
        self._lost.discard(instance)
        self._cut.discard(instance)
        self._wanted.pop(instance, None)
        self._connections.forget(instance)
        self._set_routes()

    def route(self, shares: Mapping[str, float]) -> None:
        known = {n: s for n, s in shares.items() if s > 0 and n in self._places and n not in self._lost}
        self._wanted = known
        self._set_routes()
        left_out = [name for name, share in shares.items() if share > 0 and name not in known]
        if left_out:
            log.warning("%s: can't route to %s: not attached, or dead", self.agent, ", ".join(left_out))

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
        self._lost.add(instance)
        self._wanted.pop(instance, None)
        self._connections.lost(instance, trio.current_time())
        self._set_routes()

    def reach(self, instance: str, reachable: bool) -> None:
        (self._cut.discard if reachable else self._cut.add)(instance)
        self._set_routes()

    def rescue(self, instance: str) -> None:
        """Its connections are ended, so that their clients connect again, and reach who serves now."""
        self._connections.end(instance)

    def in_flight(self, instance: str) -> int:
        return self._connections.count(instance)

    async def drained(self, instance: str) -> None:
        await trio.lowlevel.checkpoint()
        while self.in_flight(instance):
            await self._settled.park()

    def serves(self, instance: str) -> bool:
        return True

    def snapshot(self, now: float) -> dict[str, InstanceFigures]:
        return {
            name: InstanceFigures(
                requests=seen.total,
                errors=seen.errors,
                in_flight=seen.open,
                connections=seen.open,
                connections_total=seen.total,
                bytes_in=seen.received,
                bytes_out=seen.sent,
            )
            for name in self._places
            for seen in [self._connections.figures(name)]
        }

    def latencies(self, instance: str, seconds: float, now: float) -> list[float]:
        """None: when an answer begins, and whether there is one, is the protocol's own business."""
        return []

    def begin_trial(self, slow_s: float | None) -> None:
        """Nothing: there are no requests to compare by."""

    def on_answer(self, instance: str, callback: Callable[[float], None]) -> None:
        self._connections.watch(instance, callback)

    # --- inside

    def _set_routes(self) -> None:
        usable = {name: share for name, share in self._wanted.items() if name not in self._cut}
        if usable != self._routed:
            self._routed, self._shares = usable, Shares(usable)
            self._routes_changed.set()
            self._routes_changed = trio.Event()

    async def _serve_client(self, client: trio.SocketStream) -> None:
        self._clients += 1
        try:
            if self._clients > MAX_CLIENTS:
                self.refused += 1
                return
            found = await self._find(client)
            if found is None:
                self.refused += 1
                return
            name, stream = found
            connection = self._connections.begin(name, self._tell)
            try:
                await connection.run(client, stream)
            finally:
                self._connections.over(connection)
                self._settled.unpark_all()
        except Exception:
            log.exception("%s: a client's connection failed", self.agent)  # and harms no other
        finally:
            self._clients -= 1
            await trio.aclose_forcefully(client)

    async def _find(self, client: trio.SocketStream) -> tuple[str, trio.SocketStream] | None:
        """An instance and a connection to it; None if nobody could take one for `hold_s`."""
        with trio.move_on_after(self._hold_s):
            while True:
                if not self._routed:
                    await self._routes_changed.wait()
                    continue
                name = self._shares.pick()
                try:
                    with trio.fail_after(CONNECT_S):
                        stream = await trio.open_tcp_stream(*self._places[name])
                except (OSError, trio.TooSlowError):
                    self._connections.failed(name)
                    with trio.move_on_after(RETRY_S):
                        await self._routes_changed.wait()
                    continue
                if name in self._routed:
                    return name, stream
                await trio.aclose_forcefully(stream)  # a rollback came while it was opened
        return None

    def _tell(self, callback: Callable[[float], None], time: float) -> None:
        try:
            callback(time)
        except Exception:
            log.exception("%s: a watcher of the gateway failed", self.agent)
