"""The lease by which a coordinator keeps a host sampled fast while it moves an agent there; on the telemetry plane.

A series `cadence_lease_seconds` says for how long from now on, and is repeated. A coordinator that is dead repeats
nothing, so that no host stays fast for longer than that.
"""

from __future__ import annotations

from interlock.broker import topics
from interlock.broker.samples import Labels, labels

HOST, PUBLISHER = "fleet", "cadence"
TOPIC = topics.telemetry(HOST, PUBLISHER)
METRIC = "cadence_lease_seconds"
RENEW_S = 1.0  # between renewals
BEYOND_S = 4.0  # that a lease outlasts the coordinator's own to hosts: what a rollback then shows is still seen fast
FIRST_S = 10.0  # what an event of a migration is good for by itself, before and beside any lease


def lease(host: str, migration: str) -> Labels:
    """The series of one host that a migration touches."""
    return labels(METRIC, host=HOST, touched=host, migration=migration)
