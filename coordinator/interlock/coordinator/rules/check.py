"""What can be said of rules before they run: names nobody publishes, rules that never fire, tier and cost. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from interlock.broker.errors import ConfigError
from interlock.broker.samples import NAME
from interlock.coordinator.rules.engine import BATCH_PERIOD_S, Engine
from interlock.coordinator.rules.expression import (
    Aggregate,
    Binary,
    Call,
    Expression,
    Selector,
    Subquery,
    Window,
    is_scalar,
    parts,
    selectors,
)
from interlock.coordinator.rules.graph import constant
from interlock.coordinator.rules.language import NotSupported
from interlock.coordinator.rules.operators import SETS
from interlock.coordinator.rules.reach import EVERYTHING, Bounds, contradiction, impossible
from interlock.coordinator.rules.retention import wanted
from interlock.coordinator.rules.rule import Rule
from interlock.coordinator.rules.vocabulary import METRICS, OWN_PREFIX, Size, nearest

SAMPLE_BYTES = 16  # a time and a value in a ring
ABOUT = ("host", "agent")  # of these an alert needs one, to be about a migration

Severity = Literal["error", "warning", "note"]
Names = frozenset[str]


@dataclass(frozen=True)
class Finding:
    severity: Severity
    kind: str
    text: str


@dataclass(frozen=True)
class Cost:
    """An estimate. `series`: that it looks at; `samples`: that are kept for its windows; `looks`: elements a second."""

    series: int
    samples: int
    looks: float

    @property
    def bytes(self) -> int:
        return self.samples * SAMPLE_BYTES


@dataclass
class Checked:
    """One rule, and what was found; `tier` is empty if it does not load."""

    where: str
    name: str = ""
    tier: str = ""
    why: str = ""
    cost: Cost | None = None
    findings: list[Finding] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        cost = self.cost
        return {
            "where": self.where,
            "rule": self.name,
            "tier": self.tier,
            "why": self.why,
            "cost": cost
            and {"series": cost.series, "samples": cost.samples, "bytes": cost.bytes, "elements_per_s": cost.looks},
            "findings": [{"severity": f.severity, "kind": f.kind, "text": f.text} for f in self.findings],
        }


def broken(error: ConfigError) -> Checked:
    """A rule, or a file, that does not load."""
    kind = "not-supported" if isinstance(error, NotSupported) else "syntax"
    hint = f" ({error.hint})" if error.hint else ""
    return Checked(error.where, findings=[Finding("error", kind, error.what + hint)])


def check(rules: Sequence[Rule], size: Size) -> list[Checked]:
    """A verdict on each rule, all of them together: one may record what another looks at."""
    recorded = {rule.name: labels_of(rule.expression, {}) for rule in rules if rule.kind == "record"}
    for rule in rules:  # what rests on what another one records
        if rule.kind == "record":
            found = labels_of(rule.expression, recorded)
            recorded[rule.name] = None if found is None else found | frozenset(rule.labels)
    made = []
    for running in Engine(rules).running:
        rule = running.rule
        checked = Checked(rule.where, rule.name, running.tier, running.why, _cost(rule, running.tier, size))
        checked.findings = [*_unknown(rule, recorded), *_reach(rule), *_pairs(rule.expression, recorded)]
        checked.findings += _about(rule, recorded)
        made.append(checked)
    return made


# --- names


def _unknown(rule: Rule, recorded: dict[str, Names | None]) -> Iterator[Finding]:
    trees = [rule.expression] + ([rule.resolve] if rule.resolve is not None else [])
    seen: set[str] = set()
    for selector in (each for tree in trees for each in selectors(tree)):
        name = selector.metric
        if name is None or name in seen:
            continue
        seen.add(name)
        if name not in METRICS and name not in recorded and name not in ("ALERTS", "ALERTS_FOR_STATE"):
            yield _stranger(name, recorded)
        elif name in ("ALERTS", "ALERTS_FOR_STATE"):
            yield Finding("warning", "unknown-metric", f"{name} is not published here: alerts are events of the log")
    for tree in trees:
        yield from _unknown_labels(tree, recorded)


def _stranger(name: str, recorded: dict[str, Names | None]) -> Finding:
    near = nearest(name, recorded)
    hint = f"; did you mean {near}?" if near else ""
    if name.startswith(OWN_PREFIX) and not near:
        return Finding("note", "own-metric", f"{name}: only an agent that reports it itself publishes it")
    return Finding("warning", "unknown-metric", f"nobody publishes {name}, and no rule records it{hint}")


def _unknown_labels(tree: Expression, recorded: dict[str, Names | None]) -> Iterator[Finding]:
    for selector in selectors(tree):
        known = labels_of(selector, recorded)
        for matcher in selector.matchers if known is not None else ():
            if matcher.label != NAME and matcher.label not in (known or ()) and not matcher.matches(""):
                yield Finding("warning", "unknown-label", _no_label(selector.metric or "", matcher.label, known))
    for part in parts(tree):
        if isinstance(part, Aggregate) and not part.without:
            known = labels_of(part.operand, recorded)
            for label in part.labels if known is not None else ():
                if label not in (known or ()):
                    yield Finding("warning", "unknown-label", _no_label(f"what {part.op} is given", label, known))


def _no_label(what: str, label: str, known: Names | None) -> str:
    near = difflib.get_close_matches(label, known or (), n=1)
    has = ", ".join(sorted(known or ())) or "none"
    return f"{what} has no label {label}{f'; did you mean {near[0]}?' if near else f' (it has: {has})'}"


def labels_of(tree: Expression, recorded: dict[str, Names | None]) -> Names | None:
    """The labels that its elements have at most; None where that isn't known."""
    match tree:
        case Selector():
            name = tree.metric
            if name in METRICS:
                return METRICS[name].labels
            return recorded.get(name or "")
        case Window(selector):
            return labels_of(selector, recorded)
        case Subquery(operand):
            return labels_of(operand, recorded)
        case Aggregate(op, operand, labels, without):
            if op in ("topk", "bottomk", "limitk", "limit_ratio"):
                return labels_of(operand, recorded)
            if op == "count_values":
                return None
            if not without:
                return frozenset(labels)
            inner = labels_of(operand, recorded)
            return None if inner is None else inner - frozenset(labels)
        case Binary():
            return _labels_of_pair(tree, recorded)
        case Call(function, arguments):
            if function in ("label_replace", "label_join", "absent", "absent_over_time", "info") or not arguments:
                return None
            if function in ("vector", "scalar", "time"):
                return frozenset()
            found = next((each for each in arguments if not is_scalar(each)), None)
            inner = None if found is None else labels_of(found, recorded)
            return inner - {"role", "revision"} if function == "baseline" and inner is not None else inner
    return None


