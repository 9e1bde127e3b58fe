"""The broker's memory of what it published last, for the trails of events and beats. Pure."""

from __future__ import annotations

from collections import deque

from interlock.broker.protocol import BEAT_MEMORY, TRAIL_EVENTS

BEAT_TOPICS = 1000  # in one beat at most, some 50 kB; with more, a subscriber that missed any asks the log


class Recent:
    """Topics with their last numbers, after some number in the past. `last`: the number before the first event."""

    def __init__(self, last: int) -> None:
        self.last = last
        self._events: deque[tuple[int, str]] = deque()
        self._before_events = last
        self._beats: deque[int] = deque([last], maxlen=BEAT_MEMORY)
        self._since_beats: dict[str, int] = {}  # in the order of their numbers
        self._floor = last

    def add(self, topic: str, seq: int) -> None:
        self.last = seq
        self._events.append((seq, topic))
        while len(self._events) > TRAIL_EVENTS:
            self._before_events = self._events.popleft()[0]
        self._since_beats.pop(topic, None)
        self._since_beats[topic] = seq

    def trail(self) -> tuple[int, dict[str, int]]:
        """For the event that comes next: `since`, and every topic with an event after it."""
        return self._before_events, {topic: seq for seq, topic in self._events}

    def beat(self) -> tuple[int, dict[str, int]]:
        """The same for a beat that is sent now: what changed in the time of the last beats."""
        since = max(self._floor, self._beats[0])
        stale = [topic for topic, seq in self._since_beats.items() if seq <= since]
        for topic in stale:
            del self._since_beats[topic]
        while len(self._since_beats) > BEAT_TOPICS:
            oldest = next(iter(self._since_beats))
            since = self._floor = self._since_beats.pop(oldest)
        self._beats.append(self.last)
        return since, dict(self._since_beats)

    def skip(self, seq: int) -> None:
        """Events up to `seq` are logged but were not published: whoever is before it must ask the log."""
        self.last = self._floor = self._before_events = seq
        self._events.clear()
        self._since_beats.clear()
