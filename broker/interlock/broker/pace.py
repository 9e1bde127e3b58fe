"""When the event plane's next beat is due. Pure: the time is an argument."""

from __future__ import annotations

from interlock.broker.protocol import BEAT_MEMORY, BEAT_S

# Beats to all subscribers together, in a second:
AT_REST_PER_S = 2_000  # while nothing happens: 4 % of a core, measured with 1,000 and with 4,000 subscribers
BUSY_PER_S = 8_000  # while events come or subscribers join: at two a second each, those who are in slow the others down
FRESH = 2  # beats for who has just subscribed: one of them may be under way already


class Pace:
    """Every BEAT_S, or as seldom as so many subscribers demand: less while events come or subscribers join.

    What a subscriber lost it sees with the next beat, and links are watched by pings: a beat that comes late while
    nothing happens delays only the news that a broker stands still.
    """

    def __init__(self) -> None:
        self._quick = BEAT_MEMORY
        self._last = float("-inf")
        self._subscribers = 0

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
        self._subscribers = subscribers
        return self._pause()

    def due(self) -> float:
        """When the next one is to leave."""
        return self._last + self._pause()

    def _pause(self) -> float:
        return max(BEAT_S, self._subscribers / (BUSY_PER_S if self._quick else AT_REST_PER_S))
