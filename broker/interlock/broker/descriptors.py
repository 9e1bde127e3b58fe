"""How many connections a process may have: each takes a file descriptor."""

from __future__ import annotations

import logging

from interlock.broker import streams

EACH = 2  # connections of one key to one plane: to its ingress and to its feed
OWN = 100  # descriptors for everything else: files, libzmq's own, those that are just being let go

_log = logging.getLogger(__name__)


def shortage(limit: int, keys: int) -> str:
    """What to tell the operator where so many keys may need more than `limit`; empty otherwise. Pure."""
    needed = EACH * keys + OWN
    if needed <= limit or limit >= streams.NO_LIMIT:
        return ""
    return (
        f"at most {(limit - OWN) // EACH} of the fleet's {keys} keys can be connected at once: each has {EACH} "
        f"connections here, and this process may have {limit} descriptors, not {needed}; raise its hard limit "
        "(ulimit -Hn, LimitNOFILE= of a systemd unit)"
    )


def provide(where: str, keys: int) -> None:
    """Raise the limit as far as possible, and say so in the log if that is not enough for this many keys."""
    if short := shortage(streams.raise_descriptor_limit(), keys):
        _log.warning("%s: %s", where, short)
