"""HTTP/1.1 over trio streams: the only module of the gateway that imports h11.

`ClientSide` is a connection that a client opened to us, `Backend` one that we opened to an instance. Message bodies are
framed anew on each side, from what the other side's framing said: two servers can't be made to disagree about where a
request ends.
"""

from __future__ import annotations

import select
from typing import Any

import h11
import msgspec
import trio

from interlock.broker.errors import InterlockError

MAX_HEAD = 1 << 16  # bytes of a request line and headers, or of a chunk's header; nginx takes 32 kB
MAX_WHY = 200  # characters of what is wrong with a message: h11 quotes it, up to `MAX_HEAD`
READ = 1 << 16  # bytes per read
INVITE_S = 5.0  # for "100 Continue" to be taken; it is 25 bytes
LINGER_S = 1.0  # a client that still sends while we close gets so long to read our answer
LINGER_BYTES = 1 << 20  # and so much of what it sends is thrown away

Headers = list[tuple[bytes, bytes]]

HOP_BY_HOP = frozenset(  # RFC 9110, 7.6.1: meant for the next hop only
    b"connection keep-alive proxy-connection proxy-authenticate proxy-authorization te trailer transfer-encoding "
    b"upgrade".split()
)


class HttpError(InterlockError):
    """The other side does not speak HTTP as it should, or went away in the middle. `status` is for a client."""

    def __init__(self, what: str, status: int = 400) -> None:
        super().__init__(what)
        self.status = status


class RequestHead(msgspec.Struct, frozen=True):
    """`headers` without those of the connection and the framing.

    chunked, or `length` in bytes: how the body came; neither: there is none. upgrade: to which protocols, if it can be.
    """

    method: bytes
    target: bytes
    headers: Headers
    length: int | None
    chunked: bool
    upgrade: bytes

    @property
    def line(self) -> bytes:
        return b"%s %s" % (self.method, self.target)


class ResponseHead(msgspec.Struct, frozen=True):
    """`length` of the body in bytes, as announced; -1: it was not."""

    status: int
    reason: bytes
    headers: Headers
    length: int = -1


def end_to_end(headers: Any, *drop: bytes) -> Headers:
    """The headers that go on to the next hop, in their order and spelling."""
    unwanted = HOP_BY_HOP.union(drop)
    for name, value in headers:
        if name == b"connection":
            unwanted |= {token.strip().lower() for token in value.split(b",")}
    if any(name == b"transfer-encoding" for name, _ in headers):
        unwanted |= {b"content-length"}  # RFC 9112, 6.3: it does not count beside a transfer encoding
    return [(raw, value) for raw, value in headers.raw_items() if raw.lower() not in unwanted]


def wanted_upgrade(request: h11.Request) -> bytes:
    """The protocols that may be changed to. HTTP/2 is not among them: whoever asks for it is answered in HTTP/1.1."""
    asked = any(token.strip().lower() == b"upgrade" for token in value_of(request.headers, b"connection").split(b","))
    if not asked or request.http_version < b"1.1":
        return b""
    tokens = [token.strip() for token in value_of(request.headers, b"upgrade").split(b",")]
    return b", ".join(token for token in tokens if token and token.lower() not in (b"h2c", b"h2"))


def value_of(headers: Any, wanted: bytes) -> bytes:
    return b", ".join(value for name, value in headers if name.lower() == wanted)


def _rest(body: bytes, *, complete: bool) -> list[Any]:
    """What follows a head: a part of the body, or all of it."""
    return [*([h11.Data(data=body)] if body else []), *([h11.EndOfMessage()] if complete else [])]


class _Side:
    """One connection. Reading and writing may be two tasks."""

    def __init__(self, stream: trio.SocketStream, role: type[h11.CLIENT] | type[h11.SERVER]) -> None:
        self.stream = stream
        self._http = h11.Connection(role, max_incomplete_event_size=MAX_HEAD)

    async def _next(self) -> Any:
        """The next event. HttpError for what is no HTTP; trio.BrokenResourceError if the connection breaks."""
        while True:
            try:
                event = self._http.next_event()
            except h11.RemoteProtocolError as error:
                raise HttpError(str(error)[:MAX_WHY], error.error_status_hint) from None
            if event is not h11.NEED_DATA:
                return event
            await self._before_reading()
            received = await self.stream.receive_some(READ)
            try:
                self._http.receive_data(received)
            except RuntimeError:  # more after the end of what it could say
                raise HttpError("bytes after the end") from None

    async def _before_reading(self) -> None:
        pass

    async def _write(self, *events: Any) -> None:
        try:
            # an event without bytes (the end of a message) is sent as nothing
            bytes_to_send = b"".join(self._http.send(event) or b"" for event in events)
        except h11.LocalProtocolError as error:
            raise HttpError(str(error), 502) from None
        if bytes_to_send:
            await self.stream.send_all(bytes_to_send)

    async def chunk(self) -> bytes | None:
        """The next piece of the body; None at its end."""
        event = await self._next()
        if isinstance(event, h11.Data):
            return bytes(event.data)
        if isinstance(event, h11.EndOfMessage):
            return None
        raise HttpError("the connection ended in the middle of a body")

    async def send(self, data: bytes) -> None:
        if data:
            await self._write(h11.Data(data=data))

    async def end(self) -> None:
        await self._write(h11.EndOfMessage())

    def again(self) -> bool:
        """Whether the connection can carry another exchange; if so it is ready for it."""
        if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            return False
        self._http.start_next_cycle()
        return True

    async def close(self) -> None:
        await trio.aclose_forcefully(self.stream)


