"""Plans: what a publisher's batch does, worked out once for the series it brings each time. Pure.

A publisher sends the same series again and again. Which slots of which nodes they touch, and which label sets of which
rules, changes only where series come and go; so the second batch with the same series makes a plan, and those after it
only gather values and compute.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

from interlock.coordinator.rules.nodes import Fetch, NoPlan, Step
from interlock.coordinator.rules.running import Running
from interlock.coordinator.rules.series import SeriesStore
from interlock.coordinator.rules.values import Flags, Ints

Key = tuple[int, int, int]  # of a step: how far above the samples, the node, its side

MAX_PLANS = 20_000  # publishers remembered: as many sources as a reader of telemetry knows


class Plan:
    """`steps`: what nodes do; `looks`: the rules that look, their slots, and how they get at the values."""

    def __init__(self, store: SeriesStore, ids: Ints) -> None:
        self.steps: list[tuple[Key, Step, Ints, Callable[[], object]]] = []
        self.looks: list[tuple[Running, Ints, Fetch]] = []
        self.fresh: Flags = np.zeros(store.rows, bool)
        self.fresh[ids] = True
        self._slots: dict[int, tuple[Running, list[Ints]]] = {}
        for members, slots in store.slots_of(ids):
            for listener in members.listeners:
                listener.plan(slots, self)
        for running, found in self._slots.values():
            chosen = found[0] if len(found) == 1 else np.unique(np.concatenate(found))
            if running.root is None or running.rule.kind == "record":
                raise NoPlan
            self.looks.append((running, chosen, running.root.bound(chosen, self.fresh)))
        self.fresh = np.empty(0, bool)

    def do(self, node: object, port: int, step: Step, slots: Ints, bound: Callable[[], object] | None = None) -> None:
        key = getattr(node, "depth", 0), id(node), port
        self.steps.append((key, step, slots, bound if bound is not None else lambda: step(slots)))

    def look(self, rule: object, slots: Ints) -> None:
        assert isinstance(rule, Running)
        self._slots.setdefault(id(rule), (rule, []))[1].append(slots)


def together(plans: Sequence[Plan]) -> tuple[list[tuple[Step, Ints]], list[tuple[Running, Ints]]]:
    """What several plans do, node by node from the samples upwards, and rule by rule."""
    steps: dict[Key, tuple[Step, list[Ints]]] = {}
    looks: dict[int, tuple[Running, list[Ints]]] = {}
    for plan in plans:
        for key, step, slots, _ in plan.steps:
            steps.setdefault(key, (step, []))[1].append(slots)
        for running, slots, _ in plan.looks:
            looks.setdefault(running.place, (running, []))[1].append(slots)
    ordered = [(step, np.concatenate(found)) for _, (step, found) in sorted(steps.items(), key=lambda pair: pair[0])]
    return ordered, [(running, np.concatenate(found)) for _, (running, found) in sorted(looks.items())]


class Plans:
    """The plan of each publisher, good for one set of series and one state of the graph."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, tuple[Ints, int, Plan | bool | None]] = OrderedDict()

    def of(self, store: SeriesStore, publisher: str, ids: Ints, version: int) -> Plan | None:
        """None for what is new, or can't be planned."""
        known = self._known.get(publisher)
        if known is not None and known[1] == version and (known[0] is ids or np.array_equal(known[0], ids)):
            plan = known[2]
            if plan is False:
                return None
            if plan is None or plan is True:
                try:
                    plan = Plan(store, ids)
                except NoPlan:
                    self._known[publisher] = ids, version, False
                    return None
                self._known[publisher] = ids, version, plan
            return plan
        self._known[publisher] = ids, version, None
        self._known.move_to_end(publisher)
        while len(self._known) > MAX_PLANS:
            self._known.popitem(last=False)
        return None
