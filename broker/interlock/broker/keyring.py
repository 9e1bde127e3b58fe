"""The folder of a fleet's keys, changed by one at a time: what `interlock keys` does, and `interlock up` at first."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from interlock.broker import keys
from interlock.broker.config import FleetConfig
from interlock.broker.errors import ConfigError
from interlock.broker.keys import Authority, Enrolment

LOCAL_OPERATOR = "operator/local"  # who works at the machine that has the authority


class Keyring:
    """Each method reads, changes and writes the files under a lock. Blocks."""

    def __init__(self, folder: Path, fleet: str) -> None:
        self.folder = folder
        self.fleet = fleet

    def ensure(self, identities: Iterable[str], *, now: float) -> list[str]:
        """Make the authority if there is none, and keys for whoever never had any; returns whom it made keys for."""
        with self._locked():
            made = (self.folder / keys.AUTHORITY).exists()
            if not made and (left := sorted(self.folder.glob("*.key"))):
                raise ConfigError(
                    f"{keys.AUTHORITY} is missing, but there are keys ({left[0].name})",
                    where=str(self.folder),
                    hint="restore it from a copy, or remove the folder and enrol everybody anew",
                )
            authority = keys.read_authority(self.folder) if made else Authority(fleet=self.fleet)
            known = {grant.identity for grant in authority.grants}
            fresh = [identity for identity in identities if identity not in known]
            for identity in fresh:
                authority, private = keys.issue(authority, identity, now=now)
                keys.write_private(self.folder, private)
            if fresh or not made:
                keys.write_authority(self.folder, authority)
            return fresh

    def issue(self, identity: str, *, now: float, topics: Iterable[str] = (), out: Path | None = None) -> Authority:
        """Keys for one more, kept here, or only in the enrolment file `out` to be carried to where it runs."""
        with self._locked():
            authority, private = keys.issue(keys.read_authority(self.folder), identity, now=now, topics=topics)
            self._deliver(authority, private, out)
            return authority

    def rotate(self, identity: str, *, now: float, out: Path | None = None) -> Authority:
        with self._locked():
            authority, private = keys.rotate(keys.read_authority(self.folder), identity, now=now)
            self._deliver(authority, private, out)
            return authority

    def revoke(self, identity: str) -> Authority:
        with self._locked():
            authority = keys.revoke(keys.read_authority(self.folder), identity)
            keys.write_authority(self.folder, authority)
            keys.remove_private(self.folder, identity)
            return authority

    def install(self, path: Path) -> Enrolment:
        """Take over an enrolment file made elsewhere. ConfigError if what is here is newer, or of another fleet."""
        enrolment = keys.read_enrolment(path)
        with self._locked():
            if (self.folder / keys.AUTHORITY).exists():
                here = keys.read_authority(self.folder)
                if here.fleet != enrolment.authority.fleet:
                    raise ConfigError(f"is of fleet {enrolment.authority.fleet}, not {here.fleet}", where=str(path))
                if here.serial > enrolment.authority.serial:
                    raise ConfigError(
                        f"is older ({enrolment.authority.serial}) than what is here ({here.serial})",
                        where=str(path),
                        hint="make a new one",
                    )
            keys.write_private(self.folder, enrolment.own)
            keys.write_authority(self.folder, enrolment.authority)
        return enrolment

    def _deliver(self, authority: Authority, private: keys.PrivateKeys, out: Path | None) -> None:
        if out is None:
            keys.write_private(self.folder, private)
        else:  # first the file: a key that could not be delivered is not in the authority
            keys.write_enrolment(out, Enrolment(own=private, authority=authority))
            keys.remove_private(self.folder, private.identity)
        keys.write_authority(self.folder, authority)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"can't be written: {error.strerror}", where=str(self.folder)) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def identities_of(fleet: FleetConfig) -> list[str]:
    """Everybody whom a fleet file names, and the operator of this machine."""
    hosts = [f"host/{name}" for name in fleet.hosts]
    monitors = [f"monitor/{name}" for name, host in fleet.hosts.items() if host.monitor]
    return ["broker", "coordinator", "rules", *hosts, *monitors, LOCAL_OPERATOR]
