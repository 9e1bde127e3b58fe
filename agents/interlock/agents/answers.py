"""What the gateway reads in, and writes as, an agent's answer: JSON or MessagePack, whichever the client speaks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

MAX_BODY = 64 << 20  # bytes of a request or an answer, all frames together: images and audio pass
MAX_ERROR_ANSWER = 1 << 20  # bytes: a larger answer is no error report, and is not decoded to find out

Encoding = Literal["json", "MessagePack"]


class _Status(msgspec.Struct):
    """The one key that tells an error; all others are skipped without being built."""

    status: Any = None


_json_status = msgspec.json.Decoder(_Status)
_msgpack_status = msgspec.msgpack.Decoder(_Status)


def encoding_of(body: bytes) -> Encoding:
    """By the first byte, as agents tell them apart: `{` begins a JSON object, and no MessagePack map."""
    return "json" if body[:1] == b"{" else "MessagePack"


def error_answer(request: Sequence[bytes], code: str, message: str) -> bytes:
    """An error in the encoding of the request, in the form that class agents use."""
    answer = {"status": "error", "error": {"code": code, "message": message}}
    if encoding_of(request[0] if request else b"") == "json":
        return msgspec.json.encode(answer)
    return msgspec.msgpack.encode(answer)


def is_error(answer: Sequence[bytes]) -> bool:
    """Whether an answer is a map with "status": "error"; False for bytes that are no map at all."""
    body = answer[0]
    if b"error" not in body or len(body) > MAX_ERROR_ANSWER:
        return False
    try:
        decoder = _json_status if encoding_of(body) == "json" else _msgpack_status
        return bool(decoder.decode(body).status == "error")
    except (msgspec.DecodeError, RecursionError, ValueError):
        return False
