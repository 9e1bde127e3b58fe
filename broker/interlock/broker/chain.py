"""The chain through the event log: each event's hash covers the one before it, so that none can be changed, taken out
or moved without a trace. Pure.

What it can't show by itself: a log whose whole end was made anew, hashes and all. For that, keep a head (number and
hash, as `interlock log verify` prints it) somewhere else, and compare.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Literal

import msgspec

from interlock.broker import wire
from interlock.broker.errors import WireError

GENESIS = bytes(32)  # what the first event follows
MAX_FINDINGS = 100  # told at most: a log with more is not to be trusted anyway

_encoder = msgspec.msgpack.Encoder()


class Head(msgspec.Struct, frozen=True):
    """The number of an event, and its hash."""

    seq: int = 0
    hash: bytes = GENESIS

    def __str__(self) -> str:
        return f"{self.seq}:{self.hash.hex()}"

    @staticmethod
    def parse(text: str) -> Head:
        """ValueError if it is none."""
        seq, _, digest = text.partition(":")
        hash = bytes.fromhex(digest)
        if len(hash) != len(GENESIS):
            raise ValueError(f"{text!r} is not NUMBER:HASH")
        return Head(int(seq), hash)


class Stored(msgspec.Struct, frozen=True):
    """A row of the log as it is on disk. `id` and `logged` repeat what the header says, for the file's indexes."""

    seq: int
    id: str
    topic: str
    logged: float
    header: bytes
    body: bytes
    hash: bytes


class Finding(msgspec.Struct, frozen=True):
    seq: int
    kind: Literal["changed", "missing", "reordered"]
    detail: str

    def __str__(self) -> str:
        return f"event {self.seq} {self.kind}: {self.detail}"


class Verdict(msgspec.Struct, frozen=True):
    """`anchor`: the last event that retention dropped; `head`: the newest one. No findings: all is as written."""

    events: int
    anchor: Head
    head: Head
    findings: list[Finding]


def link(previous: bytes, seq: int, topic: str, header: bytes, body: bytes) -> bytes:
    """SHA-256 of the previous hash and the MessagePack array [seq, topic, header, body]; header and body as bytes."""
    return hashlib.sha256(previous + _encoder.encode([seq, topic, header, body])).digest()


def verify(rows: Iterable[Stored], *, anchor: Head, head: Head, expect: Head | None = None) -> Verdict:
    """Walk the rows, in the order of their numbers, from `anchor` to `head`. `expect`: a head noted earlier."""
    findings: list[Finding] = []
    previous: bytes | None = anchor.hash
    last, hash, count = anchor.seq, anchor.hash, 0
    if expect is not None and expect.seq <= anchor.seq and expect != anchor:
        what = "is not the one noted" if expect.seq == anchor.seq else "was dropped by retention: can't be compared"
        findings.append(Finding(expect.seq, "changed" if expect.seq == anchor.seq else "missing", what))
    for row in rows:
        count += 1
        if row.seq != last + 1:
            gone = f"{last + 1} to {row.seq - 1}" if row.seq > last + 2 else f"{last + 1}"
            findings.append(Finding(last + 1, "missing", f"{gone} is not there"))
            previous = None
        findings += _check(row, previous)
        if expect is not None and expect.seq == row.seq and expect.hash != row.hash:
            findings.append(Finding(row.seq, "changed", "its hash is not the one noted"))
        previous = hash = row.hash
        last = row.seq
        if len(findings) >= MAX_FINDINGS:
            break
    else:
        if last < head.seq:
            findings.append(Finding(last + 1, "missing", f"the log ends here, and went on to {head.seq}"))
        elif (last, hash) != (head.seq, head.hash):
            findings.append(Finding(last, "changed", f"the log's own note of its end says {head.seq}"))
        if expect is not None and expect.seq > max(last, head.seq):
            findings.append(Finding(last + 1, "missing", f"the log ends here, and {expect.seq} was noted"))
    return Verdict(count, anchor, Head(last, hash), findings[:MAX_FINDINGS])


def _check(row: Stored, previous: bytes | None) -> list[Finding]:
    """`previous`: None where the event before is missing, and this one's hash can't be checked."""
    try:
        header = wire.decode_header(row.header)
    except WireError as error:
        return [Finding(row.seq, "changed", str(error))]
    if header.seq != row.seq:
        return [Finding(row.seq, "reordered", f"event {header.seq} stands in its place")]
    if (header.id, header.logged) != (row.id, row.logged):
        return [Finding(row.seq, "changed", "the index says another id or time than the header")]
    if previous is not None and link(previous, row.seq, row.topic, row.header, row.body) != row.hash:
        return [Finding(row.seq, "changed", "its hash does not fit what it says and what it follows")]
    return []
