"""When the event plane's next beat is due. Pure: the time is an argument."""

from __future__ import annotations

from interlock.broker.protocol import BEAT_MEMORY, BEAT_S

BEATS_PER_S = 2_000  # to all subscribers together while nothing happens: each costs some 10 us, so 2 % of a core
FRESH = 2  # beats for who has just subscribed: one of them may be under way already


class Pace:
    """Every BEAT_S while events come or subscribers join; otherwise as seldom as so many subscribers demand.

    What a subscriber lost it sees with the next beat, and links are watched by the kernel: a beat that comes late while
    nothing happens delays only the news that a broker stands still.
    """

    def __init__(self) -> None:
        self._quick = BEAT_MEMORY
        self._last = float("-inf")
        self._pause = BEAT_S

    def event(self) -> None:
        """Something was published: who lost it learns so soon, even where some beats are lost too."""
        self._quick = BEAT_MEMORY

    def joined(self) -> None:
        """Somebody subscribed to the beats."""
        self._quick = max(self._quick, FRESH)

    def beat(self, now: float, subscribers: int) -> float:
        """A beat leaves now: within how many seconds the next one will, at the latest."""
        self._quick = max(0, self._quick - 1)
        self._last = now
        self._pause = max(BEAT_S, subscribers / BEATS_PER_S)
        return BEAT_S if self._quick else self._pause

    def due(self) -> float:
        """When the next one is to leave."""
        return self._last + (BEAT_S if self._quick else self._pause)
