"""Where the agents of a host reserve GPU memory: a socket in the host's folder, one connection for each reservation.

The first line of a connection asks, `{"bytes": N, "card": "", "wait_s": 0}`; the answer is `{"ok": true, "uuid": ...}`
or `{"ok": false, "reason": ...}`. The reservation holds until the connection ends. Who asks is known from the kernel.
"""

from __future__ import annotations

import json
import logging
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import msgspec
import trio

from interlock.agents import guard
from interlock.agents.resources import Card
from interlock.agents.vram import Holder, Leak, Lease, Ledger
from interlock.broker import topics
from interlock.broker.bus import Bus
from interlock.broker.errors import Refused
from interlock.broker.samples import Labels, SeriesReader, labels

log = logging.getLogger("interlock.host")

ASK_S = 5.0  # for the first line of a connection
MAX_ASK = 4096  # bytes of it
FIRST_READING_S = 2.5  # for the newest readings: the broker has them at once, a monitor repeats them each second
LOOK_S = 1.0  # between comparisons of the ledger with what is there
MAX_WAITING = 200  # connections that hold nothing yet
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


class Ask(msgspec.Struct, frozen=True):
    """What the first line of a connection asks for."""

    bytes: Annotated[int, msgspec.Meta(gt=0, le=1 << 50)]
    card: str = ""
    wait_s: Annotated[float, msgspec.Meta(ge=0, le=3600)] = 0.0


_ask = msgspec.json.Decoder(Ask)


class Desk:
    """Owned by a host. `who`: agent and revision of a process by its marker; None if it is none of this host's."""

    def __init__(self, bus: Bus, host: str, path: Path, who: Callable[[str], Holder | None]) -> None:
        self.ledger = Ledger()
        self._bus = bus
        self._host = host
        self._path = path
        self._who = who
        self._first = trio.Event()  # somebody has asked: only from then on is the monitor listened to
        self._changed = trio.lowlevel.ParkingLot()
        self._waiting = 0
        self._leaks: list[Leak] = []
        self._said: set[tuple[str, Holder]] = set()
        self._reported: set[Labels] = set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled; started once agents can ask. Where they can't, the log says why."""
        listening = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            await listening.bind(str(self._path))
            listening.listen(64)
        except OSError as error:
            listening.close()
            log.error("agents can't reserve GPU memory here: %s: %s", self._path, error.strerror)
            task_status.started()
            return
        task_status.started()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._follow)
            nursery.start_soon(self._compare)
            await trio.serve_listeners(self._serve, [trio.SocketListener(listening)])

    def in_preflight(self, cards: list[Card] | None, agent: str) -> list[Card] | None:
        """Cards with what is reserved taken off."""
        return None if cards is None else self.ledger.in_preflight(cards, agent)

    def samples(self) -> tuple[dict[Labels, float], list[Labels]]:
        """(samples now, series that ended since the last call)."""
        found: dict[Labels, float] = {}
        for (uuid, (agent, revision)), size in self.ledger.leased().items():
            of = {"host": self._host, "agent": agent, "revision": revision, "uuid": uuid}
            found[labels("agent_gpu_reserved_bytes", **of)] = float(size)
        for leak in self._leaks:
            of = {"host": self._host, "agent": leak.holder[0], "revision": leak.holder[1], "uuid": leak.uuid}
            found[labels("agent_gpu_leaked_bytes", **of)] = float(leak.bytes)
        ended = [key for key in self._reported if key not in found]
        self._reported = set(found)
        return found, ended

    # --- the tasks

    async def _follow(self) -> None:
        await self._first.wait()
        reader = SeriesReader()
        async with self._bus.samples([topics.telemetry(self._host, "monitor")]) as feed:
            async for batches in feed:
                for batch in batches:
                    self.ledger.see(*reader.read(batch), batch.time)
                self._changed.unpark_all()

    async def _compare(self) -> None:
        await self._first.wait()
        while True:
            await trio.sleep(LOOK_S)
            self._leaks = self.ledger.leaks(time.time())
            now = {(leak.uuid, leak.holder) for leak in self._leaks}
            for leak in self._leaks:
                if (leak.uuid, leak.holder) not in self._said:
                    agent, revision = leak.holder
                    log.warning(
                        "%s %s has %d MiB more on %s than it reserved", agent, revision, leak.bytes >> 20, leak.uuid
                    )
            self._said = now

    async def _serve(self, stream: trio.SocketStream) -> None:
        if self._waiting >= MAX_WAITING:
            await _answer(stream, Refused(f"{MAX_WAITING} others wait already"))
            return
        self._waiting += 1
        try:
            asked = await self._hear(stream)
            if asked is None:
                return
            holder, ask = asked
            self._first.set()
            try:
                lease = await self._grant(holder, ask)
            except Refused as refused:
                await _answer(stream, refused)
                return
        finally:
            self._waiting -= 1
        try:
            if await _answer(stream, {"ok": True, "uuid": lease.uuid, "bytes": lease.bytes}):
                await _until_it_ends(stream)
        finally:
            self.ledger.release(lease)
            self._changed.unpark_all()

    async def _hear(self, stream: trio.SocketStream) -> tuple[Holder, Ask] | None:
        """Who asks, and for what; None if that was no question, which it has been told."""
        text = b""
        with trio.move_on_after(ASK_S):
            try:
                while b"\n" not in text and len(text) <= MAX_ASK and (more := await stream.receive_some(MAX_ASK)):
                    text += more
            except trio.BrokenResourceError:
                return None
        try:
            ask = _ask.decode(text.partition(b"\n")[0])
        except (msgspec.DecodeError, RecursionError) as error:
            await _answer(stream, Refused(f"that is no request for GPU memory: {error}", hint='{"bytes": N}'))
            return None
        pid, _, _ = _CREDENTIALS.unpack(stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        marker = await trio.to_thread.run_sync(_marker_of, pid)
        holder = self._who(marker)
        if holder is None:
            await _answer(stream, Refused(f"process {pid} belongs to no agent of host {self._host}"))
            return None
        return holder, ask

    async def _grant(self, holder: Holder, ask: Ask) -> Lease:
        """Now, or when others have given back enough; the first question also waits for the first reading."""
        until = trio.current_time() + max(ask.wait_s, 0.0 if self.ledger.knows(time.time()) else FIRST_READING_S)
        while True:
            try:
                return self.ledger.grant(holder, ask.bytes, ask.card, time.time())
            except Refused:
                if trio.current_time() >= until or (not ask.wait_s and self.ledger.knows(time.time())):
                    raise
            with trio.move_on_at(until):
                await self._changed.park()


def _marker_of(pid: int) -> str:
    """The marker of the instance that a process belongs to; empty if it has none, or may not be looked at."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return ""
    prefix = f"{guard.INSTANCE_VARIABLE}=".encode()
    found = [entry[len(prefix) :] for entry in entries if entry.startswith(prefix)]
    return found[0].decode("utf-8", "replace") if found else ""


async def _answer(stream: trio.SocketStream, said: Refused | dict[str, object]) -> bool:
    """False if nobody listens any more."""
    answer = {"ok": False, "reason": str(said)} if isinstance(said, Refused) else said
    try:
        await stream.send_all(json.dumps(answer).encode() + b"\n")
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return False
    return True


async def _until_it_ends(stream: trio.SocketStream) -> None:
    try:
        while await stream.receive_some(MAX_ASK):
            pass
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return
