"""Whether a host is sampled fast. Pure: the time (monotonic, seconds) is an argument.

A migration that touches the host makes it fast, but only for as long as somebody goes on saying so: each of its events
is a short lease, and the coordinator renews it meanwhile. A lease that nobody renews runs out by itself.
"""

from __future__ import annotations

from collections.abc import Iterable

from interlock.broker.cadence import FIRST_S


class Cadence:
    """The leases of the migrations that touch one host."""

    def __init__(self) -> None:
        self._until: dict[str, float] = {}

    def follow(self, migrations: Iterable[str], now: float) -> None:
        """These are in flight here: a new one begins with a lease, one that is not named has ended."""
        self._until = {migration: self._until.get(migration, now + FIRST_S) for migration in migrations}

    def renew(self, migration: str, for_s: float, now: float) -> None:
        """For so long from now on; a migration that is not in flight here is passed over."""
        if migration in self._until:
            self._until[migration] = max(self._until[migration], now + for_s)

    def hot(self, now: float) -> bool:
        return any(until > now for until in self._until.values())
