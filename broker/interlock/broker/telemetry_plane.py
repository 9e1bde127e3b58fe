"""The telemetry plane: passes batches on, as they came, to whoever listens, and remembers the newest values. Nothing
waits.

It runs in a process of its own, so that a flood of samples never delays an event. A subscriber that does not keep up
loses batches: only it can tell, by the holes in their numbers, since an XPUB drops without a word. A late one asks for
what is remembered, on the connection for batches: an XPUB can't address one subscriber.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator

import msgspec
import trio

from interlock.broker import policy, topics, wire
from interlock.broker.config import BrokerConfig
from interlock.broker.errors import Refused, UnknownVersion, WireError
from interlock.broker.gate import Gate, open_gated
from interlock.broker.keys import Grant
from interlock.broker.lastvalues import OWN_SOURCES, LastValues
from interlock.broker.pulse import PULSE_S
from interlock.broker.rejects import Rejects
from interlock.broker.samples import Batch, Labels, SeriesTable, labels
from interlock.broker.security import Security
from interlock.broker.sockets import Socket
from interlock.broker.telemetry_protocol import (
    BEAT_GAP_S,
    BEAT_S,
    BEAT_TOPIC,
    PAGE_BATCHES,
    PAGE_BYTES,
    AskFailed,
    AskLast,
    Beat,
    Page,
    Why,
    decode_ask,
    number_of,
)
from interlock.broker.tuning import MAX_SUBSCRIPTION

SUBSCRIBER_QUEUE = 1000  # batches that wait for one subscriber: 1 s of 100 publishers at 10 Hz; then its next are lost
PUBLISHER_QUEUE = 100  # batches of one publisher that wait to be read; then they wait, and are dropped, at its side
TAKEN_AT_ONCE = 32  # messages between two looks at the rest: beats come in time though each takes 15 ms
MAX_ASKS = 1_000  # requests for last values that wait, one of each connection; who gets no answer asks again
MAX_SHOWN = 100  # characters of a peer's words in the log
OWN_HOST, OWN_NAME = "fleet", "broker"  # what the plane says of itself belongs to no host
INGRESS = "telemetry ingress"

_log = logging.getLogger(__name__)


async def serve_telemetry(
    config: BrokerConfig,
    *,
    security: Security | None = None,
    task_status: trio.TaskStatus[BrokerConfig] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve the telemetry plane until cancelled; started with the real endpoints filled in. InUse for a taken port."""
    async with open_gated(security, "telemetry plane", heartbeat_s=config.heartbeat_s) as (sockets, gate):
        ingress = sockets.open(
            "router", bind=config.telemetry_in, receive_limit=PUBLISHER_QUEUE, label="telemetry ingress"
        )
        feed = sockets.open(
            "xpub",
            bind=config.telemetry_out,
            send_limit=SUBSCRIBER_QUEUE,
            max_message=MAX_SUBSCRIPTION,
            manual=gate is not None,
            label="telemetry feed",
        )
        if gate is not None:
            gate.guard(ingress, feed)
        rejects = Rejects("telemetry plane")
        plane = _Plane(ingress, feed, gate, rejects)
        task_status.started(msgspec.structs.replace(config, telemetry_in=ingress.endpoint, telemetry_out=feed.endpoint))
        _log.info("telemetry plane at %s and %s", ingress.endpoint, feed.endpoint)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_take_subscriptions, feed, gate, rejects, plane.subscribed)
            nursery.start_soon(plane.beat)
            nursery.start_soon(plane.report)
            nursery.start_soon(plane.answer)
            while True:
                batches = []
                for user, (peer, *frames) in await ingress.receive_known(TAKEN_AT_ONCE):
                    if plane.take(user, peer, frames):
                        batches.append(frames)
                plane.pass_on(batches)


