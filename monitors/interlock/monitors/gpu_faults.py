"""Which faults of GPUs stand. Pure: what was seen and the time go in, edges come out.

A fault is raised once, and cleared once: by a reading, where there is one that shows it, or by a time of quiet, where
only its coming is told (an XID). What two sources tell of one XID is merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

Cause = Literal["device", "driver", "agent", "limit"]

DRIVER = -1  # as a card: the driver as a whole
XID_QUIET_S = 60.0  # without another of the same: then it is over, if the card answers
MERGE_S = 5.0  # between what NVML and what the kernel log says of one XID; they come within milliseconds of each other
STEADY_S = 1.0  # that a card or the driver answers, until its fault is over: one that comes and goes is one fault
MAX_XIDS = 64  # different ones that stand at one card: NVIDIA documents some 170

AGENT_XIDS = frozenset({13, 31, 43, 45, 68, 109})  # exceptions, faults, resets, clean-ups of a program's own channels
XIDS = {
    13: "graphics engine exception",
    31: "memory page fault",
    43: "the program's channel was reset",
    45: "the program's channel was removed",
    48: "double-bit ECC error",
    61: "internal micro-controller breakpoint",
    62: "internal micro-controller halt",
    63: "a memory row is remapped",
    64: "a memory row could not be remapped",
    68: "video processor exception",
    69: "graphics engine class error",
    74: "NVLink error",
    79: "the card has fallen off the bus",
    92: "many single-bit ECC errors",
    94: "contained memory error",
    95: "uncontained memory error",
    109: "context switch timed out",
    119: "the GSP does not answer",
    120: "GSP error",
    121: "chip-to-chip link error",
    140: "ECC error that could not be recovered from",
    143: "the card could not be initialised",
    154: "a recovery action is due",
}


@dataclass(frozen=True)
class Kind:
    """cause: whose fault. recovery: what ends it."""

    cause: Cause
    recovery: str


_ALONE = "a process of its own tries the card again after 10 s, then ever more rarely; the others go on meanwhile"
KINDS: dict[str, Kind] = {
    "lost": Kind("device", "reset the card or restart the machine; " + _ALONE),
    "hang": Kind("device", _ALONE),
    "reset-required": Kind("device", "interlock monitor release, then nvidia-smi --gpu-reset; " + _ALONE),
    "card-error": Kind("device", "it is asked on; " + _ALONE),
    "sampler-died": Kind("device", _ALONE),
    "xid": Kind("device", f"cleared after {XID_QUIET_S:g} s without another, while the card answers"),
    "agent-xid": Kind("agent", f"look at the agent; cleared after {XID_QUIET_S:g} s without another"),
    "ecc": Kind("device", f"cleared after {XID_QUIET_S:g} s without another, while the card answers"),
    "card-event": Kind("device", f"cleared after {XID_QUIET_S:g} s without another, while the card answers"),
    "driver-not-loaded": Kind("driver", "load the driver; a new process tries every 10 s"),
    "driver-mismatch": Kind("driver", "reload the driver or restart the machine; a new process tries every 10 s"),
    "driver-hang": Kind("driver", "dmesg may say why; a new process tries every 10 s"),
    "driver-error": Kind("driver", "nvidia-smi may say why; a new process tries every 10 s"),
    "library-missing": Kind("driver", "install the driver's libnvidia-ml.so.1; a new process tries every 10 s"),
    "device-revoked": Kind(
        "driver", "restart the container, so that it has its devices again; a process tries every 10 s"
    ),
    "not-supported": Kind("limit", "none: the card does not have it; tried once a minute"),
    "no-permission": Kind("limit", "run the monitor with the rights to read it; tried once a minute"),
    "not-available": Kind("limit", "none here: the driver does not tell it; tried once a minute"),
    "unknown-type": Kind("limit", "a newer Interlock: the driver tells it in a way that this one can't read"),
    "library-too-old": Kind("limit", "a newer driver; tried once a minute"),
}
# NVML's error of a card as a whole -> kind
CARD_KINDS = {15: "lost", 28: "lost", 16: "reset-required"}
# NVML's error at the start of the library -> kind
DRIVER_KINDS = {9: "driver-not-loaded", 12: "library-missing", 18: "driver-mismatch", 999: "device-revoked"}
# NVML's type of event -> kind, words
EVENT_KINDS = {
    0x2: ("ecc", "double-bit ECC error"),
    0x200: ("ecc", "a storm of single-bit ECC errors"),
    0x400: ("ecc", "a memory row was retired"),
    0x800: ("ecc", "a memory row could not be retired"),
    0x1000: ("ecc", "poisoned memory, contained"),
    0x2000: ("ecc", "poisoned memory, not contained"),
    0x4000: ("lost", "the card became unavailable"),
    0x8000: ("reset-required", "the card asks for a recovery action"),
}
XID_EVENT = 0x8


@dataclass(frozen=True)
class Raised:
    """A fault stands since `since` (seconds since 1970). `again`: it stood before, and more is known of it now."""

    card: int
    kind: str
    detail: str
    since: float
    xid: int = 0
    pid: int = 0
    again: bool = False


@dataclass(frozen=True)
class Cleared:
    card: int
    kind: str
    detail: str
    since: float
    until: float
    xid: int = 0


Edge = Raised | Cleared


@dataclass
class _Standing:
    raised: Raised
    last: float  # when it was told of last
    sources: dict[str, float]  # of an XID: who told of the newest one, and when
    quiet: bool  # ends by quiet, not by a reading


class FaultBook:
    """The faults of one machine's cards."""

    def __init__(self) -> None:
        self._standing: dict[tuple[int, str, int], _Standing] = {}
        self._well_since: dict[int, float] = {}  # of those whose fault stands
        self.xids: dict[tuple[int, Cause], int] = {}  # (card, cause) -> how many so far

    def stands(self, card: int, kind: str) -> bool:
        return any(key[:2] == (card, kind) for key in self._standing)

    @property
    def standing(self) -> list[Raised]:
        return [each.raised for each in self._standing.values()]

    def state(self, card: int, kind: str, detail: str, now: float, *, of: frozenset[str]) -> list[Edge]:
        """A card's (or the driver's) state: this kind of fault, or none (""). It ends the others among `of`.

        A fault is told at once; that it is over, only when nothing was wrong for a second.
        """
        if not kind and not self._standing:
            return []
        if kind:
            self._well_since.pop(card, None)
            return self._clear(card, of - {kind}, "", now) + self._raise(Raised(card, kind, detail, now))
        if not any(key[0] == card and key[1] in of for key in self._standing):
            return []
        if now - self._well_since.setdefault(card, now) < STEADY_S:
            return []
        return self._clear(card, of, "it answers again", now)

    def lacking(self, card: int, readings: Mapping[str, str], now: float) -> list[Edge]:
        """What a card does not give, and why: a fault of the kind `limit` for each reason, with the readings."""
        reasons: dict[str, list[str]] = {}
        for reading, reason in sorted(readings.items()):
            reasons.setdefault(reason, []).append(reading)
        limits = frozenset(kind for kind, each in KINDS.items() if each.cause == "limit")
        edges = self._clear(card, limits - reasons.keys(), "they are given now", now)
        for reason, names in reasons.items():
            edges += self._raise(Raised(card, reason, ", ".join(names), now))
        return edges

    def event(self, card: int, type: int, data: int, now: float) -> list[Edge]:
        """An event of NVML's event set."""
        if type == XID_EVENT:
            return self.xid(card, data, "nvml", now)
        kind, words = EVENT_KINDS.get(type, ("card-event", f"event {type:#x}"))
        return self._raise(Raised(card, kind, words, now), quiet=kind in ("ecc", "card-event"))

    def xid(self, card: int, number: int, source: str, now: float, *, pid: int = 0, text: str = "") -> list[Edge]:
        """An XID. The same from another source within some seconds is the same one."""
        cause: Cause = "agent" if number in AGENT_XIDS else "device"
        kind = "agent-xid" if cause == "agent" else "xid"
        key = (card, kind, number)
        known = self._standing.get(key)
        words = f"XID {number}: {XIDS.get(number, 'see NVIDIA')}" + (f": {text}" if text else "")
        if known is not None and source not in known.sources and now - known.last <= MERGE_S:
            known.sources[source] = now
            if pid and not known.raised.pid:
                known.raised = replace(known.raised, pid=pid, detail=words, again=True)
                return [known.raised]
            return []
        self.xids[card, cause] = self.xids.get((card, cause), 0) + 1
        if known is not None:
            known.last, known.sources = now, {source: now}
            return []
        if sum(1 for place in self._standing if place[0] == card and place[2]) >= MAX_XIDS:
            return []
        raised = Raised(card, kind, words, now, xid=number, pid=pid)
        self._standing[key] = _Standing(raised, now, {source: now}, quiet=True)
        return [raised]

    def quiet(self, well: frozenset[int], now: float) -> list[Edge]:
        """What ends by silence, at cards that answer (`well`); what nobody knows the card of ends, too."""
        over = [
            key
            for key, each in self._standing.items()
            if each.quiet and now - each.last >= XID_QUIET_S and (key[0] in well or key[0] == DRIVER)
        ]
        return [self._end(key, f"none for {XID_QUIET_S:g} s", now) for key in over]

    # --- inside

    def _raise(self, raised: Raised, *, quiet: bool = False) -> list[Edge]:
        key = (raised.card, raised.kind, raised.xid)
        known = self._standing.get(key)
        if known is None:
            self._standing[key] = _Standing(raised, raised.since, {}, quiet)
            return [raised]
        known.last = raised.since
        if KINDS[raised.kind].cause == "limit" and known.raised.detail != raised.detail:
            known.raised = replace(known.raised, detail=raised.detail, again=True)
            return [known.raised]
        return []

    def _clear(self, card: int, kinds: frozenset[str], detail: str, now: float) -> list[Edge]:
        over = [key for key, each in self._standing.items() if key[0] == card and key[1] in kinds and not each.quiet]
        return [self._end(key, detail, now) for key in over]

    def _end(self, key: tuple[int, str, int], detail: str, now: float) -> Cleared:
        raised = self._standing.pop(key).raised
        return Cleared(raised.card, raised.kind, detail, raised.since, now, xid=raised.xid)


CARD_STATES = frozenset({"lost", "hang", "reset-required", "card-error", "sampler-died"})
DRIVER_STATES = frozenset(kind for kind, each in KINDS.items() if each.cause == "driver")
