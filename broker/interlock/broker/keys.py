"""The keys of a fleet: who belongs to it, and the files that say so.

A folder holds one private file per identity ("broker", "host/alpha", "operator/local"), mode 0600, and the public
`authority.json`: every identity with its public keys, what a subscriber may hear, and whether it was revoked. The
broker and the hosts read it again whenever it changes. Its serial only grows: an older file is not believed.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from interlock.broker import crypto
from interlock.broker.errors import ConfigError
from interlock.broker.topics import RESERVED, check_name

FORMAT = 1  # of the files
AUTHORITY = "authority.json"
MAX_FILE = 16 << 20  # bytes of a file that are read: 10,000 identities take 3 MB
ALONE = ("broker", "coordinator", "rules")  # roles that a fleet has once
NAMED = ("host", "monitor", "operator", "subscriber")
SIGNERS = ("coordinator", "rules", "operator")  # those who may command a host


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Grant(_File, frozen=True, kw_only=True):
    """One identity's public half. Keys in hexadecimal; `topics`: prefixes that a subscriber may hear."""

    identity: str
    curve: str
    sign: str = ""
    topics: list[str] = []
    issued: float = 0.0  # seconds since 1970
    revoked: bool = False

    @property
    def role(self) -> str:
        return self.identity.split("/", 1)[0]

    @property
    def name(self) -> str:
        return self.identity.partition("/")[2]


class Authority(_File, frozen=True, kw_only=True):
    """Everybody who belongs, or did. `serial` grows by one with each change."""

    format: int = FORMAT
    fleet: str
    serial: int = 0
    grants: list[Grant] = []


class PrivateKeys(_File, frozen=True, kw_only=True):
    """One identity's secret half."""

    format: int = FORMAT
    identity: str
    curve: str
    sign: str = ""

    def __repr__(self) -> str:  # never in a log
        return f"PrivateKeys({self.identity})"


class Enrolment(_File, frozen=True, kw_only=True):
    """What another machine needs to take part as one identity: its own keys, and the public half of all others."""

    format: int = FORMAT
    own: PrivateKeys
    authority: Authority


class Roll:
    """The authority, looked up by key and by identity. `replace` takes a newer one."""

    def __init__(self, authority: Authority) -> None:
        self.replace(authority)

    def replace(self, authority: Authority) -> None:
        self.authority = authority
        living = [grant for grant in authority.grants if not grant.revoked]
        self._by_key = {grant.curve: grant for grant in living}
        self._by_identity = {grant.identity: grant for grant in living}
        self._former = {grant.curve: grant.identity for grant in authority.grants if grant.revoked}

    def by_key(self, key: str) -> Grant | None:
        """Who holds this public CURVE key (hexadecimal); None for a stranger's and for a revoked one."""
        return self._by_key.get(key)

    def by_identity(self, identity: str) -> Grant | None:
        return self._by_identity.get(identity)

    def former(self, key: str) -> str:
        """Whose key it was before it was revoked; empty for a stranger's."""
        return self._former.get(key, "")

    def keys(self) -> set[str]:
        return set(self._by_key)


# --- changes (pure but for the keys' randomness)


def identity_of(role: str, name: str = "") -> str:
    """ "host/alpha". ConfigError for a role nobody knows, or a name where none belongs."""
    if role in ALONE:
        if name and name != role:
            raise ConfigError(f"a fleet has one {role}, without a name", where="keys", hint=f"leave {name!r} out")
        return role
    if role == "host" and name in RESERVED:
        raise ConfigError(f"no host may be called {name!r}", where="keys", hint="choose another name")
    if role not in NAMED:
        raise ConfigError(f"unknown role {role!r}", where="keys", hint=f"one of {', '.join((*ALONE, *NAMED))}")
    return f"{role}/{check_name(name, where=f'keys of a {role}')}"


def issue(
    authority: Authority, identity: str, *, now: float, topics: Iterable[str] = ()
) -> tuple[Authority, PrivateKeys]:
    """Keys for an identity that has none. ConfigError if it has."""
    if any(grant.identity == identity and not grant.revoked for grant in authority.grants):
        raise ConfigError(f"{identity} has keys already", where="keys", hint="rotate replaces them, revoke ends them")
    role = identity.split("/", 1)[0]
    public, secret = crypto.new_curve_pair()
    sign_public, sign_secret = crypto.new_signing_pair() if role in SIGNERS else (b"", b"")
    grant = Grant(identity=identity, curve=public.hex(), sign=sign_public.hex(), topics=list(topics), issued=now)
    changed = msgspec.structs.replace(authority, serial=authority.serial + 1, grants=[*authority.grants, grant])
    return changed, PrivateKeys(identity=identity, curve=secret.hex(), sign=sign_secret.hex())


def revoke(authority: Authority, identity: str) -> Authority:
    """Without this identity's keys. ConfigError if it has none."""
    if not any(grant.identity == identity and not grant.revoked for grant in authority.grants):
        known = ", ".join(sorted(grant.identity for grant in authority.grants if not grant.revoked))
        raise ConfigError(f"{identity} has no keys", where="keys", hint=f"there are: {known or 'none'}")
    grants = [
        msgspec.structs.replace(grant, revoked=True) if grant.identity == identity else grant
        for grant in authority.grants
    ]
    return msgspec.structs.replace(authority, serial=authority.serial + 1, grants=grants)