class _Plane:
    """What the tasks of the telemetry plane share."""

    def __init__(self, ingress: Socket, feed: Socket, gate: Gate | None, rejects: Rejects) -> None:
        self._ingress = ingress
        self._feed = feed
        self._gate = gate
        self._rejects = rejects
        self._last = LastValues()
        self._epoch = time.time_ns()
        self._passed = 0
        self._subscribed = trio.Event()
        self._asked = trio.Event()
        self._asks: OrderedDict[bytes, AskLast] = OrderedDict()

    def take(self, user: str, peer: bytes, frames: list[bytes]) -> bool:
        """One message of a peer: a request, or a batch. Whether it is one to pass on."""
        if len(frames) == 1:
            self._take_ask(user, peer, frames[0])
            return False
        try:
            if self._gate is not None:
                self._gate.batch(user, sum(map(len, frames)))
            batch = wire.decode_batch(frames)
            if self._gate is not None and batch.series:
                self._gate.announced(user, len(batch.series))
            topic = wire.decode_topic(frames[0])
            if not topic.startswith(f"{topics.TELEMETRY}{batch.source}/") or not topic.endswith("/"):
                raise WireError(f"{topic!r} is not a topic of telemetry of {batch.source[:MAX_SHOWN]!r}")
            if batch.cached:
                raise WireError("only the broker says what it remembers", where=topic)
            if self._gate is not None:
                self._gate.admit(user, lambda grant: self._may_send(user, grant, topic, batch))
        except UnknownVersion as error:
            self._rejects.count("a batch of an unknown version", error)
        except WireError as error:
            self._rejects.count("what is not a telemetry batch", error)
            if self._gate is not None:
                self._gate.garbage(user)
        except Refused as error:
            self._rejects.count("a batch whose sender may not", error)
        else:
            self._last.take(topic, batch, trio.current_time(), owner=user)
            return True
        return False

    def _may_send(self, user: str, grant: Grant, topic: str, batch: Batch) -> None:
        policy.telemetry(grant, topic, batch)
        if not self._last.has_room(batch.source, user):
            raise Refused(f"sends as more than {OWN_SOURCES} sources at once", where=f"{grant.identity} on {topic}")

    def pass_on(self, batches: list[list[bytes]]) -> None:
        """Send what was taken to whoever listens."""
        self._passed += self._feed.send_burst(batches)

    def subscribed(self) -> None:
        """Somebody subscribes."""
        self._subscribed.set()

    def _take_ask(self, user: str, peer: bytes, frame: bytes) -> None:
        try:
            ask = decode_ask(frame)
            if self._gate is not None:
                self._gate.admit(user, lambda grant: policy.subscribe(grant, ask.prefixes))
        except UnknownVersion as error:
            self._rejects.count("a request of an unknown version", error)
            self._fail(peer, frame, "version", error)
            return
        except WireError as error:
            self._rejects.count("what is not a request for last values", error)
            self._fail(peer, frame, "invalid", error)
            if self._gate is not None:
                self._gate.garbage(user)
            return
        except Refused as error:
            self._rejects.count("a request whose sender may not", error)
            self._fail(peer, frame, "refused", error)
            return
        if len(self._asks) < MAX_ASKS or peer in self._asks:
            self._asks[peer] = ask
            self._asked.set()
        else:
            self._rejects.count("(for now) a request for last values beyond the limit")

    def _fail(self, peer: bytes, frame: bytes, kind: Why, error: Refused | WireError) -> None:
        """Tell who asks why there is no answer; one whose request has no number would not understand that."""
        number = number_of(frame)
        if number is not None:
            self._ingress.send_nowait([peer, wire.encode(AskFailed(number, str(error), kind))])

    # --- the tasks

    async def answer(self) -> None:
        """One request after the other, page by page, so that batches go on meanwhile."""
        while True:
            await self._asked.wait()
            self._asked = trio.Event()
            while self._asks:
                peer, ask = self._asks.popitem(last=False)
                number = 0
                for number, (page, more) in enumerate(paged(self._last.snapshot(ask.prefixes, trio.current_time())), 1):
                    self._ingress.send_nowait([peer, wire.encode(Page(ask.request, number, more)), *page])
                    await trio.lowlevel.checkpoint()

    async def beat(self) -> None:
        """Each half second, and at once for who is new: its subscriptions are in force then."""
        number = 0
        while True:
            number += 1
            beat = Beat(number, self._epoch, time.monotonic())
            self._feed.send_nowait([BEAT_TOPIC.encode(), wire.encode(beat)])
            await trio.sleep(BEAT_GAP_S)
            with trio.move_on_after(BEAT_S - BEAT_GAP_S):
                await self._subscribed.wait()
                self._subscribed = trio.Event()

    async def report(self) -> None:
        """The plane's own figures, as any publisher's."""
        topic = topics.telemetry(OWN_HOST, OWN_NAME)
        table = SeriesTable(f"{OWN_HOST}/{OWN_NAME}", self._epoch)
        while True:
            self._last.forget_silent(trio.current_time())
            batch = table.batch(self._figures(), time=time.time())
            self._last.take(topic, batch, trio.current_time())
            self.pass_on([[topic.encode(), wire.encode(batch)]])
            await trio.sleep(PULSE_S)

    def _figures(self) -> dict[Labels, float]:
        last = self._last
        figures = {
            labels("role_up", host=OWN_HOST, role="broker", name="telemetry"): 1,
            labels("bus_batches_total", host=OWN_HOST): self._passed,
            labels("bus_remembered_sources", host=OWN_HOST): last.sources,
            labels("bus_remembered_series", host=OWN_HOST): last.series,
            labels("bus_not_remembered_total", host=OWN_HOST): last.refused,
            labels("bus_repeated_total", host=OWN_HOST): last.repeated,
        }
        for kind, count in self._rejects.counts.items():
            figures[labels("bus_rejected_total", host=OWN_HOST, link=INGRESS, kind=kind)] = count
        for source, count in last.lost.items():
            figures[labels("bus_lost_total", host=OWN_HOST, link=INGRESS, source=source)] = count
        return {key: float(value) for key, value in figures.items()}


def paged(snapshot: Iterator[tuple[str, list[Batch]]]) -> Iterator[tuple[list[bytes], bool]]:
    """(frames of topics and batches, whether more follow), page by page; one page at least."""
    page: list[bytes] = []
    size = 0
    for topic, batches in snapshot:
        for batch in batches:
            frame = wire.encode(batch)
            if page and (len(page) >= 2 * PAGE_BATCHES or size + len(frame) > PAGE_BYTES):
                yield page, True
                page, size = [], 0
            page += [topic.encode(), frame]
            size += len(frame)
    yield page, False


async def _take_subscriptions(
    feed: Socket, gate: Gate | None, rejects: Rejects, subscribed: Callable[[], None]
) -> None:
    if gate is not None:
        await gate.grant_subscriptions(feed, subscribed)
    while True:
        for frames in await feed.receive_batch():
            if len(frames) != 1 or frames[0][:1] not in (b"\0", b"\1"):
                rejects.count("what is not a subscription", f"{len(frames)} frames")
            elif frames[0] == b"\1" + BEAT_TOPIC.encode():
                subscribed()
