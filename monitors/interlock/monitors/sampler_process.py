"""One sampler process as its supervisor sees it: started, listened to, and let go of without ever being waited for."""

from __future__ import annotations

import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

import msgspec
import trio

from interlock.monitors.call_notes import NO_CARD, CallNotes, Note, Seat, deadline
from interlock.monitors.nvml_frames import FromSampler, Poll, Unpacker, pack
from interlock.monitors.nvml_sampler import Order

PIECE = 1 << 16  # bytes read at a time
STALL_S = 0.1  # a wake-up so late shows that the machine stood still: then so did the sampler, and it is no hang
LAUNCH_S = 10.0  # for the interpreter to start, and between calls: where it takes longer, the process itself is stuck
END_S = 2.0  # what a sampler may take to end when it is asked to, until it is killed

Take = Callable[["SamplerProcess", FromSampler], Awaitable[None]]


class SamplerProcess:
    """`opened`: the library answers there. `over`: nothing more comes of it. `done`: of the poll that is out.

    alone: it tries one card only, and nothing it reads is published; `well`: that card answered. dismissed: its end is
    no surprise.
    """

    def __init__(self, process: trio.Process, notes: CallNotes, call_s: float, start_s: float) -> None:
        self.process = process
        self.notes = notes
        self.opened = trio.Event()
        self.over = trio.Event()
        self.done = trio.Event()
        self.tables: dict[int, tuple[str, ...]] = {}
        self.tick = 0
        self.alone = False
        self.well = False
        self.dismissed = False
        self._call_s = call_s
        self._start_s = start_s

    @classmethod
    async def start(cls, order: Order, call_s: float, start_s: float) -> SamplerProcess:
        notes = CallNotes()
        order = msgspec.structs.replace(order, notes=notes.descriptor)
        module = "interlock.monitors.nvml_sampler"
        command = [sys.executable, "-P", "-m", module, msgspec.json.encode(order).decode()]
        try:
            process = await trio.lowlevel.open_process(command, stdin=-1, stdout=-1, pass_fds=[notes.descriptor])
        except BaseException:
            notes.close()
            raise
        return cls(process, notes, call_s, start_s)

    async def follow(self, take: Take) -> None:
        """Hand over what it says until its pipe ends; ValueError if that is no frame of ours."""
        unpacker = Unpacker()
        stdout = self.process.stdout
        assert stdout is not None
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for piece in stdout:
                for frame in unpacker.feed(bytes(piece)):
                    await take(self, frame)

    def end(self) -> None:
        """Nobody waits for anything of it any more."""
        self.opened.set()
        self.over.set()
        self.done.set()

    async def poll(self, scope: int) -> None:
        """Ask for a sample; `done` is set when it is all there."""
        self.tick += 1
        self.done = trio.Event()
        if self.over.is_set():  # it ended just now, and whoever is to replace it has not been at work yet
            self.done.set()
            await trio.lowlevel.checkpoint()
            return
        stdin = self.process.stdin
        assert stdin is not None
        try:
            await stdin.send_all(pack(Poll(self.tick, scope)))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self.done.set()

    async def until(self, event: trio.Event) -> Note | None:
        """Wait for it. The call that is overdue meanwhile, if there is one: then it will not come."""
        allowance = 0.0
        while not event.is_set():
            now = time.monotonic()
            note = self.notes.read(Seat.POLL)
            if note is None:  # between calls; where it stays so, the process itself is stuck
                note, left = Note("", NO_CARD, now), self.notes.since(Seat.POLL) + LAUNCH_S + allowance - now
                wait = min(left, self._call_s)
            else:
                wait = left = deadline(note, self._call_s, self._start_s) + allowance - now
            if left <= 0:
                return note
            with trio.move_on_after(wait):
                await event.wait()
            late = time.monotonic() - now - wait
            if late > STALL_S:
                allowance += late + self._call_s
        return None

    def overdue(self, seat: Seat, now: float) -> Note | None:
        """The call that this thread is in for too long."""
        note = self.notes.read(seat)
        return note if note is not None and deadline(note, self._call_s, self._start_s) < now else None

    def kill(self) -> None:
        """Abandon it. Where it is stuck in the driver it ends when that lets it go."""
        self.dismissed = True
        with suppress(ProcessLookupError):
            self.process.kill()

    async def retire(self) -> None:
        """Ask it to end, and make sure."""
        self.dismissed = True
        stdin = self.process.stdin
        assert stdin is not None
        await stdin.aclose()
        with trio.move_on_after(END_S):
            await self.process.wait()
            return
        self.kill()

    async def bury(self, within_s: float = float("inf")) -> bool:
        """Wait for its end, and close what belonged to it. False: it has not ended within this time."""
        ended = False
        with trio.move_on_after(within_s):
            await self.process.wait()
            ended = True
        with trio.CancelScope(shield=True):
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe is not None:
                    await pipe.aclose()
        self.notes.close()
        return ended
