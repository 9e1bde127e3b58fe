"""The event plane: takes events, logs them, acknowledges them, publishes them, and replays the log.

Three tasks share one state, and only the writer and the reader (`replays.py`) wait for the disk, in a thread each:
intake decodes what arrives and queues it, by key; the writer takes what has queued, the keys in turn, into one
transaction, then acknowledges and publishes; the reader answers replays. What is published is on disk.
"""

from __future__ import annotations

import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec
import trio

from interlock.broker import policy, wire
from interlock.broker.config import BrokerConfig, LogConfig
from interlock.broker.errors import LogError, Refused, UnknownVersion, UnsureWrite, WireError
from interlock.broker.fair import Fair
from interlock.broker.gate import Gate, open_gated
from interlock.broker.keys import Grant
from interlock.broker.log import Draft, EventLog, Record, open_log
from interlock.broker.pace import Pace
from interlock.broker.protocol import (
    BEAT_TOPIC,
    Ack,
    Answer,
    Beat,
    LiveHeader,
    Nack,
    Ping,
    Pong,
    Publish,
    Receipt,
    Replay,
    ReplayFailed,
    Watch,
    Why,
    decode_request,
    refusal,
)
from interlock.broker.receipts import Receipts
from interlock.broker.rejects import Rejects
from interlock.broker.replays import Replays
from interlock.broker.security import Security
from interlock.broker.signing import is_signed
from interlock.broker.sockets import Socket
from interlock.broker.trail import Recent
from interlock.broker.tuning import MAX_SUBSCRIPTION

QUEUE = 4096  # events that wait for the disk; of one key at most as many as is free for all others
QUEUE_BYTES = 64 << 20  # the same in bytes
EVENT_COST = 256  # bytes that an event counts for besides its frames: it takes time to log, however short it is
TURN_BYTES = 8 << 10  # of one key's events that are logged before the next key's: some 10 events of our size
MAX_ID = 256  # characters of an event's id and of its source
COMMIT = 1024  # events in one transaction: some 10 ms of CPU, beside one fsync
KEY_COMMIT = 256  # of one key: 4 windows of an outbox, so that only a flood meets it; the others wait for it
COMMIT_BYTES = 8 << 20  # in one transaction: what a slow disk writes in 0.1 s, for which the next event waits
RETAIN_S = 30.0  # between looks at what is too old: it takes a millisecond if nothing is
PEERS = 20_000  # connections whose order of publications is remembered: more than can connect
PEER_QUEUE = 4000  # messages that wait for one client: 8 pages of a replay

KEEP = LogConfig()

T = TypeVar("T")

_log = logging.getLogger(__name__)


class _Waiting(msgspec.Struct, frozen=True):
    key: Hashable
    peer: bytes
    n: int
    draft: Draft


