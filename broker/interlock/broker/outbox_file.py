"""The outbox on disk: what was posted and is not in the log yet, kept over the end of its process.

An append-only file: the head (the letters ILOB and the number of the format), then records; each is its length, its
CRC-32 and a MessagePack array: [id, [topic, header, body]] when an event was posted, [id, null] when it was settled.
Numbers have 4 bytes, little-endian. Format 1 had no head; it is written anew when it is opened. A record that is cut
off, as a killed process or a power cut leave it, was not kept; the file goes on before it.

A post leaves for the broker at once, while it is written here: neither waits for the other. It is lost only if this
process dies before both, some milliseconds at most (the time of one fsync). After a restart what was not settled is
sent again under its id, in its order; the log takes each id once.
"""

from __future__ import annotations

import io
import logging
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec
import trio

from interlock.broker.errors import LogError
from interlock.broker.outbox import Entry

FORMAT = 2
MAGIC = b"ILOB"  # no length of a record is as large, so a file of format 1 never begins so
HEAD = MAGIC + FORMAT.to_bytes(4, "little")
COMPACT_BYTES = 8 << 20  # a file that grew beyond it while it never was empty is written anew, without what is settled
RETRY_S = 1.0  # before writing again after the disk refused: it needs an operator, and the broker may take it meanwhile
SETTLE_S = 0.2  # notes of what is settled are gathered for so long: losing them costs a repetition, no event
MAX_RECORD = 4 << 20  # bytes: an event has at most 1 MiB in each of two frames

_log = logging.getLogger(__name__)
_Row = tuple[str, list[bytes] | None]
_rows = msgspec.msgpack.Decoder(_Row)
_encoder = msgspec.msgpack.Encoder()


