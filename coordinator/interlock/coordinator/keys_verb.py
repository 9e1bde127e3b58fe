"""`interlock keys`: who belongs to the fleet. Works on the authority's folder; no role needs to run or to be told."""

from __future__ import annotations

import argparse
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from interlock.broker import keys
from interlock.broker.config import FleetConfig
from interlock.broker.errors import ConfigError
from interlock.broker.keyring import Keyring, identities_of
from interlock.broker.keys import Grant


def run(fleet: FleetConfig, chosen: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """What was done, as a tree and as lines for people."""
    ring = Keyring(fleet.keys_dir, fleet.name)
    now = time.time()
    match chosen.action:
        case "init":
            made = ring.ensure(identities_of(fleet), now=now)
            said = f"keys for {', '.join(made)}" if made else "everybody has keys already"
            return {"folder": str(ring.folder), "issued": made}, [f"{ring.folder}: {said}"]
        case "issue":
            identity = keys.identity_of(chosen.role, chosen.name)
            if bool(chosen.topic) != (chosen.role == "subscriber"):
                raise ConfigError("a subscriber, and nobody else, needs --topic", where="keys issue")
            authority = ring.issue(identity, now=now, topics=chosen.topic, out=chosen.out)
            return _told("issued", identity, authority.serial, chosen.out)
        case "rotate":
            identity = _find(keys.read_authority(ring.folder).grants, chosen.identity)
            authority = ring.rotate(identity, now=now, out=chosen.out)
            return _told("rotated", identity, authority.serial, chosen.out)
        case "revoke":
            identity = _find(keys.read_authority(ring.folder).grants, chosen.identity)
            return _told("revoked", identity, ring.revoke(identity).serial, None)
        case "install":
            enrolment = ring.install(chosen.file)
            return _told("installed", enrolment.own.identity, enrolment.authority.serial, None)
    authority = keys.read_authority(ring.folder)
    rows = [_row(grant, keys.key_file(ring.folder, grant.identity).exists()) for grant in authority.grants]
    return {"fleet": authority.fleet, "serial": authority.serial, "keys": rows}, [_line(row) for row in rows]


def _told(what: str, identity: str, serial: int, out: Path | None) -> tuple[dict[str, Any], list[str]]:
    line = f"{what} {identity}" + (f"; carry {out} there, and: interlock keys install {out.name}" if out else "")
    return {"outcome": what, "identity": identity, "serial": serial, "file": str(out) if out else None}, [line]


def _find(grants: list[Grant], name: str) -> str:
    living = sorted(grant.identity for grant in grants if not grant.revoked)
    found = [identity for identity in living if name in (identity, identity.partition("/")[2])]
    if len(found) != 1:
        what = f"{name!r} is the name of several" if found else f"nobody called {name!r} has keys"
        raise ConfigError(what, where="keys", hint=f"there are: {', '.join(found or living)}")
    return found[0]


def _row(grant: Grant, here: bool) -> dict[str, Any]:
    return {
        "identity": grant.identity,
        "state": "revoked" if grant.revoked else "valid",
        "issued": grant.issued,
        "curve": grant.curve,
        "sign": grant.sign,
        "topics": grant.topics,
        "private_key_here": here and not grant.revoked,
    }


def _line(row: dict[str, Any]) -> str:
    when = datetime.fromtimestamp(row["issued"]).astimezone().strftime("%Y-%m-%d %H:%M")
    more = " ".join([*(["private key here"] if row["private_key_here"] else []), *row["topics"]])
    return f"{row['identity']:<24} {row['state']:<8} {when}  {row['curve'][:16]}  {more}".rstrip()