class EventPlane:
    """One broker's event plane on open sockets and an open log. `run` serves until cancelled."""

    def __init__(
        self, ingress: Socket, feed: Socket, log: EventLog, gate: Gate | None = None, *, keep: LogConfig = KEEP
    ) -> None:
        self._gate = gate  # None: all may do everything
        self._ingress = ingress
        self._feed = feed
        self._log = log
        self._keep = keep
        self._disk = trio.Lock()  # one of: adding events, dropping old ones
        self._queue: Fair[_Waiting] = Fair(items=QUEUE, cost=QUEUE_BYTES, quantum=TURN_BYTES)
        self._queued = trio.lowlevel.ParkingLot()
        self._expected: OrderedDict[bytes, int] = OrderedDict()
        self._published = log.last
        self._recent = Recent(log.last)
        self._receipts = Receipts()
        self._epoch = time.time_ns()
        self._beats = 0
        self._pace = Pace()
        self._hurry = trio.Event()
        self._trouble = ""
        if log.trouble:
            self._note(log.trouble)
        self.rejects = Rejects("event plane")
        self._replays = Replays(ingress, log, self.rejects)

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._take_in)
            nursery.start_soon(self._write)
            nursery.start_soon(self._retain)
            nursery.start_soon(self._replays.run)
            nursery.start_soon(self._beat)
            nursery.start_soon(self._take_subscriptions)

    # --- intake

    async def _take_in(self) -> None:
        while True:
            for user, (peer, *frames) in await self._ingress.receive_known():
                try:
                    self._take(user, peer, frames)
                except UnknownVersion as error:
                    self.rejects.count("a request of an unknown version", error)
                    self._answer(peer, refusal(frames[0], error, _id_of(frames[1:])))
                except WireError as error:
                    self.rejects.count("what is not a request", error)
                    if self._gate is not None:
                        self._gate.garbage(user)
                except Refused:  # noted by the gate
                    self.rejects.count("a request of one who may not ask")
            self._tell_watchers()

    def _take(self, user: str, peer: bytes, frames: list[bytes]) -> None:
        if self._gate is not None:
            try:
                self._gate.request(user, sum(map(len, frames)))
            except Refused as refused:
                self._answer(peer, Nack("log", str(refused), _id_of(frames[1:])))
                raise
        request = decode_request(frames[0] if frames else b"")
        match request:
            case Publish():
                self._publish(user, peer, request, frames[1:])
            case Replay():
                try:
                    self._admit_prefixes(user, request.prefixes)
                except Refused as refused:
                    self._answer(peer, ReplayFailed(request.request, str(refused), "refused"))
                    return
                self._replays.ask(user or peer, peer, request)
            case Receipt():
                self._admit(user, lambda grant: self._receipts.take(grant, request))
            case Watch():
                answers = self._admit(user, lambda grant: self._receipts.watch(grant, peer, request))
                self._ingress.send_burst([[peer, wire.encode(answer)] for answer in answers])
            case Ping():
                self._admit_prefixes(user, [])
                if self._log.identity:
                    self._answer(peer, Pong(request.request, self._published, self._log.identity))

    def _admit(self, user: str, check: Callable[[Grant | None], T]) -> T:
        """What `check` finds for this user's grant (None: there are no keys). Refused as it says, which is logged."""
        if self._gate is None:
            return check(None)
        found: list[T] = []
        self._gate.admit(user, lambda grant: found.append(check(grant)))
        return found[0]

    def _admit_prefixes(self, user: str, prefixes: Sequence[str]) -> None:
        """May this user hear these?"""
        self._admit(user, lambda grant: None if grant is None else policy.subscribe(grant, prefixes))

    def _publish(self, user: str, peer: bytes, request: Publish, frames: list[bytes]) -> None:
        try:
            event = _checked(frames)
            if self._gate is not None:
                self._gate.admit(user, lambda grant: policy.publish(grant, event))
        except UnknownVersion as error:  # its publisher keeps it, and what follows must not overtake it
            self.rejects.count("an event of an unknown version", error)
            self._answer(peer, Nack("version", str(error), _id_of(frames)))
            return
        except (WireError, Refused) as error:
            self.rejects.count("what is not an event, or its sender may not", error)
            self._expect(peer, request)
            kind: Why = "invalid" if isinstance(error, WireError) else "refused"
            if self._gate is not None and kind == "invalid":
                self._gate.garbage(user)
            self._answer(peer, Nack(kind, str(error), _id_of(frames)))
            return
        if not self._may_follow(peer, request):
            self._answer(peer, Nack("order", "an earlier event is missing", event.header.id))
            return
        key = user or peer  # without keys, connections take turns
        waiting = _Waiting(key, peer, request.n, Draft(event.topic, event.header, event.raw))
        if self._queue.put(key, waiting, EVENT_COST + sum(map(len, frames))):
            self._expect(peer, request)
            self._queued.unpark()
        else:
            self.rejects.count("(for now) an event: too many of its sender wait for the disk")
            self._answer(peer, Nack("log", "too many of your events wait for the disk", event.header.id))

    def _may_follow(self, peer: bytes, request: Publish) -> bool:
        """Whether everything that this connection sent before has arrived."""
        return not request.n or request.n <= max(self._expected.get(peer, request.oldest), request.oldest)

    def _expect(self, peer: bytes, request: Publish) -> None:
        """The next one of this connection may come, if this one was in its place."""
        if not request.n:
            return
        expected = max(self._expected.get(peer, request.oldest), request.oldest)
        self._expected[peer] = max(expected, request.n + 1) if request.n <= expected else expected
        self._expected.move_to_end(peer)
        while len(self._expected) > PEERS:
            self._expected.popitem(last=False)

    def _answer(self, peer: bytes, answer: Answer) -> bool:
        delivered = self._ingress.send_nowait([peer, wire.encode(answer)])
        if not delivered:
            self._count_unheard()
        return delivered

    def _count_unheard(self) -> None:
        self.rejects.count("an answer whose asker is gone or does not read")

    def _tell_watchers(self) -> None:
        for peer, received in self._receipts.due():
            if not self._answer(peer, received):
                self._receipts.gone(received.command, peer)

    # --- the writer

    async def _write(self) -> None:
        while True:
            while not self._queue:
                await self._queued.park()
            batch = self._queue.take(COMMIT, COMMIT_BYTES, each=KEY_COMMIT)
            drafts = [waiting.draft for waiting in batch]
            try:
                async with self._disk:
                    records = await trio.to_thread.run_sync(partial(self._log.append, drafts, now=time.time()))
            except LogError as error:
                self._refuse(batch, error)
                continue
            self._note("")
            self._remember_commands(records)
            self._feed.send_burst([self._as_news(record) for record in records if record.fresh])
            self._pace.event()
            self._hurry.set()
            acks = [
                [waiting.peer, wire.encode(Ack(waiting.draft.header.id, record.header.seq))]
                for waiting, record in zip(batch, records, strict=True)
            ]
            for _ in range(len(acks) - self._ingress.send_burst(acks)):
                self._count_unheard()

    def _remember_commands(self, records: list[Record]) -> None:
        now = trio.current_time()
        for record in records:
            if is_signed(record.topic):
                header = record.header
                self._receipts.logged(header.id, topic=record.topic, source=header.source, seq=header.seq, now=now)

    def _refuse(self, batch: list[_Waiting], error: LogError) -> None:
        self._note(str(error))
        if self._log.last > self._published:  # the commit happened and then failed: subscribers learn from the beat
            self._published = self._log.last
            self._recent.skip(self._published)
        first: dict[tuple[Hashable, bytes], int] = {}
        for waiting in batch:
            if waiting.n:
                first.setdefault((waiting.key, waiting.peer), waiting.n)
            self._answer(waiting.peer, Nack("log", str(error), waiting.draft.header.id, isinstance(error, UnsureWrite)))
        for (key, peer), n in first.items():  # what follows must not overtake it
            if peer in self._expected:
                self._expected[peer] = min(self._expected[peer], n)
            for later in self._queue.withdraw(key, partial(_follows, peer, n)):
                self._answer(peer, Nack("order", "an earlier event could not be written", later.draft.header.id))

    def _note(self, trouble: str) -> None:
        if trouble != self._trouble:
            if trouble:
                _log.error("the event log refuses events: %s", trouble)
            else:
                _log.warning("the event log takes events again")
            self._trouble = trouble

    def _as_news(self, record: Record) -> list[bytes]:
        """The frames of a fresh event, which is published in this order."""
        header = record.header
        since, recent = self._recent.trail()
        live = LiveHeader(  # field by field: asdict would take half of what an event costs
            v=header.v,
            id=header.id,
            source=header.source,
            time=header.time,
            seq=header.seq,
            prev=header.prev,
            logged=header.logged,
            expires=header.expires,
            sig=header.sig,
            since=since,
            recent=recent,
        )
        self._recent.add(record.topic, header.seq)
        self._published = header.seq
        return [record.topic.encode(), wire.encode(live), record.body]

    async def _retain(self) -> None:
        """Drop what is old, a little at a time, as far as a snapshot stands for it."""
        while True:
            await trio.sleep(RETAIN_S)
            before, size = time.time() - self._keep.keep_days * 86_400, int(self._keep.keep_mb * (1 << 20))
            try:
                dropped = 1
                while dropped:
                    async with self._disk:
                        dropped = await trio.to_thread.run_sync(partial(self._log.prune, before=before, max_bytes=size))
            except LogError as error:
                self.rejects.count("(for now) old events that the log can't drop", error)

    # --- the feed

    async def _beat(self) -> None:
        while True:
            self._beats += 1
            since, topics = self._recent.beat()
            beat = Beat(
                beat=self._beats,
                epoch=self._epoch,
                seq=self._published,
                since=since,
                topics=topics,
                log=self._log.identity,
                next=self._pace.beat(trio.current_time(), self._feed.users),
            )
            if self._log.identity:  # without one, subscribers wait; they would take it for a new log
                self._feed.send_nowait([BEAT_TOPIC.encode(), wire.encode(beat)])
            self._hurry = trio.Event()
            while trio.current_time() < (due := self._pace.due()):
                with trio.move_on_at(due):
                    await self._hurry.wait()
                    self._hurry = trio.Event()

    def _subscribed(self) -> None:
        self._pace.joined()
        self._hurry.set()

    async def _take_subscriptions(self) -> None:
        if self._gate is not None:
            await self._gate.grant_subscriptions(self._feed, self._subscribed)
        while True:
            for frames in await self._feed.receive_batch():
                if len(frames) != 1 or frames[0][:1] not in (b"\0", b"\1"):
                    self.rejects.count("what is not a subscription", f"{len(frames)} frames")


