"""Topic names. Each ends with a slash, so that the prefix of `alpha` never matches `alpha2`.

command/coordinator/            operators ask the coordinator
command/all/                    an operator or the coordinator asks every host
command/<host>/                 the coordinator asks a host
rollback/<host>/                anyone entitled asks a host to roll back
fact/host/<host>/               what a host says happened there
fact/migration/<agent>/         what the coordinator decided about an agent
fact/wave/<wave>/               what the coordinator decided about many agents at once
fact/alert/<rule>/              an alert fired or resolved
fact/gpu/<host>/                what a host's monitor says of faults of its GPUs
record/<agent>/                 what was measured of a migration
snapshot/fleet/                 what the coordinator has folded of all that was before
telemetry/<host>/<publisher>/   batches of samples; host "fleet": of roles that belong to none
"""

from __future__ import annotations

import re

from interlock.broker.errors import ConfigError

MAX_NAME = 64  # characters: a name stands in topics, file names and socket paths
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

COORDINATOR = "command/coordinator/"
ALL_HOSTS = "command/all/"
RESERVED = ("coordinator", "all", "fleet")  # no host may be called so: their topics are not a host's
COMMANDS = "command/"
ROLLBACKS = "rollback/"
FACTS = "fact/"
RECORDS = "record/"
SNAPSHOTS = "snapshot/"
FLEET_SNAPSHOT = "snapshot/fleet/"
TELEMETRY = "telemetry/"


def check_name(name: str, *, where: str) -> str:
    """`name` itself if it may stand in a topic and a file name; ConfigError otherwise."""
    if len(name) > MAX_NAME or not _NAME.fullmatch(name) or ".." in name:
        raise ConfigError(
            f"{name!r} is not a name",
            where=where,
            hint=f"use 1 to {MAX_NAME} letters, digits, dots, dashes or underscores, a letter or digit first",
        )
    return name


def command(host: str) -> str:
    return f"command/{host}/"


def rollback(host: str) -> str:
    return f"rollback/{host}/"


def host_fact(host: str) -> str:
    return f"fact/host/{host}/"


def migration_fact(agent: str) -> str:
    return f"fact/migration/{agent}/"


def wave_fact(wave: str) -> str:
    return f"fact/wave/{wave}/"


def record(agent: str) -> str:
    return f"record/{agent}/"


def alert_fact(rule: str) -> str:
    """Rule names are free text in Prometheus; whatever a topic can't hold becomes a dash."""
    return f"fact/alert/{re.sub(r'[^A-Za-z0-9._-]', '-', rule)[:MAX_NAME]}/"


def gpu_fact(host: str) -> str:
    return f"fact/gpu/{host}/"


def telemetry(host: str, publisher: str) -> str:
    return f"telemetry/{host}/{publisher}/"
