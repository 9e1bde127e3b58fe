"""A simulated GPU: a ledger of memory reservations that agents and the monitor share through files.

A card is a folder `<index>/` with `card.json` (name, memory, uuid), a `lock`, and one `<pid>-<random>.ledger` file per
reservation, whose apparent size (sparse) is the bytes reserved. The owner keeps an flock on its ledger file: whatever
kills the process frees the reservation, since the kernel drops the lock. A reader that gets the shared lock knows that
the owner is gone. Everything that grows happens under the card's lock, so that the total is never exceeded.

Only the standard library: agents import this in environments of their own.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import uuid
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from interlock.broker.errors import InterlockError

ENVIRONMENT = "INTERLOCK_SIMGPU"  # the folder of the cards; a host sets it for its agents
CARD = "card.json"
LOCK = "lock"
_LEDGER = re.compile(r"(\d+)-[0-9a-f]+\.ledger")
_NEW = ".new"  # end of the name of a file that is not yet what it will be; made and removed under the card's lock only


class GpuOutOfMemory(InterlockError):
    """The card has less memory free than was asked for; nothing was reserved. As CUDA says it."""


class NoSimulatedGpu(InterlockError):
    """There is no simulated card there: none was made, or its folder is gone or damaged."""


class CardConfig(Protocol):
    """What `create_cards` must know of a card (the fleet file's `[[monitor.simulated]]`)."""

    @property
    def name(self) -> str: ...
    @property
    def memory_bytes(self) -> int: ...


class Reservation:
    """Bytes of a card's memory that this process holds until `free()`, the end of a `with`, or its own end."""

    def __init__(self, gpu: SimulatedGpu, path: Path, descriptor: int) -> None:
        self._gpu = gpu
        self._path = path
        self._descriptor = descriptor
        _open_reservations.add(self)

    @property
    def bytes(self) -> int:
        return os.fstat(self._descriptor).st_size if self._descriptor >= 0 else 0

    def resize(self, size: int) -> None:
        """Hold `size` bytes from now on; GpuOutOfMemory if they are not there (what was held stays)."""
        if self._descriptor < 0:
            raise ValueError("the reservation is freed already")
        with self._gpu._locked():
            self._gpu._check_free(size, held=self.bytes)
            os.ftruncate(self._descriptor, size)

    def free(self) -> None:
        """Give the bytes back. A second time does nothing."""
        if self._descriptor >= 0:
            self._path.unlink(missing_ok=True)  # before the lock is let go: nobody may count it in between
            self._close()

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        _open_reservations.discard(self)
        os.close(descriptor)

    def __enter__(self) -> Reservation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.free()

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            self.free()  # as CUDA memory goes with the tensor that holds it


class SimulatedGpu:
    """One card, seen through its folder. Any number of processes may hold one at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        try:
            card = json.loads((self.folder / CARD).read_text("utf-8"))
            self.name = str(card["name"])
            self.uuid = str(card["uuid"])
            self.total = int(card["memory_bytes"])
        except FileNotFoundError:
            raise NoSimulatedGpu(
                "there is no simulated card",
                where=str(self.folder),
                hint='set monitor.gpu = "simulated" and list the cards under [[monitor.simulated]]',
            ) from None
        except (OSError, ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:
            raise NoSimulatedGpu(f"the card can't be read: {error}", where=str(self.folder / CARD)) from None

    def reserve(self, size: int) -> Reservation:
        """Hold `size` bytes; GpuOutOfMemory if the card has less free."""
        with self._locked():
            self._check_free(size, held=0)
            path = self.folder / f"{os.getpid()}-{secrets.token_hex(6)}.ledger"
            new = path.with_name(path.name + _NEW)
            descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(descriptor, size)
                os.rename(new, path)  # only now can others see it, and it is locked already
            except BaseException:
                os.close(descriptor)
                new.unlink(missing_ok=True)
                raise
        return Reservation(self, path, descriptor)

    def used(self) -> int:
        """Bytes that living processes hold."""
        return sum(self.by_pid().values())

    def by_pid(self) -> dict[int, int]:
        """Bytes held by each living process; removes the files of dead ones. NoSimulatedGpu if the folder is gone."""
        held: dict[int, int] = {}
        try:
            names = os.listdir(self.folder)
        except OSError as error:
            raise NoSimulatedGpu(f"the card's folder can't be read: {error.strerror}", where=str(self.folder)) from None
        for name in names:
            if (found := _LEDGER.fullmatch(name)) and (size := self._size_if_held(self.folder / name)) is not None:
                held[int(found[1])] = held.get(int(found[1]), 0) + size
        return held

    # --- inside

    def _size_if_held(self, path: Path) -> int | None:
        """The size of a ledger whose owner lives. A shared lock, so that two readers don't take each other for it."""
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            status = os.fstat(descriptor)
            return status.st_size if status.st_nlink else None
        else:
            path.unlink(missing_ok=True)
            return None
        finally:
            os.close(descriptor)

    def _check_free(self, size: int, *, held: int) -> None:
        """GpuOutOfMemory unless `size` bytes fit once the `held` ones are given back. Under the card's lock."""
        if size < 0:
            raise ValueError(f"{size} bytes")
        for name in os.listdir(self.folder):
            if name.endswith(_NEW):  # its maker died: whoever makes one holds the lock, and we hold it
                (self.folder / name).unlink(missing_ok=True)
        free = self.total - self.used() + held
        if size > free:
            raise GpuOutOfMemory(
                f"out of memory: tried to allocate {_gib(size)}; "
                f"the GPU has a total capacity of {_gib(self.total)} of which {_gib(free)} is free",
                where=self.name,
            )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with _flocked(self.folder):
            yield


def create_cards(folder: Path, cards: Sequence[CardConfig]) -> list[SimulatedGpu]:
    """The cards in `folder`, made or changed to be as configured; reservations that live stay. Any process may ask."""
    made = []
    for index, card in enumerate(cards):
        place = Path(folder) / str(index)
        place.mkdir(parents=True, exist_ok=True)
        content: dict[str, Any] = {
            "name": card.name,
            "memory_bytes": card.memory_bytes,
            "uuid": f"SIM-{uuid.uuid5(uuid.NAMESPACE_URL, place.resolve().as_uri())}",  # the same after a restart
        }
        text = json.dumps(content, indent=1) + "\n"
        with _flocked(place):
            target = place / CARD
            with suppress(FileNotFoundError, UnicodeDecodeError):
                if target.read_text("utf-8") == text:
                    made.append(SimulatedGpu(place))
                    continue
            new = target.with_name(CARD + _NEW)
            new.write_text(text, "utf-8")
            new.rename(target)
        made.append(SimulatedGpu(place))
    return made


def open_simulated(index: int = 0) -> SimulatedGpu:
    """The card that a host gave this agent, by the environment; NoSimulatedGpu if it gave none."""
    folder = os.environ.get(ENVIRONMENT)
    if not folder:
        raise NoSimulatedGpu(f"{ENVIRONMENT} is not set", hint="a host sets it for the agents that it starts")
    return SimulatedGpu(Path(folder) / str(index))


@contextmanager
def _flocked(folder: Path) -> Iterator[None]:
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise NoSimulatedGpu(f"the card can't be locked: {error.strerror}", where=str(folder)) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # held for a few system calls each time
        yield
    finally:
        os.close(descriptor)


def _gib(size: int) -> str:
    return f"{size / 1024**3:.2f} GiB"


_open_reservations: weakref.WeakSet[Reservation] = weakref.WeakSet()


def _forget_in_child() -> None:
    """A forked child shares the lock: without this the parent's reservation would outlive the parent."""
    for reservation in list(_open_reservations):
        reservation._close()


os.register_at_fork(after_in_child=_forget_in_child)
