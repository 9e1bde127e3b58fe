"""Several rule engines share a fleet: which hosts are whose, and rules over hosts of several. Pure.

An engine sees the telemetry of its own hosts only. A rule whose every element belongs to one host runs in the engine of
that host. An aggregation over hosts is computed in two steps: each engine records it over its own hosts (a partial
result, a series that the others hear), and the aggregation of the partial results stands in its place, in all engines.
So an element can be compared with what the whole fleet adds up to, where the element is. An alert about the fleet as a
whole is the first engine's to tell. While an engine is silent no such rule says anything: a sum without it would lie.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from interlock.broker import topics
from interlock.broker.errors import ConfigError
from interlock.broker.samples import NAME
from interlock.coordinator.rules.calls import absent_labels
from interlock.coordinator.rules.expression import (
    Aggregate,
    Binary,
    Call,
    Expression,
    Matcher,
    Matching,
    Negate,
    Number,
    Selector,
    Subquery,
    Text,
    Window,
)
from interlock.coordinator.rules.operators import SETS
from interlock.coordinator.rules.rule import Rule

HOST = "host"  # the label by which the fleet is shared: whatever a host measures has it
FLEET = "fleet"  # what stands for a host in what belongs to none; the first engine's
PARTIAL = "interlock_partial_"  # what partial results are called, with a digest of what they are of
PART = "partition"  # the label of a partial result, and of the sign of life below: whose it is
MAX_PREFIXES = 400  # of one engine: its key may have 1,000; with more hosts it hears all and passes over the others'
ENGINES = "interlock_engines"  # 1 from each engine that shares the fleet, beside its partial results

Scope = Literal["none", "fleet", "host"]  # elements that belong to nothing, to the fleet as a whole, to one host each

_AGAIN = {"sum": "sum", "count": "sum", "min": "min", "max": "max", "group": "group"}  # of partial results
_PASSING = ("scalar", "absent", "absent_over_time")


@dataclass(frozen=True)
class Part:
    """One engine's place among those that share a fleet: `number` of `count`, from 1 on."""

    number: int = 1
    count: int = 1

    @property
    def shared(self) -> bool:
        return self.count > 1

    @property
    def publisher(self) -> str:
        """What it calls itself in telemetry."""
        return f"rules-{self.number}" if self.shared else "rules"

    @property
    def partials(self) -> str:
        """Under what name it sends its partial results."""
        return f"partial-{self.number}"

    def hears(self, hosts: Iterable[str]) -> list[str]:
        """The topics of the telemetry that is this engine's to know."""
        if not self.shared:
            return [topics.TELEMETRY]
        own = [f"{topics.TELEMETRY}{host}/" for host in hosts if self.owns(host)]
        if len(own) > MAX_PREFIXES:
            return [topics.TELEMETRY]
        return [*own, f"{topics.TELEMETRY}{FLEET}/" + ("" if self.number == 1 else "partial-")]

    def takes(self, source: str) -> bool:
        """Whether a batch of this source is this engine's to know. Its own partial results it has already."""
        host, _, publisher = source.partition("/")
        if not self.shared or host != FLEET:
            return self.owns(host)
        return publisher != self.partials and (self.number == 1 or publisher.startswith("partial-"))

    def owns(self, host: str) -> bool:
        """Whether it sees what this host measures. The same everywhere, and little changes with the count."""
        return not self.shared or part_of(host, self.count) == self.number


WHOLE = Part()


def part_of(host: str, count: int) -> int:
    """The engine of a host: the one with the highest hash of both, so that one more takes over a share of each."""
    if host == FLEET:
        return 1
    return max(range(1, count + 1), key=lambda number: hashlib.blake2b(f"{number}/{host}".encode()).digest())


@dataclass
class Shared:
    """The rules of one engine, `partials` among them, which it records for all. `fleet_wide`: names of rules whose
    elements belong to no host: those alerts are the first engine's."""

    rules: list[Rule] = field(default_factory=list)
    partials: list[Rule] = field(default_factory=list)
    fleet_wide: set[str] = field(default_factory=set)


