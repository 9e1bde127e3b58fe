"""A subscription to telemetry: first what the plane remembers, then the feed; and whether the link lives."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import trio

from interlock.broker.bus import SampleFeed
from interlock.broker.errors import UnknownVersion, WireError
from interlock.broker.rejects import Rejects
from interlock.broker.sockets import Sockets
from interlock.broker.telemetry_link import TelemetryLink
from interlock.broker.telemetry_protocol import BEAT_TOPIC, LINK_LOST_S, Beat, decode_beat

# Batches that wait in ZeroMQ while this process does nothing at all: 100 MB, and 25 s of 200,000 samples a second. When
# it is full the link is given up, and libzmq 4.3.5 may end the process (`fq.cpp`, `!_more`) over a message half read.
SOCKET_QUEUE = 50_000
ASK_AGAIN_S = 1.0  # without an answer; building one for 10,000 sources takes some 0.5 s
JOIN_PATIENCE_S = 2.0  # without what the plane remembers by then, a reader starts with what comes
LOOK_S = 0.1  # between looks at the time
LAG_S = 0.2  # beats that come later than this one after another are late; less is the machine's own unrest
CLOCK_WINDOW_S = 120.0  # the clocks' difference is the smallest of so long: they may drift by 50 us a second

_log = logging.getLogger(__name__)


class Lag:
    """How long what comes now has waited on its way, by the beats before it. Pure."""

    def __init__(self) -> None:
        self._epoch = 0
        self._current = self._previous = float("inf")
        self._until = 0.0

    def beat(self, beat: Beat, now: float) -> float:
        difference = now - beat.clock
        if beat.epoch != self._epoch:
            self._epoch, self._current, self._previous, self._until = beat.epoch, difference, difference, now
        if now >= self._until:
            self._until = now + CLOCK_WINDOW_S
            self._previous, self._current = self._current, difference
        self._current = min(self._current, difference)
        lag = difference - min(self._current, self._previous)
        return lag if lag >= LAG_S else 0.0


class SampleReader:
    """Owns one SUB socket. `run` ends with `close`."""

    def __init__(
        self, sockets: Sockets, link: TelemetryLink, endpoint: str, prefixes: Sequence[str], *, label: str, limit: int
    ) -> None:
        self.feed = SampleFeed(name=label, limit=limit, joining=True)
        self._link = link
        self._prefixes = list(prefixes)
        self._rejects = Rejects(label)
        self._label = label
        self._scope = trio.CancelScope()
        self._lag = Lag()
        self._epoch = 0
        self._heard = self._began = trio.current_time()
        self._request = 0
        self._asked_at: float | None = None  # when the request was made that has no answer yet
        self._socket = sockets.open(
            "sub",
            connect=endpoint,
            subscribe=[*prefixes, BEAT_TOPIC],
            receive_limit=SOCKET_QUEUE,
            send_limit=0,  # subscriptions count against it, and would be lost silently
            label=label,
        )

    async def run(self) -> None:
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._receive)
                    nursery.start_soon(self._watch)
        finally:
            self._link.forget(self._request)
            self._socket.close(linger_ms=0)

    def close(self) -> None:
        self._scope.cancel()

    async def _receive(self) -> None:
        while True:
            batch = await self._socket.receive_batch()
            now = trio.current_time()
            if now - self._heard > LINK_LOST_S:  # the link or this process stood still: what comes first is as old
                self.feed.lag = now - self._heard
            self._heard = now
            for frames in batch:
                if frames[0] == BEAT_TOPIC.encode():
                    try:
                        self._beat(decode_beat(frames), now)
                    except UnknownVersion as error:
                        self._link.mismatch.say(str(error))
                    except WireError as error:
                        self._rejects.count("what is no beat", error)
                else:
                    self.feed.put(frames)

    def _beat(self, beat: Beat, now: float) -> None:
        self.feed.lag = self._lag.beat(beat, now)
        if beat.epoch != self._epoch or self.feed.lost:
            # The first beat: our subscriptions are in force. A later one: we may have missed what will not come again.
            self._epoch = beat.epoch
            self._ask(now)
        self._link_is(lost=False)

    def _ask(self, now: float) -> None:
        self._link.forget(self._request)
        self._asked_at = now
        self._request = self._link.ask(self._prefixes, self._answered)

    def _answered(self, batches: list[list[bytes]], more: bool) -> None:
        for frames in batches:
            self.feed.put_remembered(frames)
        self._asked_at = trio.current_time() if more else None
        if not more:
            self.feed.joined()

    async def _watch(self) -> None:
        while True:
            await trio.sleep(LOOK_S)
            now = trio.current_time()
            if now - self._heard > LINK_LOST_S:
                self._link_is(lost=True)
            elif self._asked_at is not None and now - self._asked_at > ASK_AGAIN_S:
                self._ask(now)
            if now - self._began > JOIN_PATIENCE_S:
                self.feed.joined()

    def _link_is(self, *, lost: bool) -> None:
        if self.feed.lost != lost:
            self.feed.lost = lost
            _log.warning("%s: %s", self._label, "the telemetry plane is silent" if lost else "it speaks again")
