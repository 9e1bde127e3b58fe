"""Signatures of commands and rollbacks: what they bind, and the vectors of docs/security.md."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from interlock.broker import crypto, keys, signing, topics, wire
from interlock.broker.bus import new_event
from interlock.broker.commands import (
    Breach,
    Commit,
    Migrate,
    RenewLease,
    RollBack,
    RollCall,
    Steer,
)
from interlock.broker.errors import Refused
from interlock.broker.keys import Authority, PrivateKeys, Roll
from interlock.broker.wire import Body, Event

NOW = 1000.0
ROLL_BACK = RollBack(migration="m", agent="chat", epoch=7, breach=Breach(by="operator", reason="r"), issued=NOW)
COMMIT = Commit(migration="m", agent="chat", epoch=7, deadline=NOW + 10)
MIGRATE = Migrate(agent="chat", to="v2", deadline=NOW + 10)
STEER = Steer(agent="chat", action="abort", deadline=NOW + 10)
LEASE = RenewLease(migration="m", agent="chat", epoch=7, lease_s=6.0)

AUTHORITY = Authority(fleet="f")
PRIVATE: dict[str, PrivateKeys] = {}
for who in ("coordinator", "rules", "operator/ann", "host/alpha"):
    AUTHORITY, PRIVATE[who] = keys.issue(AUTHORITY, who, now=1.0)
ROLL = Roll(AUTHORITY)


def signed(who: str, topic: str, body: Body) -> Event:
    return signing.sign(new_event(topic, body, source=who, time=NOW, id="id"), PRIVATE[who])


@pytest.mark.parametrize(
    ("who", "topic", "body"),
    [
        ("coordinator", topics.command("alpha"), COMMIT),
        ("operator/ann", topics.COORDINATOR, STEER),
        ("coordinator", topics.command("alpha"), LEASE),
        ("operator/ann", topics.COORDINATOR, MIGRATE),
        *((who, topics.rollback("alpha"), ROLL_BACK) for who in ("rules", "coordinator", "operator/ann")),
    ],
)
def test_what_is_signed_by_whom_it_names_passes_also_over_the_wire(who: str, topic: str, body: Body) -> None:
    event = wire.decode_event(wire.encode_event(signed(who, topic, body)))
    assert signing.check(event, ROLL, now=NOW + 1).identity == who


@pytest.mark.parametrize(
    ("who", "topic", "body"),
    [
        ("rules", topics.command("alpha"), COMMIT),
        ("operator/ann", topics.command("alpha"), COMMIT),
        ("rules", topics.COORDINATOR, MIGRATE),
        ("rules", topics.rollback("alpha"), LEASE),
        ("coordinator", topics.rollback("alpha"), COMMIT),
        ("coordinator", topics.command("alpha"), ROLL_BACK),
    ],
)
def test_the_right_signature_of_the_wrong_role_is_refused(who: str, topic: str, body: Body) -> None:
    with pytest.raises(Refused, match="may not ask"):
        signing.check(signed(who, topic, body), ROLL, now=NOW)


def test_each_changed_field_breaks_it() -> None:
    event = signed("coordinator", topics.rollback("alpha"), ROLL_BACK)
    header = event.header
    for changed in (
        msgspec.structs.replace(event, topic=topics.rollback("beta")),
        msgspec.structs.replace(event, raw=event.raw[:-1] + bytes([event.raw[-1] ^ 1])),
        *(
            msgspec.structs.replace(event, header=msgspec.structs.replace(header, **{name: value}))
            for name, value in {
                "id": "other",
                "source": "rules",
                "time": NOW + 1,
                "expires": header.expires + 1,
                "sig": b"",
            }.items()
        ),
    ):
        with pytest.raises(Refused, match="signed"):
            signing.check(changed, ROLL, now=NOW)
    broker_s = msgspec.structs.replace(event, header=msgspec.structs.replace(header, seq=9, prev=3, logged=5.0))
    assert signing.check(broker_s, ROLL, now=NOW)  # the broker fills these in


@given(st.binary(max_size=80))
def test_no_other_bytes_pass_for_a_signature(sig: bytes) -> None:
    event = signed("rules", topics.rollback("alpha"), ROLL_BACK)
    with pytest.raises(Refused):
        signing.check(
            msgspec.structs.replace(event, header=msgspec.structs.replace(event.header, sig=sig)), ROLL, now=NOW
        )


def test_one_that_is_too_old_is_refused() -> None:
    lease = signed("coordinator", topics.command("alpha"), LEASE)
    rollback = signed("rules", topics.rollback("alpha"), ROLL_BACK)
    assert signing.check(lease, ROLL, now=NOW + 6)
    for event, late in ((lease, 12.0), (rollback, signing.ROLLBACK_VALID_S + 6), (rollback, float("nan"))):
        with pytest.raises(Refused, match="expired"):
            signing.check(event, ROLL, now=NOW + late)


def test_a_revoked_or_keyless_signer_is_refused() -> None:
    event = signed("rules", topics.rollback("alpha"), ROLL_BACK)
    with pytest.raises(Refused, match="unknown or revoked"):
        signing.check(event, Roll(keys.revoke(AUTHORITY, "rules")), now=NOW)
    forged = new_event(topics.rollback("alpha"), ROLL_BACK, source="host/alpha", time=NOW)
    with pytest.raises(Refused, match="unknown or revoked"):
        signing.check(forged, ROLL, now=NOW)


def test_the_vector_of_the_documentation() -> None:
    """A client in another language that gives these bytes signs as we do."""
    private = PrivateKeys(identity="operator/ann", curve="00" * 32, sign=bytes(range(32)).hex())
    body = RollCall(deadline=1700000010.0)
    event = signing.sign(
        new_event(topics.ALL_HOSTS, body, source="operator/ann", time=1700000000.0, id="0123"), private
    )
    message = signing.signed_bytes(event.topic, event.header, event.raw)
    text = (Path(__file__).parents[2] / "docs" / "security.md").read_text("utf-8")
    vector = text.replace("\n", "").replace(" ", "")
    for part in (event.raw, message, event.header.sig):
        assert part.hex() in vector
    public = bytes.fromhex("03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8")
    assert crypto.verified(public, message, event.header.sig)
