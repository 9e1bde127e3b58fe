"""The rule engine's core: samples and the time go in, transitions of alerts come out. No clock, no sockets.

A whole batch is applied before any rule looks, so that a new `used` never meets an old `total`; then each rule that the
batch touched looks once, at the label sets that it touched, all of them at once. What can't be had sample by sample is
computed as a whole from the same rings, at most every `BATCH_PERIOD_S`. Rules of a group with an interval are evaluated
at its multiples, as Prometheus does it.

Two clocks: `time` is the publisher's, and only reported; `now` is ours, monotone, and decides on `for`, windows and
staleness. A publisher's clock is brought to ours by the smallest difference seen lately (see clocks.py).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Literal

import numpy as np

from interlock.broker.samples import MAX_SOURCES, Labels
from interlock.coordinator.rules.alerts import Transition, always
from interlock.coordinator.rules.clocks import Skew
from interlock.coordinator.rules.evaluate import LOOKBACK_S, Evaluation
from interlock.coordinator.rules.expression import Expression
from interlock.coordinator.rules.graph import Graph, reachable
from interlock.coordinator.rules.language import parse
from interlock.coordinator.rules.nodes import Node
from interlock.coordinator.rules.operators import quietly
from interlock.coordinator.rules.plans import Plan, Plans, together
from interlock.coordinator.rules.recorder import Recorder
from interlock.coordinator.rules.rule import Rule
from interlock.coordinator.rules.running import Running, unnamed
from interlock.coordinator.rules.series import BASELINE, NOBODY, PRESENT, SeriesStore
from interlock.coordinator.rules.source import milliseconds
from interlock.coordinator.rules.values import EvaluationError, Floats, Ints, Value

SCAN_PERIOD_S = 0.05  # between looks at what time alone brings: silence, absence, windows that run empty
BATCH_PERIOD_S = 0.25  # what is computed as a whole is computed this often where samples come,
IDLE_PERIOD_S = 1.0  # and this often where none do, if time alone can change it
STARTUP_S = 5.0  # absence is judged after so much ingest: every publisher has sent a keyframe by then
WATERMARK_S = 5.0  # without any sample for so long, the bus stands still and not the series: staleness waits
BIND_AT_ONCE = 250  # new series that are matched against all selectors in one go: some 10 ms
MAX_PASSES = 16  # recorded series that feed each other settle within so many passes, or the rest waits for a sample
TOGETHER = 3  # planned batches in one call: from so many on, joining them costs less than following each
PARTITION_PUBLISHERS = 3  # so many publishers that fall silent together, and half of all, are a partition
OVERDUE_INTERVALS = 1.5  # of a publisher's series: fewer than any rule waits for, so that none fires before it is known
OWN_LOOKBACK_S = -1.0  # each series knows when it is silent


Columns = tuple[Ints, Floats, float, str]  # a batch: ids from `admit`, values, when they were taken, publisher
Asked = tuple[Columns, Plan | None]  # a batch, and its plan if it has one


class Engine:
    """All rules over all series. `errors` has the last error of each rule that can't be evaluated now, by its place."""

    def __init__(self, rules: Sequence[Rule], *, lookback_s: float = LOOKBACK_S) -> None:
        self.samples = 0
        self.evaluations = 0
        self.evaluation_errors = 0
        self.errors: dict[str, str] = {}
        self.store = SeriesStore(lookback_s)
        self._now_ms = 0.0
        self._graph = Graph(self.store, lambda: self._now_ms)
        self.running = [Running(rule, self.store, self._graph) for rule in rules]
        self._gone: list[int] = []  # series that ended since the last batch
        self._skews: OrderedDict[str, Skew] = OrderedDict()  # by publisher, MAX_SOURCES of them
        self._began: float | None = None
        self._watermark = -math.inf
        self._next_scan = self._next_batch = -math.inf
        self._queue: list[Running] = []
        self._plans = Plans()
        self._recorder = Recorder(self.store, self._tell, lambda: self._now_ms)
        self._arrange()

    @property
    def rules(self) -> list[Rule]:
        return [running.rule for running in self.running]

    @property
    def refused(self) -> int:
        """Samples of series that were too many."""
        return self.store.refused

    @property
    def backlog(self) -> int:
        """New series that wait for being bound: call `bind` until there are none."""
        return len(self.store.unbound)

    # --- in

    def ingest(
        self,
        samples: Iterable[tuple[Labels, float]],
        ended: Iterable[Labels],
        time: float,
        now: float,
        *,
        publisher: str = "",
    ) -> list[Transition]:
        """One batch: series that ended, samples taken at `time` by the publisher's clock, received `now`."""
        for labels in ended:
            self.end(labels)
        newest = dict(samples)
        ids = np.fromiter((self.admit(labels, publisher) for labels in newest), np.int64, len(newest))
        values = np.fromiter(newest.values(), np.float64, len(newest))
        return self.apply([(ids, values, time, publisher)], now)

    def admit(self, labels: Labels, publisher: str = "") -> int:
        """The id of a series for `apply`; -1 if there are too many. It is good until the series ends."""
        return self.store.admit(labels, publisher)

    def end(self, labels: Labels) -> None:
        """This series reports no more; rules are told with the next batch."""
        number = self.store.end(labels)
        if number is not None:
            self._gone.append(number)

    def apply(self, batches: Sequence[Columns], now: float) -> list[Transition]:
        """Batches that have no series in common, received `now`, as if they were one.

        Ids of -1, and ids of series that ended, are samples that are refused, and counted.
        """
        with quietly():
            return self._apply(batches, now)

    def bind(self) -> None:
        """Match some of the new series against the rules' selectors; what they are worth shows at the next sample."""
        with quietly():
            self.store.bind(BIND_AT_ONCE)

    def tick(self, now: float, *, backlog: bool = False) -> list[Transition]:
        """What the passing of time alone brings about: deadlines, silence, windows that move on.

        backlog: samples wait that were not taken in yet; silence and absence are not judged before they are.
        """
        made: list[Transition] = []
        if self._began is not None and now >= self._next_scan:
            self._next_scan = now + SCAN_PERIOD_S
            at = min(now, self._watermark + WATERMARK_S)
            with quietly():
                made = self._scan(at, now, backlog=backlog)
        for running in self.running:
            if not running.error:  # what can't be evaluated now is not known to last
                made += running.tick(now)
        return made

    # --- state

    def reload(self, rules: Sequence[Rule], now: float) -> list[Transition]:
        """Other rules from now on. A rule that is the same goes on as it was; alerts of those that are gone resolve."""
        before = {running.rule.hash: running for running in self.running}
        kept: list[Running] = []
        for rule in rules:
            known = before.pop(rule.hash, None)
            if known is not None:
                known.rule = known.alerts.rule = rule
                known.alerts.resolved = always  # until x_resolve_expr is arranged anew, if there is one
                kept.append(known)
            else:
                kept.append(Running(rule, self.store, self._graph))
        made: list[Transition] = []
        for gone in before.values():
            made += gone.alerts.clear()
            gone.leave()
            for labels in list(gone.recorded):
                self.store.end(labels)
            self.errors.pop(gone.rule.where, None)
        self.running = kept
        self._arrange()
        self._queue.clear()
        for running in kept:
            running.marked = False
            running.mark(None)
        with quietly():
            made += self._settle([], now, None)
            made += self._release(now)
        return made

    def refresh(self, ids: Ints, now: float) -> None:
        """These series were filled in from elsewhere: whoever looks at them looks again."""
        self._now_ms = milliseconds(now)
        with quietly():
            for running in self.running:
                for node in reachable(running.root) if running.root is not None else ():
                    node.renew()
            self._tell(ids)

    def restore(
        self, rule: str, labels: dict[str, str], value: float, *, sample_time: float, since: float, now: float
    ) -> bool:
        """An alert of this rule fired before a restart and didn't resolve; False if there is no such rule any more."""
        for running in self.running:
            wanted = running.rule.labels.items()
            fits = all(labels.get(name, "") == text for name, text in wanted if "{{" not in text)
            if running.rule.kind == "alert" and running.rule.name == rule and fits:
                running.alerts.restore(labels, value, sample_time=sample_time, since=since, now=now)
                return True
        return False

    def record_baseline(self, about: dict[str, str], now: float) -> None:
        """Keep what the series of `baseline()` are worth now, where all labels that both have are equal."""
        for members in [each for each in self.store.members if each.recorded]:
            for series in self.store.select(members.selector).tolist():
                labels = self.store.labels[series] or ()
                present = self.store.code[series] == PRESENT
                if present and all(about.get(name, value) == value for name, value in labels):
                    self._keep_baseline(labels, float(self.store.values[series]), now)

    def forget_baseline(self, about: dict[str, str]) -> None:
        """The migration is over."""
        for labels in list(self.store.numbers):
            if (BASELINE, "1") in labels and all(about.get(name, value) == value for name, value in labels):
                self.store.end(labels)

    # --- out

    def eval(self, expression: str | Expression, at: float) -> Value:
        """The value of an expression at a moment, from the samples there are. EvaluationError, ConfigError."""
        tree = parse(expression) if isinstance(expression, str) else expression
        return self.evaluation(at).result(tree)

    def evaluation(self, at: float) -> Evaluation:
        return Evaluation(self.store, at, lookback=OWN_LOOKBACK_S)

    def next_deadline(self) -> float:
        """When `tick` has something to do at the latest; infinity where nothing is known yet."""
        deadlines = [running.alerts.next_deadline() for running in self.running if not running.error]
        if self._began is not None:
            deadlines.append(self._next_scan)
        return min(deadlines, default=math.inf)

    def current(self, state: Literal["pending", "firing"]) -> list[Transition]:
        """Every alert in this state, as the transition that would say so."""
        return [made for running in self.running for made in running.alerts.current(state)]

    def breaches(self, names: Container[str]) -> list[Transition]:
        """What is breached now of the rules with these names, whether for long enough or not."""
        return [made for running in self.running if running.rule.name in names for made in running.alerts.breaches()]

    def partition(self, now: float) -> str:
        """What says that many publishers fell silent together, rather than one of them; empty if they didn't."""
        silent, all_ = self.store.silent_publishers(now * 1000, OVERDUE_INTERVALS)
        if silent < PARTITION_PUBLISHERS or 2 * silent < all_:
            return ""
        return f"{silent} of {all_} publishers fell silent together: a partition"

    def judges_absence(self, rule: Rule) -> bool:
        return any(running.judges_absence for running in self.running if running.rule is rule) or rule.no_data == "fire"

    # --- inside

    def _skew(self, publisher: str) -> Skew:
        found = self._skews.get(publisher)
        if found is None:
            found = self._skews[publisher] = Skew()
            if len(self._skews) > MAX_SOURCES:
                self._skews.popitem(last=False)
        self._skews.move_to_end(publisher)
        return found

    def _apply(self, batches: Sequence[Columns], now: float) -> list[Transition]:
        self._begin(now)
        changed = [np.array(self._gone, np.int64)] if self._gone else []
        self._gone.clear()
        self.store.bind(BIND_AT_ONCE)
        plans: list[Plan] = []
        latest = -math.inf
        if len(batches) >= TOGETHER:
            asked, plans, latest = self._append_planned(batches, now)
        else:
            asked = [(batch, self._plan(batch)) for batch in batches]
        for (ids, values, time, publisher), plan in asked:
            taken = time if math.isfinite(time) else now
            at = milliseconds(self._skew(publisher).in_order(taken, now))
            if plan is None and len(ids) and ids.min() < 0:
                self.store.refused += int((ids < 0).sum())
                counted = self.store.append(ids[ids >= 0], values[ids >= 0], at, taken)
            else:
                counted = self.store.append(ids, values, at, taken)
            self.samples += len(counted)
            latest = max(latest, taken)
            if plan is not None and counted is ids:
                plans.append(plan)
            else:
                changed.append(counted)
        made = self._follow(plans, now, latest) if plans else []
        sampled = latest if latest > -math.inf else None
        return made + self._settle(changed, now, sampled) + self._release(now)

    def _plan(self, batch: Columns) -> Plan | None:
        ids, _, _, publisher = batch
        return self._plans.of(self.store, publisher, ids, self.store.version) if len(ids) else None

    def _append_planned(self, batches: Sequence[Columns], now: float) -> tuple[list[Asked], list[Plan], float]:
        """Take in at once those that have a plan: (the others, the plans, when the newest was taken)."""
        found = [self._plan(batch) for batch in batches]
        planned = [(batch, plan) for batch, plan in zip(batches, found, strict=True) if plan is not None]
        others: list[Asked] = [(batch, None) for batch, plan in zip(batches, found, strict=True) if plan is None]
        if len(planned) < TOGETHER:
            return [*planned, *others], [], -math.inf
        counts = [len(ids) for (ids, _, _, _), _ in planned]
        taken = [time if math.isfinite(time) else now for (_, _, time, _), _ in planned]
        at = [
            milliseconds(self._skew(publisher).in_order(time, now))
            for time, ((_, _, _, publisher), _) in zip(taken, planned, strict=True)
        ]
        ids = np.concatenate([ids for (ids, _, _, _), _ in planned])
        values = np.concatenate([values for (_, values, _, _), _ in planned])
        if not self.store.append_all(ids, values, np.repeat(at, counts), np.repeat(taken, counts)):
            return [*planned, *others], [], -math.inf
        self.samples += len(ids)
        return others, [plan for _, plan in planned], max(taken)

    def _follow(self, plans: Sequence[Plan], now: float, sample_time: float) -> list[Transition]:
        """Let nodes and rules look as planned; a rule that can't, by now, looks as it does without a plan."""
        made: list[Transition] = []
        if len(plans) >= TOGETHER:
            steps, looks = together(plans)
            for step, slots in steps:
                step(slots)
            for running, slots in looks:
                if self._as_planned(running, slots, now, sample_time):
                    made += running.see(slots, *running.at(slots), now, repeated=True)
            return made
        for plan in plans:
            for _, _, _, bound in plan.steps:
                bound()
        for plan in plans:
            for running, slots, fetch in plan.looks:
                if self._as_planned(running, slots, now, sample_time):
                    values, codes = fetch()
                    made += running.see(slots, values, codes, now)
        return made

    def _as_planned(self, running: Running, slots: Ints, now: float, sample_time: float) -> bool:
        running.sample_time = sample_time
        if running.error or running.marked or running.conflicted or self._too_early(running, now):
            running.mark(slots)
            return False
        self.evaluations += 1
        return True

    def _begin(self, now: float) -> None:
        if self._began is None:
            self._began = now
        self._watermark = max(self._watermark, now)
        self._now_ms = milliseconds(now)

    def _arrange(self) -> None:
        """What follows from the rules there are."""
        self._graph.keep_only(running.root for running in self.running if running.root is not None)
        for members in list(self.store.watched()):
            if not members.listeners:
                self.store.forget(members)
        self.store.version += 1
        for place, running in enumerate(self.running):
            running.place, running.queue = place, self._queue
            if running.marked and running not in self._queue:
                self._queue.append(running)
            if running.rule.resolve is not None:
                running.alerts.resolved = self._resolver(running.rule.resolve)
        self._timed: list[Node] = list(self._graph.timed())
        self._sampled: dict[float, float] = {}  # interval -> when it is due
        for running in self.running:
            if running.tier == "sampled":
                self._sampled.setdefault(running.rule.interval_s, -math.inf)

    def _resolver(self, expression: Expression) -> Callable[[Labels], bool]:
        """Whether x_resolve_expr holds of a label set now. It is looked at only when an alert might end."""

        def holds(key: Labels) -> bool:
            try:
                found = self.evaluation(self._now_ms / 1000).elements(expression)
            except EvaluationError:
                return False
            return key in {unnamed(labels) for labels in found}

        return holds

    def _keep_baseline(self, labels: Labels, value: float, now: float) -> None:
        key = tuple(sorted((*labels, (BASELINE, "1"))))
        number = self.store.admit(key, hidden=True)
        if number > NOBODY:
            self.store.bind(len(self.store.unbound))
            one = np.array([number])
            self.store.append(one, np.array([value]), milliseconds(now), now)
            self._tell(one)

    def _tell(self, ids: Ints) -> None:
        for members, slots in self.store.slots_of(ids):
            for listener in members.listeners:
                listener.touched(slots)

    def _scan(self, at: float, now: float, *, backlog: bool) -> list[Transition]:
        self._now_ms = milliseconds(at)
        self.store.bind(BIND_AT_ONCE)
        changed = []
        if not backlog:
            silent, expired = self.store.scan(self._now_ms)
            changed.append(silent)
            gone = [number for labels in expired if (number := self.store.end(labels)) is not None]
            changed.append(np.array(gone, np.int64))
            for node in self._timed:
                node.scan(self._now_ms)
        made = self._sample(now)
        if now >= self._next_batch:
            self._next_batch = now + BATCH_PERIOD_S
            for running in self.running:
                if running.timed and now >= running.last_evaluated + IDLE_PERIOD_S:
                    running.mark(None)
            made += self._settle(changed, now, None, everything=True)
        else:
            made += self._settle(changed, now, None)
        made += self._release(now)
        self.store.renew_table()
        return made

    def _release(self, now: float) -> list[Transition]:
        """Give up the series that ended, and look at what that changes for those that are left."""
        return self._settle([], now, None) if self.store.release() else []

    def _sample(self, now: float) -> list[Transition]:
        """The groups with an interval that are due, one rule after another, as Prometheus evaluates them."""
        made: list[Transition] = []
        for interval, due in self._sampled.items():
            if now < due:
                continue
            at = math.floor(now / interval) * interval
            self._sampled[interval] = at + interval
            if due == -math.inf:
                continue
            for running in self.running:
                if running.tier == "sampled" and running.rule.interval_s == interval:
                    made += self._whole(running, at, Evaluation(self.store, at))
        return made

    def _settle(
        self, changed: Sequence[Ints], now: float, sample_time: float | None, *, everything: bool = False
    ) -> list[Transition]:
        """Let the rules look that something changed for, then those that watch what they recorded, and so on."""
        made: list[Transition] = []
        for ids in changed:
            if len(ids):
                self._tell(ids)
        for _ in range(MAX_PASSES):
            if not self._queue:
                break
            marked = sorted(self._queue, key=lambda running: running.place)
            self._queue.clear()
            looked = False
            for running in marked:
                if sample_time is not None:
                    running.sample_time = sample_time
                late = running.root is None and not everything and not (running.small and not running.looks_back)
                if running.tier == "sampled" or self._too_early(running, now) or late:
                    self._queue.append(running)  # its turn comes
                    continue
                running.marked = False
                looked = True
                made += self._look(running, now)
            if not looked:
                break
        return made

    def _too_early(self, running: Running, now: float) -> bool:
        return running.judges_absence and (self._began is None or now < self._began + STARTUP_S)

    def _look(self, running: Running, now: float) -> list[Transition]:
        if running.root is not None and not running.conflicted:
            self.evaluations += 1
            was_wrong, running.error = running.error, ""
            if was_wrong:
                self.errors.pop(running.rule.where, None)
                running.mark(running.root.slots())
            if running.rule.kind == "record":
                self._recorder.slots(running, now)
                return []
            return running.look(now)
        return self._whole(running, now, self.evaluation(now))

    def _whole(self, running: Running, now: float, evaluation: Evaluation) -> list[Transition]:
        """Evaluate a rule as a whole."""
        self.evaluations += 1
        running.last_evaluated = now
        evaluation.wary = running.tier != "sampled"
        try:
            found = running.elements(evaluation.elements(running.rule.expression).items())
        except EvaluationError as error:
            self.evaluation_errors += 1
            running.error = self.errors[running.rule.where] = str(error)
            return []
        if running.error:
            running.error = ""
            self.errors.pop(running.rule.where, None)
        if running.rule.kind == "record":
            self._recorder.whole(running, found, now)
            return []
        return running.compare(found, now)