def share(rules: Sequence[Rule], part: Part) -> Shared:
    """What this engine evaluates of the rules. ConfigError for one that can't be computed from partial results."""
    if not part.shared:
        return Shared(list(rules))
    made, recorded = Shared(), _recorded(rules)
    partials: dict[str, Rule] = {}
    for rule in rules:
        splitter = _Splitter(rule, recorded, part, partials)
        scope, expression = splitter.split(rule.expression)
        resolve = None if rule.resolve is None else splitter.split(rule.resolve)[1]
        if splitter.used:
            expression = _guarded(expression, part)
        if scope != "host":
            made.fleet_wide.add(rule.name)
        if scope == "host" or rule.kind == "record" or part.number == 1:
            made.rules.append(replace(rule, expression=expression, resolve=resolve))
    life = Rule(
        name=ENGINES, kind="record", text="vector(1)", expression=Call("vector", (Number(1.0),)),
        labels={PART: str(part.number)},
    )  # fmt: skip
    made.partials = [life, *partials.values()]
    made.rules = [*made.partials, *made.rules]
    return made


def _recorded(rules: Sequence[Rule]) -> dict[str, Scope]:
    """What the series that rules record belong to; of several rules with one name the widest."""
    order: tuple[Scope, ...] = ("none", "fleet", "host")
    found: dict[str, Scope] = {rule.name: "none" for rule in rules if rule.kind == "record"}
    for _ in range(len(rules)):  # what is recorded may look at what is recorded
        before = dict(found)
        for rule in rules:
            if rule.kind == "record":
                found[rule.name] = max(found[rule.name], _scope(rule, before), key=order.index)
        if found == before:
            break
    return found


def _scope(rule: Rule, recorded: Mapping[str, Scope]) -> Scope:
    try:
        return _Splitter(rule, recorded, Part(1, 2), {}).split(rule.expression)[0]
    except ConfigError:  # said when the rule's turn comes
        return "host"


def _guarded(expression: Expression, part: Part) -> Expression:
    """The expression, while all engines are heard."""
    engines = Aggregate("count", Selector((Matcher(NAME, "=", ENGINES),)))
    return Binary(
        "and", expression, Binary(">=", engines, Number(float(part.count))), Matching("many-to-many", on=True)
    )


