"""Signatures of commands and rollbacks, from whoever asks to the host that acts: a broker in wrong hands can neither
forge nor change one, nor have it done again.

Signed is what the host acts on, byte for byte: the body as it was sent, and of the envelope the topic (so the target),
the id (done once), the source, the time and the expiry.
"""

from __future__ import annotations

import struct

import msgspec

from interlock.broker import commands, crypto, topics
from interlock.broker.errors import Refused
from interlock.broker.keys import Grant, PrivateKeys, Roll
from interlock.broker.wire import Body, Event, Header

DOMAIN = b"interlock/signed/1\0"  # these bytes are signed for nothing else
ROLLBACK_VALID_S = 86_400.0  # a host that was away for a day is no longer rolled back by what was decided then
CLOCKS_DIFFER_S = 5.0  # seconds that the clocks of two machines may be apart

_SIGNED = (topics.COMMANDS, topics.ROLLBACKS)


def is_signed(topic: str) -> bool:
    """Whether events of this topic carry a signature."""
    return topic.startswith(_SIGNED)


def signed_bytes(topic: str, header: Header, raw: bytes) -> bytes:
    """What is signed: the domain, then topic, id and source, each after its length in bytes (4, big-endian), time and
    expiry (IEEE 754 doubles, big-endian), and the body's bytes."""
    texts = b"".join(
        struct.pack(">I", len(text)) + text for text in (topic.encode(), header.id.encode(), header.source.encode())
    )
    return DOMAIN + texts + struct.pack(">dd", header.time, header.expires) + raw


def sign(event: Event, private: PrivateKeys) -> Event:
    """The event with its expiry and signature."""
    header = msgspec.structs.replace(event.header, expires=_expiry(event.body, event.header.time))
    signature = crypto.sign(bytes.fromhex(private.sign), signed_bytes(event.topic, header, event.raw))
    return msgspec.structs.replace(event, header=msgspec.structs.replace(header, sig=signature))


def check(event: Event, roll: Roll, *, now: float) -> Grant:
    """Who signed it. Refused if nobody did who may ask for it there, or it is past its time (seconds since 1970).

    A command's deadline is not judged here: whoever acts on it answers for that, and repeats the answer to a done one.
    """
    header = event.header
    grant = roll.by_identity(header.source)
    where = f"{header.source[:80]} on {event.topic}"
    if grant is None or not grant.sign:
        raise Refused("its signer is unknown or revoked", where=where)
    signed = signed_bytes(event.topic, header, event.raw)
    if not crypto.verified(bytes.fromhex(grant.sign), signed, header.sig):
        raise Refused("it is not signed by whom it names" if header.sig else "it is not signed", where=where)
    if not _may(grant.role, event):
        raise Refused(f"a {grant.role} may not ask for {type(event.body).__name__} there", where=where)
    if not hasattr(event.body, "deadline") and not now <= header.expires + CLOCKS_DIFFER_S:
        raise Refused(f"it expired {now - header.expires:.0f} s ago", where=where)
    return grant


def _may(role: str, event: Event) -> bool:
    match event.body:
        case commands.RollBack():
            return event.topic.startswith(topics.ROLLBACKS) and role in ("rules", "coordinator", "operator")
        case (
            commands.Migrate()
            | commands.RollBackAgent()
            | commands.Steer()
            | commands.StartWave()
            | commands.StopWave()
            | commands.RunDrill()
        ):
            return event.topic == topics.COORDINATOR and role in ("operator", "coordinator")
        case commands.RollCall():
            return event.topic.startswith(topics.COMMANDS) and role in ("operator", "coordinator")
        case commands.RenewLease():  # on whichever topic of the host the coordinator names it
            return role == "coordinator"
    return event.topic.startswith(topics.COMMANDS) and role == "coordinator"


def _expiry(body: Body, time: float) -> float:
    if isinstance(body, commands.RenewLease):
        return time + body.lease_s
    return float(getattr(body, "deadline", time + ROLLBACK_VALID_S))
