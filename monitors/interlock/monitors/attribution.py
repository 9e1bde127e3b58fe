"""Whose what is: processes to agents, and GPU memory to processes. Pure.

A process belongs to the nearest agent: the one whose cgroup it is in, else itself, its group's, or its nearest
ancestor's. Memory of a GPU is known by (card, MIG instance, process); what belongs to no agent is told as that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from interlock.monitors.roster import Instance


def trees(roots: Iterable[int], relations: Mapping[int, tuple[int, int]]) -> dict[int, int]:
    """The root of each process that has one, from (parent, process group) by pid."""
    owner: dict[int, int | None] = {root: root for root in roots}
    for pid in relations:
        path = []
        at = pid
        while at not in owner and at in relations:
            path.append(at)
            owner[at] = None  # a circle, which pids reused while we read may form, ends here
            parent, group = relations[at]
            at = group if owner.get(group) == group else parent
        for step in path:
            owner[step] = owner.get(at)
    return {pid: root for pid, root in owner.items() if root is not None and pid in relations}


@dataclass(frozen=True)
class Holding:
    """Memory of one process on one card, in bytes. `mig`: the MIG instance, empty where the card is not divided."""

    uuid: str
    pid: int
    bytes: int
    mig: str = ""


@dataclass(frozen=True)
class Shares:
    """Who holds a card's memory, in bytes. agents: by (MIG instance, instance). strangers: by MIG instance.

    unlisted: in use, and of no process that the driver names (its own, or of another PID namespace); None: not known.
    """

    agents: Mapping[tuple[str, Instance], int]
    strangers: Mapping[str, int]
    unlisted: int | None


def share(holdings: Iterable[Holding], owners: Mapping[int, Instance], *, used: float | None = None) -> Shares:
    """Add up what each agent holds. `used`: of the whole card, without what the driver keeps."""
    agents: dict[tuple[str, Instance], int] = {}
    strangers: dict[str, int] = {}
    listed = 0
    for held in holdings:
        listed += held.bytes
        owner = owners.get(held.pid)
        if owner is None:
            strangers[held.mig] = strangers.get(held.mig, 0) + held.bytes
        else:
            agents[held.mig, owner] = agents.get((held.mig, owner), 0) + held.bytes
    unlisted = None if used is None else max(0, int(used) - listed)
    return Shares(agents, strangers, unlisted)
