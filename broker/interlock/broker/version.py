"""Which versions of the wire format are spoken here. Pure.

`v` is a number in whatever is sent unasked: an event's header, a request, a batch. It says in which version the rest of
it is written, and one without it is of version 1. Answers are written in the version of what was asked. New keys that
old readers may ignore need no new version.

`speaks` is the pair (oldest, newest) of all that a broker understands. It stands in its pongs and beats, which every
version can read: so does a later program find a version that both know, and one that finds none says so.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from interlock.broker.errors import UnknownVersion

WIRE_VERSION = 1  # the newest, and what is sent
OLDEST_WIRE = 1  # the oldest that is still understood

Range = tuple[int, int]
SPEAKS: Range = (OLDEST_WIRE, WIRE_VERSION)

V = Annotated[int, msgspec.Meta(description="the version of the wire format that this is written in")]
Speaks = Annotated[
    Range, msgspec.Meta(description="the oldest and the newest version of the wire format that the sender understands")
]


class _Peek(msgspec.Struct, frozen=True):
    v: int = 1


_peeks = msgspec.msgpack.Decoder(_Peek)


def check(v: int, what: str) -> None:
    """UnknownVersion if what came is written in a version that is not understood here."""
    if OLDEST_WIRE <= v <= WIRE_VERSION:
        return
    raise UnknownVersion(
        f"{what} of version {v} of the wire format; known here: {_named(SPEAKS)}",
        hint="update who sends it" if v < OLDEST_WIRE else f"send version {WIRE_VERSION}, or update who receives it",
    )


def check_frame(frame: bytes, what: str) -> None:
    """The same for a frame that could not be read otherwise: a later version may look different."""
    try:
        v = _peeks.decode(frame).v
    except (msgspec.DecodeError, RecursionError, ValueError):
        return
    check(v, what)


def check_meets(speaks: Range, who: str) -> None:
    """UnknownVersion if whoever understands these versions understands none of ours."""
    if speaks[0] <= WIRE_VERSION and speaks[1] >= OLDEST_WIRE:
        return
    raise UnknownVersion(
        f"{who} understands {_named(speaks)} of the wire format, this program {_named(SPEAKS)}",
        hint=f"update {'this program' if speaks[0] > WIRE_VERSION else who}",
    )


def _named(speaks: Range) -> str:
    oldest, newest = speaks
    return f"version {newest}" if oldest == newest else f"versions {oldest} to {newest}"