def _follows(peer: bytes, n: int, waiting: _Waiting) -> bool:
    return waiting.peer == peer and waiting.n > n


def _checked(frames: list[bytes]) -> wire.Event:
    """The event, if it may stand in the log; WireError otherwise."""
    event = wire.decode_event(frames)
    if not event.topic.endswith("/") or not event.topic.isprintable() or event.topic.startswith(BEAT_TOPIC):
        raise WireError(f"{event.topic!r} is not a topic of events", hint="each ends with a slash")
    if not event.header.id or max(len(event.header.id), len(event.header.source)) > MAX_ID:
        raise WireError("the event has no id, or one too long", hint=f"1 to {MAX_ID} characters, as for its source")
    if not math.isfinite(event.header.time):
        raise WireError("the event's time is no number")
    return event


def _id_of(frames: list[bytes]) -> str:
    try:
        return wire.decode_header(frames[1]).id
    except (WireError, IndexError):
        return ""


async def serve_events(
    config: BrokerConfig,
    folder: Path,
    *,
    security: Security | None = None,
    keep: LogConfig = KEEP,
    task_status: trio.TaskStatus[BrokerConfig] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve the event plane with its log in `folder` until cancelled; started with the real endpoints filled in.

    security: None lets everybody do everything, and is for the loopback only.
    A damaged log takes no events and is replayed as far as it can be read.
    InUse if a port is taken, LogError if there is no log and none can be made.
    """
    log = await trio.to_thread.run_sync(open_log, folder / "events.sqlite")
    try:
        async with open_gated(security, "event plane", heartbeat_s=config.heartbeat_s) as (sockets, gate):
            ingress = sockets.open(
                "router", bind=config.events, mandatory=True, send_limit=PEER_QUEUE, label="event ingress"
            )
            feed = sockets.open(
                "xpub",
                bind=config.feed,
                send_limit=PEER_QUEUE,
                max_message=MAX_SUBSCRIPTION,
                manual=gate is not None,
                label="event feed",
            )
            if gate is not None:
                gate.guard(ingress, feed)
            plane = EventPlane(ingress, feed, log, gate, keep=keep)
            task_status.started(msgspec.structs.replace(config, events=ingress.endpoint, feed=feed.endpoint))
            _log.info("event plane at %s and %s, %d events in the log", ingress.endpoint, feed.endpoint, log.last)
            await plane.run()
    finally:
        log.close()
