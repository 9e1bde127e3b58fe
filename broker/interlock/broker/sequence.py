"""A subscriber's place in the log: what comes next, what came twice, what is missing. Pure: the time is an argument.

The feed may lose any message, so each tells enough to see what was lost before it. A subscriber of some prefixes sees
only part of the numbers; that 7 follows 3 may be right. So an event carries its *trail*: every topic that had an event
after `since`, with its last number. Who has everything up to `since` looks for its own prefixes in the trail: nothing
newer there, nothing was lost, on any of its topics. Otherwise, and where its place is before `since`, it asks the log
itself (a replay) and keeps what comes meanwhile. A beat carries the same for the time when no event comes.

So what is delivered is the log, filtered by the prefixes, in order: each event once, whatever the feed loses, repeats
or delays; and a lost event is noticed with the next event or beat that arrives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Generic, TypeVar

import msgspec

from interlock.broker.protocol import BEAT_S, LINK_LOST_S, Beat

REPLAY_TIMEOUT_S = 2.0  # without an answer, ask again: a page takes milliseconds, a restart of the broker a second
REPLAY_PAUSE_S = 0.5  # before asking again after the broker said that it can't
MAX_PAUSE_S = 60.0  # a beat may announce no longer silence: that of 100,000 subscribers
KEPT = 2000  # live events kept during a replay; more are let go and replayed

P = TypeVar("P")


class Arrival(msgspec.Struct, Generic[P], frozen=True):
    """One event, whatever `payload` it has. `since` and `recent` are its trail (None: it has none)."""

    topic: str
    seq: int
    payload: P
    since: int | None = None
    recent: Mapping[str, int] = {}


class Page(msgspec.Struct, Generic[P], frozen=True):
    """The answer to `Ask`: all matching events of the log `log` after `after` and up to `through`.

    start: those up to this number are gone, or stand in `snapshot`, which then is to be delivered in their place.
    """

    after: int | None
    events: Sequence[Arrival[P]]
    through: int
    more: bool
    log: str
    start: int = 0
    snapshot: Arrival[P] | None = None


class Ask(msgspec.Struct, frozen=True):
    """Ask the log for what comes after this number; None: only for the number of its newest event."""

    after: int | None


class Deliver(msgspec.Struct, Generic[P], frozen=True):
    seq: int
    payload: P


class Moved(msgspec.Struct, frozen=True):
    """Everything up to this number is delivered, though nothing new matched. `caught_up`: the log's end was reached."""

    position: int
    caught_up: bool = False


Step = Ask | Deliver[P] | Moved


def matches(topic: str, prefixes: Sequence[str]) -> bool:
    return any(topic.startswith(prefix) for prefix in prefixes)


