"""The follower delivers the log, filtered, in order, whatever the feed does."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from interlock.broker.protocol import BEAT_S, LINK_LOST_S, Beat
from interlock.broker.sequence import REPLAY_TIMEOUT_S, Arrival, Ask, Deliver, Follower, Moved, Page, Step, matches
from interlock.broker.trail import Recent

TIMES = {"ok": 1, "twice": 2, "lost": 0, "late": 0, "failed": 0}
TOPICS = ["fact/host/a/", "fact/host/b/", "fact/host/alpha/", "command/a/", "rollback/a/"]


@dataclass
class Broker:
    """A log and its feed, as the event plane makes them."""

    log: list[str] = field(default_factory=list)
    epoch: int = 1
    beats: int = 0
    identity: str = "first"
    recent: Recent = field(default_factory=lambda: Recent(0))

    def append(self, topic: str) -> Arrival[int]:
        since, recent = self.recent.trail()
        self.log.append(topic)
        seq = len(self.log)
        self.recent.add(topic, seq)
        return Arrival(topic, seq, seq, since, recent)

    def beat(self) -> Beat:
        self.beats += 1
        since, topics = self.recent.beat()
        return Beat(beat=self.beats, epoch=self.epoch, seq=len(self.log), since=since, topics=topics, log=self.identity)

    def restart(self) -> None:
        self.epoch += 1
        self.beats = 0
        self.recent = Recent(len(self.log))

    def page(self, after: int | None, prefixes: tuple[str, ...], limit: int) -> Page[int]:
        if after is None:
            return Page(None, [], len(self.log), False, self.identity)
        found = [s for s, t in enumerate(self.log, 1) if s > after and matches(t, prefixes)]
        events = [Arrival(self.log[s - 1], s, s) for s in found[:limit]]
        more = len(found) > limit
        return Page(after, events, events[-1].seq if more else len(self.log), more, self.identity)


@dataclass
class Subscriber:
    """A follower, what it delivered, and what it asks for."""

    follower: Follower[int]
    delivered: list[int] = field(default_factory=list)
    asks: list[int | None] = field(default_factory=list)
    caught_up: bool = False

    def do(self, steps: list[Step[int]]) -> None:
        for step in steps:
            match step:
                case Ask():
                    self.asks.append(step.after)
                case Deliver():
                    self.delivered.append(step.payload)
                case Moved():
                    self.caught_up |= step.caught_up


def subscriber(*prefixes: str, after: int | None = 0) -> Subscriber:
    made = Subscriber(Follower(prefixes, after=after, now=0.0))
    made.do(made.follower.start(0.0))
    return made


def settle(broker: Broker, sub: Subscriber, now: float, limit: int = 3) -> None:
    """The feed and the log work again, until nothing is open."""
    for _ in range(400):
        sub.do(sub.follower.beat(broker.beat(), now))
        while sub.asks:
            sub.do(sub.follower.page(broker.page(sub.asks.pop(), sub.follower.prefixes, limit), now))
        now += REPLAY_TIMEOUT_S
        sub.do(sub.follower.tick(now))
        if not sub.asks and sub.follower.position == len(broker.log):
            return
    raise AssertionError("it never settles")


def expected(broker: Broker, sub: Subscriber, after: int) -> list[int]:
    return [s for s, t in enumerate(broker.log, 1) if s > after and matches(t, sub.follower.prefixes)]


@dataclass
class Network:
    """Between a broker and a subscriber: each message arrives ("ok"), or not, or twice, or after the next one."""

    broker: Broker
    sub: Subscriber
    limit: int
    now: float = 0.0
    late_events: list[Arrival[int]] = field(default_factory=list)
    late_pages: list[Page[int]] = field(default_factory=list)

    def event(self, topic: str, fate: str) -> None:
        arrival = self.broker.append(topic)
        for _ in range(TIMES[fate]):
            self.sub.do(self.sub.follower.event(arrival, self.now))
        if fate == "late":
            self.late_events.append(arrival)
        while fate == "ok" and self.late_events:
            self.sub.do(self.sub.follower.event(self.late_events.pop(0), self.now))

    def burst(self, topic: str, fate: str) -> None:
        for _ in range(80):
            self.event(topic, fate)

    def beat(self, topic: str, fate: str) -> None:
        beat = self.broker.beat()
        for _ in range(TIMES[fate]):
            self.sub.do(self.sub.follower.beat(beat, self.now))

    def answer(self, topic: str, fate: str) -> None:
        if not self.sub.asks:
            return
        page = self.broker.page(self.sub.asks.pop(0), self.sub.follower.prefixes, self.limit)
        for _ in range(TIMES[fate]):
            self.sub.do(self.sub.follower.page(page, self.now))
        if fate == "failed":
            self.sub.do(self.sub.follower.failed(self.now))
        if fate == "late":
            self.late_pages.append(page)
        while fate == "ok" and self.late_pages:
            self.sub.do(self.sub.follower.page(self.late_pages.pop(0), self.now))

    def restart(self, topic: str, fate: str) -> None:
        self.broker.restart()

    def time(self, topic: str, fate: str) -> None:
        self.now += REPLAY_TIMEOUT_S
        self.sub.do(self.sub.follower.tick(self.now))


steps = st.lists(
    st.one_of(
        st.tuples(st.just("event"), st.sampled_from(TOPICS), st.sampled_from(["ok", "lost", "twice", "late"])),
        st.tuples(st.just("burst"), st.sampled_from(TOPICS), st.sampled_from(["ok", "lost"])),
        st.tuples(st.just("beat"), st.just(""), st.sampled_from(["ok", "lost", "twice"])),
        st.tuples(st.just("answer"), st.just(""), st.sampled_from(["ok", "lost", "twice", "late", "failed"])),
        st.tuples(st.just("restart"), st.just(""), st.just("ok")),
        st.tuples(st.just("time"), st.just(""), st.just("ok")),
    ),
    max_size=60,
)


@settings(max_examples=400, deadline=None)
@given(
    steps=steps,
    before=st.lists(st.sampled_from(TOPICS), max_size=8),
    after=st.one_of(st.none(), st.integers(0, 8)),
    prefixes=st.sampled_from([("",), ("fact/",), ("command/a/", "rollback/a/"), ("fact/host/a/",), ()]),
    limit=st.integers(1, 4),
)
def test_whatever_is_lost_repeated_or_late_the_delivered_events_are_the_log_filtered_in_order(
    steps: list[tuple[str, str, str]],
    before: list[str],
    after: int | None,
    prefixes: tuple[str, ...],
    limit: int,
) -> None:
    broker = Broker()
    for topic in before:
        broker.append(topic)
    begin = after = None if after is None else min(after, len(before))
    sub = subscriber(*prefixes, after=after)
    network = Network(broker, sub, limit)
    for what, topic, fate in steps:
        network.now += 0.01
        getattr(network, what)(topic, fate)
        if begin is None:
            begin = sub.follower.position  # where it found the end of the log
        if begin is not None:
            assert sub.delivered == expected(broker, sub, begin)[: len(sub.delivered)]
    if begin is None:
        begin = len(broker.log)
    settle(broker, sub, network.now, limit)
    assert sub.delivered == expected(broker, sub, begin)
    assert sub.caught_up
    assert sub.follower.resets == 0


def test_an_event_that_follows_what_is_known_is_delivered_at_once() -> None:
    broker, sub = Broker(), subscriber("command/a/")
    settle(broker, sub, 0.0)
    for topic in ["fact/host/b/", "fact/host/b/", "command/a/"]:
        sub.do(sub.follower.event(broker.append(topic), 0.1))
    assert sub.delivered == [3]
    assert sub.asks == []


def test_a_hole_on_another_topic_of_ours_is_seen_with_the_next_event() -> None:
    broker, sub = Broker(), subscriber("command/a/", "rollback/a/")
    settle(broker, sub, 0.0)
    broker.append("rollback/a/")  # lost
    sub.do(sub.follower.event(broker.append("command/a/"), 0.1))
    assert sub.delivered == []
    assert sub.asks == [0]
    settle(broker, sub, 0.2)
    assert sub.delivered == [1, 2]
    assert sub.follower.gaps == 1


def test_a_lost_last_event_is_seen_with_the_next_beat() -> None:
    broker, sub = Broker(), subscriber("fact/")
    settle(broker, sub, 0.0)
    broker.append("fact/host/a/")
    sub.do(sub.follower.beat(broker.beat(), 0.5))
    assert sub.asks == [0]


def test_five_lost_beats_of_a_quiet_time_need_no_replay_and_seven_with_events_do() -> None:
    broker, sub = Broker(), subscriber("rollback/")
    settle(broker, sub, 0.0)
    for _ in range(5):
        broker.append("fact/host/a/")
        broker.beat()
    sub.do(sub.follower.beat(broker.beat(), 1.0))
    assert sub.asks == []
    for _ in range(7):
        broker.append("fact/host/a/")
        broker.beat()
    sub.do(sub.follower.beat(broker.beat(), 1.5))
    assert sub.asks == [5]


def test_silence_is_a_lost_link_and_a_beat_ends_it() -> None:
    broker, sub = Broker(), subscriber("fact/")
    settle(broker, sub, 0.0)
    sub.do(sub.follower.beat(broker.beat(), 10.0))
    assert sub.follower.deadline() == 10.0 + LINK_LOST_S
    sub.do(sub.follower.tick(10.0 + LINK_LOST_S))
    assert sub.follower.lost
    broker.append("fact/host/a/")
    broker.restart()
    sub.do(sub.follower.beat(broker.beat(), 20.0))
    assert not sub.follower.lost
    assert sub.asks == [0]


def test_a_beat_that_announces_a_longer_pause_is_no_silence_until_that_is_over() -> None:
    broker, sub = Broker(), subscriber("fact/")
    settle(broker, sub, 0.0)
    sub.do(sub.follower.beat(msgspec.structs.replace(broker.beat(), next=5.0), 10.0))
    assert sub.follower.deadline() == 10.0 + 5.0 - BEAT_S + LINK_LOST_S
    sub.do(sub.follower.tick(15.0))
    assert not sub.follower.lost
    sub.do(sub.follower.beat(msgspec.structs.replace(broker.beat(), next=float("inf")), 16.0))
    assert sub.follower.deadline() < 100.0
    sub.do(sub.follower.beat(msgspec.structs.replace(broker.beat(), next=-1.0), 17.0))
    assert sub.follower.deadline() == 17.0 + LINK_LOST_S


def test_more_live_events_than_are_kept_during_a_replay_are_replayed_too() -> None:
    broker, sub = Broker(), subscriber("fact/")
    for _ in range(5000):
        sub.do(sub.follower.event(broker.append("fact/host/a/"), 0.1))
    settle(broker, sub, 0.2, limit=500)
    assert sub.delivered == list(range(1, 5001))


def test_another_log_is_read_from_its_begin() -> None:
    broker, sub = Broker(), subscriber("fact/")
    for _ in range(3):
        broker.append("fact/host/a/")
    settle(broker, sub, 0.0)
    other = Broker(identity="second", epoch=2)
    other.append("fact/host/a/")
    settle(other, sub, 1.0)
    assert sub.delivered == [1, 2, 3, 1]
    assert sub.follower.resets == 1


def test_a_place_beyond_the_end_of_the_log_stems_from_another_one() -> None:
    broker, sub = Broker(), subscriber("fact/", after=50)
    broker.append("fact/host/a/")
    settle(broker, sub, 0.0)
    assert sub.delivered == [1]


def test_a_beat_from_before_a_restart_is_ignored() -> None:
    broker, sub = Broker(), subscriber("fact/")
    settle(broker, sub, 0.0)
    old = broker.beat()
    broker.restart()
    settle(broker, sub, 1.0)
    broker.append("fact/host/a/")
    assert sub.follower.beat(old, 1.5) == []


def test_the_trail_of_a_beat_is_bounded_and_says_so() -> None:
    recent = Recent(0)
    for seq in range(1, 3001):
        recent.add(f"fact/host/h{seq}/", seq)
    since, topics = recent.beat()
    assert since == 2000
    assert sorted(topics.values()) == list(range(2001, 3001))


def test_events_that_were_never_published_are_before_every_trail() -> None:
    recent = Recent(0)
    recent.add("fact/host/a/", 1)
    recent.skip(4)
    assert recent.trail() == (4, {})
    assert recent.beat() == (4, {})
