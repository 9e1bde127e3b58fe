"""The coordinator acts on what an operator signed, whatever the broker passes on."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import msgspec
import pytest

from interlock.broker import keys, signing, topics
from interlock.broker.bus import new_event
from interlock.broker.commands import Migrate, Steer
from interlock.broker.facts import HostDown
from interlock.broker.keyring import LOCAL_OPERATOR, Keyring
from interlock.broker.security import Security
from interlock.coordinator.service import is_genuine


def test_a_forged_altered_or_revoked_request_is_not_acted_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    ring = Keyring(tmp_path, "f")
    ring.ensure(["coordinator", "rules", LOCAL_OPERATOR], now=1.0)
    security = Security(keys.read_private(tmp_path, "coordinator"), keys.Roll(keys.read_authority(tmp_path)), tmp_path)
    now = time.time()
    plain = new_event(
        topics.COORDINATOR, Migrate(agent="chat", to="v2", deadline=now + 60), source=LOCAL_OPERATOR, time=now
    )
    asked = signing.sign(plain, keys.read_private(tmp_path, LOCAL_OPERATOR))
    other = new_event(topics.COORDINATOR, Migrate(agent="chat", to="v3", deadline=now + 60), source="", time=now)
    rules = msgspec.structs.replace(plain, header=msgspec.structs.replace(plain.header, source="rules"))
    assert is_genuine(asked, security)
    assert is_genuine(plain, None)
    steer = new_event(
        topics.COORDINATOR, Steer(agent="chat", action="approve", deadline=now + 60), source=LOCAL_OPERATOR, time=now
    )
    assert is_genuine(signing.sign(steer, keys.read_private(tmp_path, LOCAL_OPERATOR)), security)
    assert not is_genuine(steer, security)
    assert is_genuine(new_event("fact/host/a/", HostDown(host="a"), source="host/a", time=now), security)
    assert not is_genuine(plain, security)
    assert not is_genuine(msgspec.structs.replace(asked, body=other.body, raw=other.raw), security)
    assert not is_genuine(signing.sign(rules, keys.read_private(tmp_path, "rules")), security)
    security.take(ring.revoke(LOCAL_OPERATOR))
    assert not is_genuine(asked, security)
    assert caplog.text.count("refused event") == 5