def _labels_of_pair(tree: Binary, recorded: dict[str, Names | None]) -> Names | None:
    if is_scalar(tree.left):
        return labels_of(tree.right, recorded)
    left = labels_of(tree.left, recorded)
    if is_scalar(tree.right) or left is None:
        return left
    right, matching = labels_of(tree.right, recorded), tree.matching
    if tree.op in ("and", "unless"):
        return left
    if right is None:
        return None
    if tree.op == "or":
        return left | right
    if matching.cardinality == "many-to-one":
        return left | frozenset(matching.include)
    if matching.cardinality == "one-to-many":
        return right | frozenset(matching.include)
    return left & frozenset(matching.labels) if matching.on else left - frozenset(matching.labels)


# --- rules that never fire


def _reach(rule: Rule) -> Iterator[Finding]:
    reasons = impossible(rule.expression, _bounds)
    what = "never fires" if rule.kind == "alert" else "never records anything"
    for reason in dict.fromkeys(reasons):
        yield Finding("warning", "unreachable", f"{what}: {reason}")
    if not reasons:
        for selector in selectors(rule.expression):
            if found := contradiction(selector):
                yield Finding("warning", "contradiction", found)
    if rule.kind == "alert" and not reasons and is_scalar(rule.expression):
        yield Finding("warning", "always", "always fires: it is a number, and not a condition")
    value = constant(rule.expression)
    if rule.resolve is not None and value is None and impossible(rule.resolve, _bounds):
        yield Finding("warning", "never-ends", "x_resolve_expr gives nothing, whatever comes: the alert never ends")


def _bounds(selector: Selector) -> Bounds:
    metric = METRICS.get(selector.metric or "")
    return EVERYTHING if metric is None else metric.bounds