class _Splitter:
    """One rule's expression -> the same over partial results. `used`: there are some in it."""

    def __init__(self, rule: Rule, recorded: Mapping[str, Scope], part: Part, partials: dict[str, Rule]) -> None:
        self.rule = rule
        self.recorded = recorded
        self.part = part
        self.partials = partials
        self.used = False

    def refused(self, what: str, hint: str = "") -> ConfigError:
        return ConfigError(
            f"{what}, which {self.part.count} engines that share the fleet can't do",
            where=self.rule.where,
            hint=hint or "keep `host` in it, or set rules.partitions to 1",
        )

    def split(self, tree: Expression) -> tuple[Scope, Expression]:
        match tree:
            case Number() | Text():
                return "none", tree
            case Selector():
                return self.of(tree), tree
            case Window(selector):
                return self.of(selector), tree
            case Subquery(operand):
                scope, inner = self.split(operand)
                return scope, replace(tree, operand=inner)
            case Negate(operand):
                scope, inner = self.split(operand)
                return scope, Negate(inner)
            case Binary():
                return self.binary(tree)
            case Aggregate():
                return self.aggregate(tree)
            case Call():
                return self.call(tree)

    def of(self, selector: Selector) -> Scope:
        metric = selector.metric
        return "host" if metric is None else self.recorded.get(metric, "host")

    def binary(self, tree: Binary) -> tuple[Scope, Expression]:
        (left, a), (right, b) = self.split(tree.left), self.split(tree.right)
        made = replace(tree, left=a, right=b)
        if left == right == "host" and not _keeps(tree.matching.labels, without=not tree.matching.on):
            raise self.refused(f"{tree.op} matches elements of different hosts")
        if "host" not in (left, right):
            return ("fleet" if "fleet" in (left, right) else "none"), made
        if tree.op in SETS and right == "host" and left != "host":
            if tree.op == "or":
                raise self.refused("or joins elements of the fleet and of hosts")
            raise self.refused(f"{tree.op} holds elements of the fleet against those of hosts")
        if tree.op == "or" and left != right:
            raise self.refused("or joins elements of hosts and of the fleet")
        one_sided = tree.matching.cardinality in ("many-to-one", "one-to-many", "many-to-many")
        vectors = "none" not in (left, right)
        if vectors and not one_sided and left != right:
            raise self.refused(f"{tree.op} matches one element of the fleet with one of a host", "use group_left")
        return "host", made

    def aggregate(self, tree: Aggregate) -> tuple[Scope, Expression]:
        parameter = None if tree.parameter is None else self.split(tree.parameter)[1]
        scope, operand = self.split(tree.operand)
        made = replace(tree, operand=operand, parameter=parameter)
        if scope != "host" or _keeps(tree.labels, without=tree.without):
            return scope, made
        if tree.op == "avg":
            total, count = (self.partial(replace(made, op=op), op) for op in ("sum", "count"))
            return "fleet", Binary("/", total, count)
        if tree.op not in _AGAIN:
            raise self.refused(f"{tree.op} over hosts", f"of partial results there are {', '.join(_AGAIN)} and avg")
        return "fleet", self.partial(made, tree.op)

    def partial(self, tree: Aggregate, op: str) -> Aggregate:
        """Record it over our hosts; the aggregation of what all engines recorded."""
        labels = (*tree.labels, PART) if tree.without else tree.labels
        return Aggregate(_AGAIN[op], self.record(tree, {}), labels, tree.without)

    def record(self, tree: Expression, labels: Mapping[str, str]) -> Selector:
        self.used = True
        name = PARTIAL + hashlib.sha256(repr((tree, sorted(labels.items()))).encode()).hexdigest()[:16]
        self.partials.setdefault(
            name,
            Rule(
                name=name, kind="record", text=f"a part of {self.rule.text}", expression=tree,
                labels={**labels, PART: str(self.part.number)}, group=self.rule.group, file=self.rule.file,
            ),
        )  # fmt: skip
        wanted = (Matcher(NAME, "=", name), *(Matcher(label, "=", value) for label, value in labels.items()))
        return Selector(wanted)

    def call(self, tree: Call) -> tuple[Scope, Expression]:
        found = [self.split(argument) for argument in tree.arguments]
        scopes = {scope for scope, _ in found}
        made = Call(tree.function, tuple(inner for _, inner in found))
        scope: Scope = "host" if "host" in scopes else "fleet" if "fleet" in scopes else "none"
        if scope == "host" and tree.function in ("absent", "absent_over_time"):
            return "fleet", self.absent(tree, found[0][1])
        if scope == "host" and tree.function == "scalar":
            raise self.refused("scalar() of what hosts measure")
        replaced = tree.arguments[1:2] if tree.function in ("label_replace", "label_join") else ()
        if scope == "host" and any(isinstance(text, Text) and text.value == HOST for text in replaced):
            raise self.refused(f"{tree.function}() changes the label `host`")
        if tree.function == "scalar":
            return "none" if scope == "none" else "fleet", made
        return scope, made

    def absent(self, tree: Call, operand: Expression) -> Expression:
        """Nobody has any: no engine counts one. The labels that absent() would give are those of the count."""
        there = Call("present_over_time", (operand,)) if tree.function == "absent_over_time" else operand
        labels = dict(absent_labels(tree.arguments[0]))
        return Call("absent", (self.record(Aggregate("count", there), labels),))


def _keeps(labels: Iterable[str], *, without: bool) -> bool:
    """Whether elements of different hosts stay apart."""
    return (HOST not in labels) if without else (HOST in labels)