class OutboxFile:
    """The file at `path`, made where there is none. `entries`: what was in it when it was opened, in order.

    LogError where it can't be read or written, or was written by a newer program. All methods block. One process at a
    time: the role's lock sees to it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[Entry] = []
        self._live: dict[str, int] = {}  # size by id
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = io.FileIO(path, "r+" if path.exists() else "x+")
        except OSError as error:
            raise self._wrong("opened", error) from error
        try:
            self._size = self._read()
        except OSError as error:
            self._file.close()
            raise self._wrong("read", error) from error
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        self._file.close()

    def save(self, added: Sequence[Entry], settled: Iterable[str]) -> None:
        """On disk when this returns, if anything was added. LogError: nothing of it is."""
        settled = [id for id in settled if id in self._live]
        records = [_record((id, None)) for id in settled]
        sizes = {}
        for entry in added:
            records.append(_record((entry.id, entry.frames)))
            sizes[entry.id] = len(records[-1])
        try:
            if not added and len(settled) == len(self._live):
                self._empty()
            elif self._size > COMPACT_BYTES and sum(self._live.values()) < self._size // 2:
                self._append(b"".join(records), sync=bool(added))
                self._compact()
            else:
                self._append(b"".join(records), sync=bool(added))
        except OSError as error:
            raise self._wrong("written", error) from error
        for id in settled:
            self._live.pop(id, None)
        self._live |= sizes

    # --- inside

    def _append(self, records: bytes, *, sync: bool) -> None:
        try:
            self._file.seek(self._size)
            view = memoryview(records)
            while view:
                view = view[self._file.write(view) :]
            if sync:
                os.fdatasync(self._file.fileno())
        except OSError:
            self._file.truncate(self._size)
            raise
        self._size += len(records)

    def _empty(self) -> None:
        self._file.truncate(len(HEAD))
        self._size = len(HEAD)

    def _compact(self) -> None:
        """By a second file that takes the place of this one: a kill in between leaves one of the two, whole."""
        live = _unsettled(self._whole()[0])
        fresh = self.path.with_name(f"{self.path.name}.new")
        file = io.FileIO(fresh, "w+")
        try:
            file.write(HEAD + b"".join(_record((id, frames)) for id, frames in live.items()))
            os.fdatasync(file.fileno())
            os.replace(fresh, self.path)
        except OSError:
            file.close()
            raise
        self._file.close()
        self._file, self._size = file, file.tell()

    def _read(self) -> int:
        headed = self._check_head()
        rows, end, total = self._whole()
        live = _unsettled(rows)
        self.entries = [Entry(id, frames) for id, frames in live.items()]
        self._live = {entry.id: sum(map(len, entry.frames)) for entry in self.entries}
        if end < total:
            _log.warning("%s: the last %d bytes are no whole record; they were never kept", self.path, total - end)
            self._file.truncate(end)
        if not headed:
            self._compact()
            return self._size
        return end

    def _check_head(self) -> bool:
        """Whether the file has a head. LogError for one of a newer format, which is left as it is."""
        self._file.seek(0)
        head = self._file.read(len(HEAD))
        if not head.startswith(MAGIC) or len(head) < len(HEAD):
            return False
        found = int.from_bytes(head[len(MAGIC) :], "little")
        if found > FORMAT:
            raise LogError(
                f"the outbox was written by a newer version of Interlock (format {found}, this one knows {FORMAT})",
                where=str(self.path),
                hint="start the newer version again, or move the file away: what it holds is then never sent",
            )
        return True

    def _whole(self) -> tuple[list[_Row], int, int]:
        """(the records there are, where they end, where the file ends)"""
        self._file.seek(0)
        content = self._file.read()
        begin = len(HEAD) if content.startswith(MAGIC) else 0
        rows, end = [], min(begin, len(content))
        for row, end in _records(content, begin):  # noqa: B007
            rows.append(row)
        return rows, end, len(content)

    def _wrong(self, what: str, error: OSError) -> LogError:
        return LogError(f"the outbox can't be {what}: {error}", where=str(self.path), hint="is the disk full?")


def _record(row: _Row) -> bytes:
    packed = _encoder.encode(row)
    return len(packed).to_bytes(4, "little") + zlib.crc32(packed).to_bytes(4, "little") + packed


def _records(content: bytes, begin: int) -> Iterator[tuple[_Row, int]]:
    while len(content) - begin >= 8:
        size, check = (int.from_bytes(content[at : at + 4], "little") for at in (begin, begin + 4))
        packed = content[begin + 8 : begin + 8 + size]
        if not 0 < size <= MAX_RECORD or len(packed) < size or zlib.crc32(packed) != check:
            return
        try:
            row = _rows.decode(packed)
        except ValueError:  # msgspec's errors are ValueErrors, and so is a text that is not UTF-8
            return
        begin += 8 + size
        yield row, begin


def _unsettled(rows: Iterable[_Row]) -> dict[str, list[bytes]]:
    live: dict[str, list[bytes]] = {}
    for id, frames in rows:
        if frames is None:
            live.pop(id, None)
        else:
            live[id] = frames
    return live


class Keeper:
    """Writes posts into an `OutboxFile`, many at once, beside whatever sends them."""

    def __init__(self, file: OutboxFile) -> None:
        self._file = file
        self._new: dict[str, Entry] = {}
        self._kept = {entry.id for entry in file.entries}
        self._settled: list[str] = []
        self._work, self._urgent = trio.Event(), trio.Event()
        self._written = trio.lowlevel.ParkingLot()
        self._trouble = ""

    def keep(self, entry: Entry) -> None:
        if entry.id not in self._kept:
            self._new[entry.id] = entry
            self._work.set()
            self._urgent.set()

    def settled(self, id: str) -> None:
        """It is in the log, or was refused for good: it need not be kept any longer."""
        if id in self._kept:
            self._kept.remove(id)
            self._settled.append(id)
            self._work.set()
        elif self._new.pop(id, None) is not None and not self._new:
            self._written.unpark_all()

    async def kept(self) -> None:
        """Every event so far is on disk, or settled."""
        waiting = list(self._new)
        while any(id in self._new for id in waiting):
            await self._written.park()

    async def run(self) -> None:
        try:
            while True:
                await self._work.wait()
                with trio.move_on_after(SETTLE_S):
                    await self._urgent.wait()
                self._work, self._urgent = trio.Event(), trio.Event()
                await self._save()
        finally:
            with trio.CancelScope(shield=True):
                await self._save()

    async def _save(self) -> None:
        added, settled = list(self._new.values()), self._settled
        if not added and not settled:
            return
        self._settled = []
        try:
            await trio.to_thread.run_sync(self._file.save, added, settled)
        except LogError as error:
            self._note(str(error))
            self._settled = settled + self._settled
            self._work.set()
            await trio.sleep(RETRY_S)
            return
        self._note("")
        for entry in added:
            if self._new.pop(entry.id, None) is None:  # settled while it was written
                self._settled.append(entry.id)
                self._work.set()
            else:
                self._kept.add(entry.id)
        self._written.unpark_all()

    def _note(self, trouble: str) -> None:
        if trouble != self._trouble:
            if trouble:
                _log.error("events are sent, and not kept: %s", trouble)
            else:
                _log.warning("events are kept again in %s", self._file.path)
            self._trouble = trouble