def _pairs(tree: Expression, recorded: dict[str, Names | None]) -> Iterator[Finding]:
    """Operators whose sides have nothing to be matched by."""
    for part in parts(tree):
        if not isinstance(part, Binary) or is_scalar(part.left) or is_scalar(part.right) or part.op == "or":
            continue
        left, right = labels_of(part.left, recorded), labels_of(part.right, recorded)
        if left is None or right is None or part.matching.fill_left is not None or part.matching.fill_right is not None:
            continue
        matching = part.matching
        if matching.on:
            for label in matching.labels:
                for side, known, other in (("left", left, right), ("right", right, left)):
                    if label not in known and label in other:
                        yield Finding(
                            "warning", "unmatched", f"on({label}): the {side} side of {part.op} has no such label"
                        )
            continue
        apart = (left ^ right) - frozenset(matching.labels)
        if apart and part.op not in SETS:
            names = ", ".join(sorted(apart))
            yield Finding(
                "warning", "unmatched", f"only one side of {part.op} has {names}: add on(...) or ignoring(...)"
            )
        elif apart and part.op == "and":
            yield Finding("warning", "unmatched", f"only one side of and has {', '.join(sorted(apart))}: add on(...)")
        found = _fixed(part.left), _fixed(part.right)
        for label in sorted((found[0].keys() & found[1].keys()) - frozenset(matching.labels)):
            if found[0][label] != found[1][label] and part.op != "unless":
                yield Finding(
                    "warning",
                    "unmatched",
                    f"{label} is {found[0][label]!r} left of {part.op} and {found[1][label]!r} right of it: "
                    f"nothing matches without on(...) or ignoring({label})",
                )


def _fixed(tree: Expression) -> dict[str, str]:
    """Labels that all elements have with one value, where a plain selector says so."""
    match tree:
        case Selector():
            return {one.label: one.value for one in tree.matchers if one.op == "=" and one.label != NAME and one.value}
        case Window(selector):
            return _fixed(selector)
        case Call(function, arguments) if arguments and function not in ("label_replace", "label_join", "baseline"):
            return _fixed(arguments[0])
        case Binary(left=left, right=right) if is_scalar(right):
            return _fixed(left)
    return {}


def _about(rule: Rule, recorded: dict[str, Names | None]) -> Iterator[Finding]:
    """An action that no migration can be meant by."""
    if rule.action == "notify":
        return
    known = labels_of(rule.expression, recorded)
    labels = None if known is None else known | frozenset(rule.labels)
    if labels is not None and not labels.intersection(ABOUT):
        text = (
            f"x_action: {rule.action} does nothing: its alerts have neither host nor agent; aggregate by (host, agent)"
        )
        yield Finding("warning", "about-nothing", text)
    role = _fixed(rule.expression).get("role", "candidate")
    if labels is not None and "role" in labels and role != "candidate":
        text = (
            f'x_action: {rule.action} does nothing: role="{role}" is no migration\'s; its candidate is role="candidate"'
        )
        yield Finding("warning", "about-nothing", text)


# --- cost


def _cost(rule: Rule, tier: str, size: Size) -> Cost:
    """Series as the fleet's size has them; samples kept: each window at its metric's rate.

    Elements looked at in a second: incremental: one for each sample; batch: all, `1 / BATCH_PERIOD_S` times; sampled:
    all, once an interval.
    """
    series = samples = 0
    arrivals = looked = 0.0
    for selector, keep_s, _ in wanted(rule):
        metric = METRICS.get(selector.metric or "")
        count = size.series(metric) if metric is not None else size.agents
        narrowed = {one.label for one in selector.matchers if one.op == "=" and one.value}
        for label in narrowed & {"role", "quantile", "direction"} & (metric.labels if metric is not None else set()):
            count //= {"role": 2, "quantile": 3, "direction": 2}[label]
        every_s = metric.every_s if metric is not None else 1.0
        kept = int(keep_s / every_s) * count
        series += count
        samples += kept
        arrivals += count / every_s
        looked += count + kept
    match tier:
        case "incremental":
            looks = arrivals
        case "batch":
            looks = looked / BATCH_PERIOD_S
        case _:
            looks = looked / rule.interval_s
    return Cost(series, samples, round(looks, 1))