class ClientSide(_Side):
    def __init__(self, stream: trio.SocketStream) -> None:
        super().__init__(stream, h11.SERVER)
        self._bodiless = False

    async def request(self) -> RequestHead | None:
        """The next request's head; None if the client has closed."""
        event = await self._next()
        if not isinstance(event, h11.Request):
            return None
        self._bodiless = event.method == b"HEAD"
        chunked = bool(value_of(event.headers, b"transfer-encoding"))
        length = value_of(event.headers, b"content-length")
        if chunked and (length or event.http_version < b"1.1"):
            # RFC 9112, 6.1 and 6.3: somebody on the way may have read another length, and hidden a request in it
            raise HttpError("a transfer encoding beside a content length, or in HTTP/1.0: where it ends is not clear")
        headers = end_to_end(event.headers, b"expect", b"content-length")  # Expect is answered here
        if not any(name.lower() == b"host" for name, _ in headers):
            headers.append((b"Host", b""))  # HTTP/1.0 may leave it out, we go on in 1.1
        return RequestHead(
            event.method,
            event.target,
            headers,
            int(length) if length else None,
            chunked,
            b"" if chunked or length not in (b"", b"0") else wanted_upgrade(event),
        )

    async def _before_reading(self) -> None:
        if self._http.they_are_waiting_for_100_continue:
            with trio.move_on_after(INVITE_S) as scope:  # whole or not at all, whoever is cancelled
                scope.shield = True
                await self._write(h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue"))

    async def respond(self, head: ResponseHead, body: bytes = b"", *, complete: bool = False) -> None:
        """Send an answer with the first part of its body; `complete`: all of it. One packet, if it is short."""
        headers = head.headers
        if head.status == 204:  # RFC 9110, 8.6: has no length, not even 0
            headers = [(name, value) for name, value in headers if name.lower() != b"content-length"]
        response = h11.Response(status_code=head.status, headers=headers, reason=head.reason)
        await self._write(response, *_rest(body, complete=complete))

    async def switch(self, head: ResponseHead) -> bytes:
        """Tell the client that the protocol changes; returns what it has said in the new one already."""
        headers = [*head.headers, (b"Connection", b"Upgrade")]
        await self._write(h11.InformationalResponse(status_code=101, headers=headers, reason=head.reason))
        return bytes(self._http.trailing_data[0])

    @property
    def left(self) -> bool:
        """Whether the client has closed, at least its sending side: what comes before that is not read."""
        poll = select.poll()
        poll.register(self.stream.socket.fileno(), select.POLLRDHUP)
        return bool(poll.poll(0))

    async def respond_whole(self, status: int, body: bytes, headers: Headers) -> None:
        """A short answer of our own; a body still on its way in ends the connection afterwards."""
        head = h11.Response(
            status_code=status, headers=[*headers, (b"Content-Length", str(len(body)).encode())], reason=b""
        )
        await self._write(head, *([] if self._bodiless else [h11.Data(data=body)]), h11.EndOfMessage())

    @property
    def can_respond(self) -> bool:
        return self._http.our_state in (h11.IDLE, h11.SEND_RESPONSE)

    async def close_gently(self) -> None:
        """Let the client read our answer although it is still sending: a reset would take it away."""
        thrown_away = 0
        with trio.move_on_after(LINGER_S):
            try:
                await self.stream.send_eof()
                while thrown_away < LINGER_BYTES and (received := await self.stream.receive_some(READ)):
                    thrown_away += len(received)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return


class Backend(_Side):
    def __init__(self, stream: trio.SocketStream) -> None:
        super().__init__(stream, h11.CLIENT)
        self.used = False  # carried an exchange before

    async def start(self, head: RequestHead, body: bytes, *, complete: bool) -> None:
        """Send a request with the first part of its body; `complete`: all of it."""
        headers = list(head.headers)
        if head.upgrade:
            headers += [(b"Connection", b"Upgrade"), (b"Upgrade", head.upgrade)]
        if not complete and head.chunked:
            headers.append((b"Transfer-Encoding", b"chunked"))
        elif head.chunked or head.length is not None:
            headers.append((b"Content-Length", str(len(body) if complete else head.length).encode()))
        request = h11.Request(method=head.method, target=head.target, headers=headers)
        await self._write(request, *_rest(body, complete=complete))

    async def response(self) -> ResponseHead:
        """The answer's head; interim answers (1xx) are passed over, except the one that changes the protocol (101)."""
        while True:
            event = await self._next()
            if isinstance(event, h11.Response):
                chunked = bool(value_of(event.headers, b"transfer-encoding"))
                length = b"" if chunked else value_of(event.headers, b"content-length")
                return ResponseHead(
                    event.status_code, bytes(event.reason), end_to_end(event.headers), int(length) if length else -1
                )
            if isinstance(event, h11.InformationalResponse) and event.status_code == 101:
                protocol = (b"Upgrade", value_of(event.headers, b"upgrade"))
                return ResponseHead(101, bytes(event.reason), [*end_to_end(event.headers), protocol], 0)
            if not isinstance(event, h11.InformationalResponse):
                raise HttpError("the instance closed the connection without an answer", 502)

    @property
    def early(self) -> bytes:
        """What the instance has said already in the protocol that it changed to."""
        return bytes(self._http.trailing_data[0])

    @property
    def quiet(self) -> bool:
        """Nothing has come since the last answer: an idle connection that can be read from has been closed."""
        poll = select.poll()
        poll.register(self.stream.socket.fileno(), select.POLLIN)
        return not poll.poll(0)
