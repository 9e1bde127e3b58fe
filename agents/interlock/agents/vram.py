"""The ledger of reserved GPU memory of a host, held against what its monitor sees. Pure: the time is an argument.

A reservation that is not used yet is nobody's on the card, and still not free. So what may be granted is what the card
has free, without the part of all reservations that their holders have not taken yet. What a holder has beyond its
reservations, for longer than a slow reading explains, is a leak, and is told with its name.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from interlock.agents.resources import FRESH_S, Card
from interlock.broker.errors import Refused
from interlock.broker.samples import NAME, Labels

Holder = tuple[str, str]  # agent and revision

CONTEXT_BYTES = 1 << 30  # what CUDA and its libraries take for a process beside what it asks for: 0.3 to 0.8 GiB
LEAK_S = 5.0  # a holder that has more for so long is no slow reading: a monitor reads once a second
MAX_LEASES = 1000  # of a host: 50 agents with 20 models each
MAX_HOLDERS = 1000  # that are remembered for what they may not give back


@dataclass(frozen=True)
class Lease:
    """Granted memory of one card, in bytes."""

    number: int
    holder: Holder
    uuid: str
    bytes: int


@dataclass(frozen=True)
class Leak:
    """A holder has `bytes` more on a card than it reserved, CONTEXT_BYTES besides. since: seconds since 1970."""

    holder: Holder
    uuid: str
    bytes: int
    since: float


@dataclass
class _Card:
    index: str
    total: float | None = None
    free: float | None = None
    seen: float = 0.0


class Ledger:
    """Reservations of all agents of a host, and the newest readings of its cards."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._leases: dict[int, Lease] = {}
        self._cards: dict[str, _Card] = {}
        self._held: dict[Labels, tuple[str, Holder, float]] = {}
        self._holders: dict[Holder, None] = {}  # who has reserved something once, the oldest first
        self._over: dict[tuple[str, Holder], float] = {}  # since when

    # --- what the monitor sees

    def see(self, samples: Iterable[tuple[Labels, float]], ended: Iterable[Labels], time: float) -> None:
        """A batch of the host's monitor, taken at `time` (seconds since 1970)."""
        for key in ended:
            self._held.pop(key, None)
            of = dict(key)
            if of.get(NAME) == "gpu_memory_free_bytes":
                self._cards.pop(of.get("uuid", ""), None)  # it fails, or is gone
        for key, value in samples:
            of = dict(key)
            uuid = of.get("uuid", "")
            match of.get(NAME) if uuid else None:
                case "gpu_memory_total_bytes":
                    self._card(uuid, of).total = value
                case "gpu_memory_free_bytes":
                    card = self._card(uuid, of)
                    card.free, card.seen = value, time
                case "gpu_process_memory_bytes":
                    self._held[key] = uuid, (of.get("agent", ""), of.get("revision", "")), value

    def knows(self, now: float) -> bool:
        """Whether any card has told lately what it has free."""
        return any(one.free is not None and now - one.seen <= FRESH_S for one in self._cards.values())

    def _card(self, uuid: str, of: Mapping[str, str]) -> _Card:
        return self._cards.setdefault(uuid, _Card(of.get("gpu", "")))

    # --- granting

    def grant(self, holder: Holder, size: int, card: str, now: float) -> Lease:
        """Reserve it. Refused, with what is there and what is reserved by whom, if it is not to be had."""
        if len(self._leases) >= MAX_LEASES:
            raise Refused(f"{MAX_LEASES} reservations are held already, which is the limit of a host")
        fresh = {uuid: one for uuid, one in self._cards.items() if one.free is not None and now - one.seen <= FRESH_S}
        if not fresh:
            raise Refused("nothing is known of this host's GPU memory", hint="is its monitor running, and the broker?")
        wanted = [uuid for uuid, one in fresh.items() if card in ("", uuid, one.index)]
        if not wanted:
            known = ", ".join(f"{one.index} ({uuid})" for uuid, one in sorted(fresh.items()))
            raise Refused(f"there is no card {card!r} here, or it does not answer", hint=f"known: {known}")
        best = max(wanted, key=lambda uuid: (self.available(uuid), uuid))
        if size > self.available(best):
            raise Refused(self._why_not(best, size))
        lease = Lease(next(self._numbers), holder, best, size)
        self._leases[lease.number] = lease
        self._holders.pop(holder, None)
        self._holders[holder] = None
        while len(self._holders) > MAX_HOLDERS:
            del self._holders[next(iter(self._holders))]
        return lease

    def release(self, lease: Lease) -> None:
        """A second time does nothing."""
        self._leases.pop(lease.number, None)

    def available(self, uuid: str) -> int:
        """Bytes of a card that may be granted now: free, and not reserved by somebody who has not taken it yet."""
        card = self._cards.get(uuid)
        return 0 if card is None or card.free is None else max(0, int(card.free) - self.outstanding(uuid))

    def outstanding(self, uuid: str) -> int:
        """Bytes of a card that are reserved and that their holders have not taken yet."""
        return sum(max(0, leased - self._taken(uuid, who)) for (at, who), leased in self.leased().items() if at == uuid)

    def leased(self) -> dict[tuple[str, Holder], int]:
        """Bytes reserved, by card and holder."""
        found: dict[tuple[str, Holder], int] = {}
        for lease in self._leases.values():
            key = lease.uuid, lease.holder
            found[key] = found.get(key, 0) + lease.bytes
        return found

    def in_preflight(self, cards: Sequence[Card], agent: str) -> list[Card]:
        """Cards as a candidate of `agent` finds them: what is reserved is not free, and the old one takes what it has
        reserved, also where it has not taken it yet."""
        leased = self.leased()
        return [
            Card(
                card.uuid,
                card.total,
                max(0, card.free - self.outstanding(card.uuid)),
                max(card.agent, sum(size for (at, who), size in leased.items() if (at, who[0]) == (card.uuid, agent))),
            )
            for card in cards
        ]

    # --- holding it against what is there

    def leaks(self, now: float) -> list[Leak]:
        """Who has more than it reserved, of those who ever reserved something; call it about once a second."""
        leased = self.leased()
        over: dict[tuple[str, Holder], int] = {}
        for uuid, holder in {(uuid, holder) for uuid, holder, _ in self._held.values() if holder in self._holders}:
            beyond = self._taken(uuid, holder) - leased.get((uuid, holder), 0) - CONTEXT_BYTES
            if beyond > 0:
                over[uuid, holder] = beyond
        self._over = {key: self._over.get(key, now) for key in over}
        return [
            Leak(holder, uuid, size, self._over[uuid, holder])
            for (uuid, holder), size in sorted(over.items())
            if now - self._over[uuid, holder] >= LEAK_S
        ]

    def _taken(self, uuid: str, holder: Holder) -> int:
        return int(sum(size for at, who, size in self._held.values() if (at, who) == (uuid, holder)))

    def _why_not(self, uuid: str, asked: int) -> str:
        card = self._cards[uuid]
        left = {who: leased - self._taken(uuid, who) for (at, who), leased in self.leased().items() if at == uuid}
        parts = [f"{_gib(size)} for {agent} {revision}" for (agent, revision), size in sorted(left.items()) if size > 0]
        untaken = ", ".join(parts)
        free = f"{_gib(int(card.free or 0))} are free of {_gib(int(card.total or 0))} on {uuid}"
        return f"{_gib(asked)} asked for; {free}" + (f", and of that is reserved: {untaken}" if untaken else "")


def _gib(size: int) -> str:
    return f"{size / 1024**3:.2f} GiB"
