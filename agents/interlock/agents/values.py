"""What the bytes of a request or an answer mean: JSON or MessagePack. Pure, and part of an agent's own environment."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

_JSON_STARTS = b'{["-0123456789tfn \t\r\n'


def decode_answer(body: bytes) -> tuple[Literal["json", "MessagePack"], Any] | None:
    """The encoding and the value of an answer; None if it is neither JSON nor MessagePack."""
    if body[:1] and body[:1] in _JSON_STARTS:
        try:
            return "json", msgspec.json.decode(body)
        except (msgspec.DecodeError, RecursionError, ValueError):
            pass  # a MessagePack value may begin with the same byte
    try:
        return "MessagePack", msgspec.msgpack.decode(body)
    except (msgspec.DecodeError, RecursionError, ValueError, TypeError):
        return None


def value_in(frames: list[bytes]) -> Any:
    """The value of a message: of one frame the value, of several a list; bytes that are no value stay bytes."""
    values = []
    for frame in frames:
        decoded = decode_answer(frame)
        values.append(frame if decoded is None else decoded[1])
    return values[0] if len(values) == 1 else values
