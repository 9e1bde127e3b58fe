"""What a role has to prove itself with, and by which it knows the others: its keys and the authority, kept up to date.

`load_security` gives None only where a fleet asks for it: then everybody on this machine may do everything.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

import trio

from interlock.broker import crypto, keys
from interlock.broker.config import PLACES, FleetConfig
from interlock.broker.errors import ConfigError
from interlock.broker.keys import PrivateKeys, Roll
from interlock.broker.tuning import Curve

INSECURE = "INTERLOCK_INSECURE"  # set to 1: as mode = "insecure" in the fleet file; --insecure sets it
OPERATOR = "INTERLOCK_OPERATOR"  # the operator's name, where a folder has keys of several
POLL_S = 0.2  # between looks at the authority's file: what a revocation takes at most, on local disks
_LOOPBACK = re.compile(r"ipc://.+|tcp://(127\.\d+\.\d+\.\d+|localhost|\[::1\]):.+")

_log = logging.getLogger(__name__)


class Security:
    """One role's own keys and the roll of all others. `watch` must run beside it."""

    def __init__(self, own: PrivateKeys, roll: Roll, folder: Path) -> None:
        self.own = own
        self.roll = roll
        self.folder = folder
        self._gone: list[Callable[[set[str]], None]] = []

    @property
    def identity(self) -> str:
        return self.own.identity

    def curve(self) -> Curve:
        secret = bytes.fromhex(self.own.curve)
        return Curve(crypto.curve_public(secret), secret, self.key_of("broker"))

    def key_of(self, identity: str) -> bytes:
        """The public CURVE key of a server. ConfigError if it has none (any more)."""
        grant = self.roll.by_identity(identity)
        if grant is None:
            raise ConfigError(f"{identity} has no keys", where=str(self.folder), hint="interlock keys list shows all")
        return bytes.fromhex(grant.curve)

    def on_gone(self, tell: Callable[[set[str]], None]) -> None:
        """Call `tell` with the public keys (hexadecimal) that are no longer valid, whenever some are not."""
        self._gone.append(tell)

    async def watch(self) -> None:
        """Follow the authority's file. One that is damaged or older than what is known changes nothing."""
        path = self.folder / keys.AUTHORITY
        seen = _stamp(path)
        trouble = ""
        while True:
            await trio.sleep(POLL_S)
            stamp = _stamp(path)
            if stamp == seen:
                continue
            try:
                authority = await trio.to_thread.run_sync(keys.read_authority, self.folder)
                if authority.serial < self.roll.authority.serial:
                    raise ConfigError(
                        f"serial {authority.serial} is older than {self.roll.authority.serial}", where=str(path)
                    )
            except ConfigError as error:
                if str(error) != trouble:
                    trouble = str(error)
                    _log.error("the authority stays as it was: %s", error)
                continue
            seen, trouble = stamp, ""
            self.take(authority)

    def take(self, authority: keys.Authority) -> None:
        """From now on this is who belongs."""
        before = self.roll.keys()
        self.roll.replace(authority)
        gone = before - self.roll.keys()
        for key in gone:
            _log.warning("the key of %s is no longer valid", self.roll.former(key) or "somebody")
        if gone:
            for tell in self._gone:
                tell(gone)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


def load_security(fleet: FleetConfig, identity: str) -> Security | None:
    """The keys of `identity`, or None for a fleet that asked for none. ConfigError if keys are missing or not private.

    Without keys every endpoint must be on this machine's loopback.
    """
    if is_insecure(fleet):
        _check_loopback(fleet)
        _log.warning("insecure: nothing is encrypted, and everybody on this machine may command this fleet")
        return None
    roll = Roll(keys.read_authority(fleet.keys_dir))
    own = keys.read_private(fleet.keys_dir, identity)
    grant = roll.by_identity(identity)
    if grant is None or grant.curve != crypto.curve_public(bytes.fromhex(own.curve)).hex():
        raise ConfigError(
            f"the keys of {identity} are not valid (any more)",
            where=str(fleet.keys_dir),
            hint="ask whoever keeps the authority for new ones",
        )
    return Security(own, roll, fleet.keys_dir)


def load_operator(fleet: FleetConfig) -> Security | None:
    """The operator at this machine: INTERLOCK_OPERATOR, or the only one whose keys are here."""
    if is_insecure(fleet):
        return load_security(fleet, "")
    name = os.environ.get(OPERATOR, "")
    found = [f"operator/{name}"] if name else keys.operators(fleet.keys_dir)
    if len(found) > 1:
        names = ", ".join(identity.split("/")[1] for identity in found)
        raise ConfigError(
            "there are keys of several operators", where=str(fleet.keys_dir), hint=f"set {OPERATOR}: {names}"
        )
    if not found:
        raise ConfigError(
            "there are no keys of an operator",
            where=str(fleet.keys_dir),
            hint="interlock up makes them on its machine; elsewhere: interlock keys install FILE",
        )
    return load_security(fleet, found[0])


def is_insecure(fleet: FleetConfig) -> bool:
    return fleet.security.mode == "insecure" or os.environ.get(INSECURE) == "1"


def _check_loopback(fleet: FleetConfig) -> None:
    endpoints = {f"broker.{name}": getattr(fleet.broker, name) for name in PLACES}
    endpoints |= {f"hosts.{name}.control": host.control for name, host in fleet.hosts.items()}
    endpoints |= {f"hosts.{name}.link": host.link for name, host in fleet.hosts.items() if host.link}
    endpoints |= {"rules.answers": fleet.rules.answers} if fleet.rules.answers else {}
    for key, endpoint in endpoints.items():
        if isinstance(endpoint, str) and not _LOOPBACK.fullmatch(endpoint):
            raise ConfigError(
                f"insecure, and {endpoint} is not on the loopback",
                where=f"{fleet.path or 'fleet'}: {key}",
                hint="use 127.0.0.1, or leave security on",
            )
