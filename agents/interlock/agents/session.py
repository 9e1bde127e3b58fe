"""One session between two hosts, either side: questions with answers, and streams. Whoever owns it feeds it messages.

What decides about streams is `tunnel.py`. `broke` ends the session and everything in it; nothing here reconnects.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import trio

from interlock.agents import link_protocol
from interlock.agents.link_protocol import (
    CHUNK,
    MAX_ASKS,
    Answer,
    Bytes,
    Credit,
    Hello,
    Message,
    Numbered,
    Open,
    Ping,
    Question,
    Reset,
    Shut,
    StreamMessage,
)
from interlock.agents.tunnel import Tunnel, TunnelBroken
from interlock.broker.errors import InterlockError, Refused, Unreachable

log = logging.getLogger(__name__)

PING_S = 0.5  # between signs of life,
SILENT_S = 2.0  # and after so long without any the session is over: a candidate's lease is longer

Put = Callable[[bytes], bool]  # False: it can't be sent
AnswerTo = Callable[[str, dict[str, Any]], Awaitable[dict[str, Any]]]  # raises InterlockError: refused
Serve = Callable[["Stream", str, str], Awaitable[None]]  # a stream that was opened, to whom and which port


class Stream(trio.abc.HalfCloseableStream):
    """Bytes both ways, as trio's own streams have them. BrokenResourceError once it was reset, or the session broke."""

    def __init__(self, session: Session, number: int) -> None:
        self._session = session
        self.number = number
        self._came: deque[bytes] = deque()
        self._ended = False
        self.broken = False
        self.changed = trio.lowlevel.ParkingLot()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """What came, at most a chunk; b"" at the end."""
        await trio.lowlevel.checkpoint()
        while not self._came:
            if self.broken:
                raise trio.BrokenResourceError("the stream was reset")
            if self._ended:
                return b""
            await self.changed.park()
        data = self._came.popleft()
        self._session.took(self.number, len(data))
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        rest = memoryview(data)
        while rest:
            await self.wait_send_all_might_not_block()
            part = bytes(rest[: min(CHUNK, self._session.tunnel.room(self.number))])
            self._session.say(self._session.tunnel.send(self.number, part))
            rest = rest[len(part) :]

    async def wait_send_all_might_not_block(self) -> None:
        while not self.broken and not self._session.tunnel.room(self.number):
            await self.changed.park()
        if self.broken:
            raise trio.BrokenResourceError("the stream was reset")

    async def send_eof(self) -> None:
        self._session.shut(self.number)
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        """What is under way is lost: after an orderly end, both ways, nothing is."""
        self._session.reset(self.number)
        await trio.lowlevel.checkpoint()

    def take(self, message: StreamMessage) -> None:
        """Of the session."""
        if isinstance(message, Bytes):
            self._came.append(message.data)
        elif isinstance(message, Shut):
            self._ended = True
        elif isinstance(message, Reset):
            self.broken = True
        self.changed.unpark_all()