class Follower(Generic[P]):
    """Follows the log under some prefixes. Each method takes what happened and returns what to do, in order.

    position: all up to this number is delivered (None: it begins at the end of the log, and is not known yet).
    lost: no beat for LINK_LOST_S, or longer where the last one announced so; what was missed is replayed when the beats
    come back. gaps: holes seen so far.
    """

    def __init__(self, prefixes: Sequence[str], *, after: int | None, now: float) -> None:
        self.prefixes = tuple(prefixes)
        self.position = after
        self.lost = False
        self.gaps = 0
        self.resets = 0
        self._log = ""
        self._epoch = 0
        self._last_beat = now
        self._silence = LINK_LOST_S
        self._asked: float | None = None  # when, if a replay runs
        self._timeout = REPLAY_TIMEOUT_S
        self._kept: list[Arrival[P]] = []
        self._overflow = False
        self._caught_up = False
        self._snapshot = 0  # the number of a snapshot that was delivered out of its place

    def start(self, now: float) -> list[Step[P]]:
        return self._ask(now)

    def event(self, arrival: Arrival[P], now: float) -> list[Step[P]]:
        """An event of the feed."""
        if not matches(arrival.topic, self.prefixes):
            return []
        if self._asked is not None or self.position is None:
            self._keep(arrival)
            return []
        if arrival.seq <= self.position:
            return []
        if not self._follows(arrival):
            self.gaps += 1
            self._keep(arrival)
            return self._ask(now)
        return [self._next(arrival)]

    def beat(self, beat: Beat, now: float) -> list[Step[P]]:
        """A beat of the feed."""
        if beat.epoch < self._epoch:
            return []  # from before a restart
        self._epoch = beat.epoch
        self._last_beat = now
        self._silence = LINK_LOST_S + min(max(0.0, beat.next - BEAT_S), MAX_PAUSE_S)
        self.lost = False
        if self._other_log(beat.log):
            return self._restart(now)
        if self._asked is not None or self.position is None or beat.seq <= self.position:
            return []
        if self._complete(beat.since, beat.topics):
            self.position = beat.seq
            return [Moved(beat.seq)]
        self.gaps += 1
        return self._ask(now)

    def page(self, page: Page[P], now: float) -> list[Step[P]]:
        """An answer from the log, to this or an earlier request."""
        if self._asked is None:
            return []
        if self._other_log(page.log):
            return self._restart(now)
        if self.position is None:
            if page.after is not None:
                return []
            self.position = page.through
        elif page.after is None or page.after > self.position:
            return []
        elif page.through < self.position:
            # Beyond the end of the log: our position stems from another one. A late answer to an old question is none.
            return self._restart(now) if page.after == self.position else []
        steps: list[Step[P]] = self._skip_to(page)
        for arrival in page.events:
            if self.position < arrival.seq <= page.through:
                steps.append(self._next(arrival))
        self.position = max(self.position, page.through)
        if page.more or self._overflow:
            self._overflow = False
            return steps + self._ask(now)
        self._asked = None
        steps.append(Moved(self.position, caught_up=not self._caught_up))
        self._caught_up = True
        kept, self._kept = self._kept, []
        for arrival in kept:
            steps += self.event(arrival, now)
        return steps

    def failed(self, now: float) -> list[Step[P]]:
        """The broker could not read its log: ask again, not at once."""
        if self._asked is not None:
            self._asked, self._timeout = now, REPLAY_PAUSE_S
        return []

    def tick(self, now: float) -> list[Step[P]]:
        """Time has passed: notice silence, and ask again for what was not answered."""
        if now - self._last_beat >= self._silence:
            self.lost = True
        if self._asked is not None and now - self._asked >= self._timeout:
            return self._ask(now)
        return []

    def deadline(self) -> float:
        """When `tick` is due if nothing arrives before."""
        silent = float("inf") if self.lost else self._last_beat + self._silence
        unanswered = float("inf") if self._asked is None else self._asked + self._timeout
        return min(silent, unanswered)

    # --- inside

    def _next(self, arrival: Arrival[P]) -> Step[P]:
        self.position = arrival.seq
        if arrival.seq == self._snapshot:  # delivered before, in the place of what it stands for
            return Moved(arrival.seq)
        return Deliver(arrival.seq, arrival.payload)

    def _skip_to(self, page: Page[P]) -> list[Step[P]]:
        assert self.position is not None
        if page.start <= self.position:
            return []
        self.position = page.start
        if page.snapshot is None:
            return [Moved(page.start)]
        self._snapshot = page.snapshot.seq
        return [Deliver(page.start, page.snapshot.payload)]

    def _follows(self, arrival: Arrival[P]) -> bool:
        assert self.position is not None
        if arrival.seq == self.position + 1:
            return True
        return arrival.since is not None and self._complete(arrival.since, arrival.recent)

    def _complete(self, since: int, topics: Mapping[str, int]) -> bool:
        """Whether nothing of ours is after the position, as far as the trail tells."""
        assert self.position is not None
        if self.position < since:
            return False
        return not any(seq > self.position and matches(topic, self.prefixes) for topic, seq in topics.items())

    def _ask(self, now: float) -> list[Step[P]]:
        self._asked, self._timeout = now, REPLAY_TIMEOUT_S
        return [Ask(self.position)]

    def _keep(self, arrival: Arrival[P]) -> None:
        if len(self._kept) < KEPT:
            self._kept.append(arrival)
        else:
            self._overflow = True

    def _other_log(self, log: str) -> bool:
        known, self._log = self._log, log
        return known not in ("", log)

    def _restart(self, now: float) -> list[Step[P]]:
        """The log was replaced: all of the new one is new."""
        self.resets += 1
        self.position = 0
        self._kept.clear()
        self._overflow = False
        return self._ask(now)
