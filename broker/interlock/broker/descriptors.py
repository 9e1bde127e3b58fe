"""How many connections a process may have: each takes a file descriptor."""

from __future__ import annotations

import logging
import resource

EACH = 2  # connections of one key to one plane: to its ingress and to its feed
OWN = 100  # descriptors for everything else: files, libzmq's own, those that are just being let go

_log = logging.getLogger(__name__)


def raise_limit() -> int:
    """Take all descriptors that this process may have; how many that is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def shortage(limit: int, keys: int) -> str:
    """What to tell the operator where so many keys may need more than `limit`; empty otherwise. Pure."""
    needed = EACH * keys + OWN
    if limit == resource.RLIM_INFINITY or needed <= limit:
        return ""
    return (
        f"at most {(limit - OWN) // EACH} of the fleet's {keys} keys can be connected at once: each has {EACH} "
        f"connections here, and this process may have {limit} descriptors, not {needed}; raise its hard limit "
        "(ulimit -Hn, LimitNOFILE= of a systemd unit)"
    )


def provide(where: str, keys: int) -> None:
    """Raise the limit as far as possible, and say so in the log if that is not enough for this many keys."""
    if short := shortage(raise_limit(), keys):
        _log.warning("%s: %s", where, short)
