"""A subscription over ZeroMQ: the feed's frames and the answers of the log go through a `Follower` to the consumer."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import trio

from interlock.broker.bus import EventFeed
from interlock.broker.errors import UnknownVersion, WireError
from interlock.broker.link import Link, read_arrival
from interlock.broker.protocol import BEAT_TOPIC, decode_beat
from interlock.broker.rejects import Rejects
from interlock.broker.sequence import Ask, Follower, Page, Step
from interlock.broker.sockets import Sockets
from interlock.broker.wire import Event

_log = logging.getLogger(__name__)


class FeedReader:
    """Owns one SUB socket and its place in the log. `placed` is set once the place is known."""

    def __init__(
        self, sockets: Sockets, link: Link, endpoint: str, prefixes: Sequence[str], *, after: int | None
    ) -> None:
        now = trio.current_time()
        self.feed = EventFeed(position=after or 0)
        self.placed = trio.Event()
        self._link = link
        self._endpoint = endpoint
        self._follower: Follower[Event | None] = Follower(prefixes, after=after, now=now)
        self._rejects = Rejects(f"feed {endpoint}")
        self._resets = 0
        self._request = 0
        self._wanted: Ask | None = None
        self._changed = trio.Event()
        self._socket = sockets.open(
            "sub",
            connect=endpoint,
            subscribe=[*prefixes, BEAT_TOPIC],
            send_limit=0,  # subscriptions count against it, and would be lost silently
            label=f"feed {endpoint}",
        )
        self._do(self._follower.start(now))

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._receive)
            nursery.start_soon(self._keep_up)

    def close(self) -> None:
        self._link.forget(self._request)
        self._socket.close(linger_ms=0)

    async def _receive(self) -> None:
        while True:
            batch = await self._socket.receive_batch()
            now = trio.current_time()
            for frames in batch:
                try:
                    self._do(self._read(frames, now))
                except UnknownVersion as error:
                    self._link.mismatch.say(str(error))
                except WireError as error:
                    self._rejects.count("what is neither event nor beat", error)
            await self.feed.room()

    def _read(self, frames: list[bytes], now: float) -> list[Step[Event | None]]:
        if frames[0] != BEAT_TOPIC.encode():
            return self._follower.event(read_arrival(frames, self._rejects), now)
        if len(frames) != 2:
            raise WireError(f"a beat has 2 frames, this has {len(frames)}")
        return self._follower.beat(decode_beat(frames[1]), now)

    async def _keep_up(self) -> None:
        """Ask the log when the follower wants it and the consumer has room; tell the follower the time."""
        while True:
            self._changed = trio.Event()
            if self._wanted is not None:
                await self.feed.room()
                self._ask()
            with trio.move_on_at(self._follower.deadline()):
                await self._changed.wait()
                continue
            self._do(self._follower.tick(trio.current_time()))

    def _ask(self) -> None:
        wanted, self._wanted = self._wanted, None
        if wanted is not None:
            self._link.forget(self._request)
            self._request = self._link.ask(wanted.after, self._follower.prefixes, self._answered)

    def _answered(self, page: Page[Event | None] | None) -> None:
        now = trio.current_time()
        self._do(self._follower.failed(now) if page is None else self._follower.page(page, now))

    def _do(self, steps: list[Step[Event | None]]) -> None:
        for step in steps:
            if isinstance(step, Ask):
                self._wanted = step
        if self.feed.has_room:  # the broker reads the next page while this one is delivered
            self._ask()
        for step in steps:
            if not isinstance(step, Ask):
                self.feed.put(step)
        self._changed.set()
        follower = self._follower
        if follower.position is not None and not self.placed.is_set():
            self.feed.position = follower.position
            self.placed.set()
        if follower.lost != self.feed.lost:
            self.feed.lost = follower.lost
            _log.warning(
                "feed %s: %s", self._endpoint, "the broker is silent" if follower.lost else "the broker is back"
            )
        if follower.resets != self._resets:
            self._resets = follower.resets
            _log.error("feed %s: the broker has another log than before; reading it from its begin", self._endpoint)