def rotate(authority: Authority, identity: str, *, now: float) -> tuple[Authority, PrivateKeys]:
    """New keys instead of those it has, which are revoked by it."""
    topics = next((grant.topics for grant in authority.grants if grant.identity == identity and not grant.revoked), [])
    return issue(revoke(authority, identity), identity, now=now, topics=topics)


# --- files

_T = TypeVar("_T", Authority, PrivateKeys, Enrolment)


def key_file(folder: Path, identity: str) -> Path:
    return folder / f"{identity.replace('/', '-', 1)}.key"  # no role has a dash in its name


def read_authority(folder: Path) -> Authority:
    """The fleet's authority. ConfigError if it is missing or damaged."""
    return _read(folder / AUTHORITY, Authority, "interlock keys init makes one, and so does interlock up")


def read_private(folder: Path, identity: str) -> PrivateKeys:
    """An identity's private keys. ConfigError if they are missing, damaged, or readable by others."""
    path = key_file(folder, identity)
    role, _, name = identity.partition("/")
    private = _read(path, PrivateKeys, f"interlock keys issue {role} {name}".rstrip() + " makes them", private=True)
    if private.identity != identity:
        raise ConfigError(f"holds the keys of {private.identity}, not of {identity}", where=str(path))
    return private


def read_enrolment(path: Path) -> Enrolment:
    return _read(path, Enrolment, "interlock keys issue ROLE NAME --out FILE makes one", private=True)


def operators(folder: Path) -> list[str]:
    """The operators whose private keys lie in the folder."""
    return sorted(f"operator/{path.stem.removeprefix('operator-')}" for path in folder.glob("operator-*.key"))


def write_authority(folder: Path, authority: Authority) -> None:
    _write(folder / AUTHORITY, authority, mode=0o644)


def write_private(folder: Path, private: PrivateKeys) -> None:
    _write(key_file(folder, private.identity), private, mode=0o600)


def write_enrolment(path: Path, enrolment: Enrolment) -> None:
    _write(path, enrolment, mode=0o600)


def remove_private(folder: Path, identity: str) -> None:
    key_file(folder, identity).unlink(missing_ok=True)


def decode(data: bytes, kind: type[_T], *, where: str) -> _T:
    """A file's content. ConfigError for anything that is none, or of a later format."""
    try:
        found = msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        _check_format(data, where)  # a later one may look different
        raise ConfigError(f"is damaged: {error}", where=where, hint="restore it from a copy") from None
    _check_format(data, where)
    for one in _entries(found):
        _check_identity(one.identity, where)
        _check_hex(one.curve, where)
        _check_hex(one.sign or one.curve, where)
    return found


def _entries(found: Authority | PrivateKeys | Enrolment) -> list[Grant | PrivateKeys]:
    match found:
        case Authority():
            return [*found.grants]
        case Enrolment():
            return [found.own, *found.authority.grants]
    return [found]


def _check_identity(identity: str, where: str) -> None:
    """An identity becomes the name of a file."""
    role, _, name = identity.partition("/")
    try:
        if identity_of(role, name) == identity:
            return
    except ConfigError:
        pass
    raise ConfigError(f"is damaged: {identity[:80]!r} is no identity", where=where, hint="restore it from a copy")


def _check_hex(key: str, where: str) -> None:
    if len(key) != 2 * crypto.KEY_BYTES or not set(key) <= set("0123456789abcdef"):
        raise ConfigError("is damaged: a key is not 64 hexadecimal digits", where=where, hint="restore it from a copy")


class _Format(msgspec.Struct, frozen=True):
    format: int = FORMAT


class _Formats(_Format, frozen=True):
    """Of a file, and of the files that an enrolment holds."""

    own: _Format = _Format()
    authority: _Format = _Format()


def _check_format(data: bytes, where: str) -> None:
    try:
        found = msgspec.json.decode(data, type=_Formats)
    except (msgspec.DecodeError, RecursionError, ValueError):
        return  # it is damaged, whatever its format
    for format in (found.format, found.own.format, found.authority.format):
        if format != FORMAT:
            raise ConfigError(
                f"has format {format}, this version of Interlock knows {FORMAT}",
                where=where,
                hint="update Interlock here; nothing was changed",
            )


def _read(path: Path, kind: type[_T], hint: str, *, private: bool = False) -> _T:
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if private and mode & 0o077:
                raise ConfigError(
                    f"mode {mode:04o}: others may read this private key",
                    where=str(path),
                    hint=f"chmod 600 {path}, and rotate it if somebody did",
                )
            data = file.read(MAX_FILE)
    except FileNotFoundError:
        raise ConfigError("there is no such file", where=str(path), hint=hint) from None
    except OSError as error:
        raise ConfigError(f"can't be read: {error.strerror}", where=str(path)) from None
    return decode(data, kind, where=str(path))


def _write(path: Path, content: msgspec.Struct, *, mode: int) -> None:
    """Whole or not at all: a reader never sees half a file, and a private one is never open to others."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")  # 0600
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n")
                os.fchmod(descriptor, mode)
                file.flush()
                os.fsync(descriptor)
            os.replace(name, path)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(name)
            raise
    except OSError as error:
        raise ConfigError(f"can't be written: {error.strerror}", where=str(path)) from None