class Session:
    """`nursery` owns what is begun for the other side."""

    def __init__(
        self, name: str, there: str, put: Put, nursery: trio.Nursery, *, dials: bool, answer: AnswerTo, serve: Serve
    ) -> None:
        self.name = name
        self.there = there  # the other host's identity
        self.tunnel = Tunnel(dials=dials)
        self.broken = trio.Event()
        self.reason = ""
        self.met = False  # the other side has answered
        self.heard = trio.current_time()
        self._put = put
        self._nursery = nursery
        self._answer = answer
        self._serve = serve
        self._streams: dict[int, Stream] = {}
        self._said = 0
        self._taken = 0
        self._asked = 0
        self._waiting: dict[int, Callable[[Answer | None], None]] = {}
        self._answering = 0
        self._scopes: set[trio.CancelScope] = set()  # of what was begun for the other side

    # --- what we do

    async def ask(self, what: str, about: dict[str, Any], timeout: float) -> dict[str, Any]:
        """Refused with the other's reason; Unreachable after `timeout` seconds, or if the session breaks before."""
        self._asked += 1
        number, answers, done = self._asked, list[Answer](), trio.Event()

        def answered(answer: Answer | None) -> None:
            if answer is not None:
                answers.append(answer)
            done.set()

        self._waiting[number] = answered
        try:
            self.say(Question(number, what, about))
            with trio.move_on_after(timeout):
                await done.wait()
        finally:
            self._waiting.pop(number, None)
        if not answers:
            raise Unreachable(f"no answer to {what}: {self.reason or f'{timeout:g} s are over'}", where=self.there)
        if not answers[0].ok:
            raise Refused(answers[0].reason, where=self.there)
        return answers[0].about

    def open(self, whom: str, port: str) -> Stream:
        """A stream to a port over there. TunnelBroken if there are too many; broken if the session is over."""
        asked = self.tunnel.open(whom, port)
        stream = self._streams[asked.stream] = Stream(self, asked.stream)
        stream.broken = self.broken.is_set()
        self.say(asked)
        return stream

    def say(self, message: Message) -> None:
        if self.broken.is_set():
            return
        if self._put(link_protocol.encode(self.name, self._said, message)):
            self._said += 1
        else:
            self.broke("a message could not be sent")

    def took(self, number: int, count: int) -> None:
        for message in self.tunnel.took(number, count):
            self.say(message)

    def shut(self, number: int) -> None:
        for message in self.tunnel.shut(number):
            self.say(message)
        self._forget(number)

    def reset(self, number: int) -> None:
        for message in self.tunnel.reset(number):
            self.say(message)
        if (stream := self._streams.get(number)) is not None:
            stream.take(Reset(number))
        self._forget(number)

    def broke(self, reason: str) -> None:
        """The session is over: streams break, questions get no answer, what was begun for the other side ends."""
        if self.broken.is_set():
            return
        self.reason = reason
        self.broken.set()
        for number, stream in list(self._streams.items()):
            stream.take(Reset(number))
        self._streams.clear()
        for answered in list(self._waiting.values()):
            answered(None)
        for scope in self._scopes:
            scope.cancel()

    # --- what comes

    def take(self, came: Numbered) -> None:
        """One message of the other side."""
        self.heard = trio.current_time()
        if came.session != self.name or self.broken.is_set():
            return
        if came.number != self._taken:
            self.broke(f"message {self._taken} is missing: {came.number} came")
            return
        self._taken += 1
        try:
            self._take(came.message)
        except TunnelBroken as error:
            log.warning("%s: %s", self.there, error)
            self.broke(str(error))

    def _take(self, message: Message) -> None:
        match message:
            case Hello() | Ping():
                self.met = True
            case Question():
                self._nursery.start_soon(self._reply, message)
            case Answer():
                answered = self._waiting.get(message.number)
                if answered is not None:
                    answered(message)
            case Open() | Bytes() | Credit() | Shut() | Reset():
                self._take_stream(message)

    def _take_stream(self, message: StreamMessage) -> None:
        if not self.tunnel.take(message):
            return
        if isinstance(message, Open):
            self._streams[message.stream] = stream = Stream(self, message.stream)
            self._nursery.start_soon(self._serve_stream, stream, message)
        elif (stream_ := self._streams.get(message.stream)) is not None:
            stream_.take(message)
            self._forget(message.stream)

    async def _reply(self, question: Question) -> None:
        self._answering += 1
        answer = Answer(question.number, False, f"{MAX_ASKS} questions are open already", {})
        try:
            if self._answering <= MAX_ASKS:
                with self._while_it_lasts():
                    about = await self._answer(question.what, question.about)
                    answer = Answer(question.number, True, "", about)
        except InterlockError as error:
            answer = Answer(question.number, False, str(error), {})
        except Exception as error:
            log.exception("%s asked for %s, and that failed", self.there, question.what)
            answer = Answer(question.number, False, f"{type(error).__name__} there", {})
        finally:
            self._answering -= 1
        self.say(answer)

    async def _serve_stream(self, stream: Stream, asked: Open) -> None:
        try:
            with self._while_it_lasts():
                await self._serve(stream, asked.whom, asked.port)
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError, InterlockError) as error:
            log.info("%s: stream to %s of %s: %s", self.there, asked.port, asked.whom, error)
        except Exception:
            log.exception("%s: stream to %s of %s failed", self.there, asked.port, asked.whom)
        finally:
            self.reset(stream.number)

    @contextmanager
    def _while_it_lasts(self) -> Iterator[None]:
        """What is done for the other side ends with the session."""
        with trio.CancelScope() as scope:
            if self.broken.is_set():
                scope.cancel()
            self._scopes.add(scope)
            try:
                yield
            finally:
                self._scopes.discard(scope)

    def _forget(self, number: int) -> None:
        """A stream that is over both ways needs no more credit; what it has in hand can still be read."""
        if not self.tunnel.has(number):
            self._streams.pop(number, None)
