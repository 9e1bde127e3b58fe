"""What the live engine answers to an operator: the worth of an expression, and why an alert fires. Pure.

It computes from the engine's own series, rings and alerts, between two batches. So that no question keeps it from its
samples for long, each is bounded before it is begun and while it is computed; what is too much is refused.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Sequence
from typing import Any

from interlock.broker.errors import ConfigError, Refused
from interlock.broker.questions import Question
from interlock.broker.samples import Labels
from interlock.coordinator.rules import explain as explaining
from interlock.coordinator.rules.engine import OWN_LOOKBACK_S, Engine
from interlock.coordinator.rules.evaluate import Evaluation
from interlock.coordinator.rules.expression import Call, Expression, Text, parts, selectors
from interlock.coordinator.rules.language import parse
from interlock.coordinator.rules.retention import wanted
from interlock.coordinator.rules.rule import Rule
from interlock.coordinator.rules.running import Running
from interlock.coordinator.rules.values import EvaluationError, Matrix, Value, Vector

MAX_LOOKS = 20_000  # series that a selector nobody watches is held against: 1 us each
MAX_WORK = 50_000  # elements and samples of all parts of an expression: some 50 ms of an idle core at the very most
MAX_ELEMENTS = 1_000  # told of a result; the rest is counted
MAX_PART = 50  # elements told of each part of an alert's expression
MAX_REPEATS = 3  # in one regular expression: ours backtracks, and each multiplies what a long label costs
LISTEN = "--listen computes it outside of the engine"

_REPEAT = re.compile(r"(?<!\\)[*+]|(?<!\\)\{\d+,\d*\}")
_REPEATED_GROUP = re.compile(r"(?<!\\)\)\s*[*+{]")


def answer(engine: Engine, question: Question, now: float, *, silent: Container[str] = ()) -> dict[str, Any]:
    """The result of a question; ConfigError or Refused says why there is none.

    `silent`: alerts that nobody is told of.
    """
    at = now if question.time is None else min(question.time, now)
    if bool(question.expr) == bool(question.alert):
        raise ConfigError("asks for nothing, or for two things", hint="an expression, or an alert")
    if question.alert:
        return explained(engine, question.alert, at, silent)
    return evaluated(engine, question.expr, at)


def evaluated(engine: Engine, text: str, at: float) -> dict[str, Any]:
    """What the expression is worth, from the samples that the engine keeps."""
    tree = parse(text)
    affordable(engine, [Rule(name="eval", text=text, expression=tree)])
    try:
        value = _evaluation(engine, at).result(tree)
    except EvaluationError as error:
        raise ConfigError(error.what, where=error.where, hint=error.hint or LISTEN) from None
    rows = told(value, engine.store.table.sets)
    more = len(rows) - MAX_ELEMENTS
    return {"expr": text, "time": at, "elements": rows[:MAX_ELEMENTS], "more": max(0, more)}


def explained(engine: Engine, alert: str, at: float, silent: Container[str] = ()) -> dict[str, Any]:
    """Its rules with the parts of their expressions, and its alerts as the engine has them now."""
    named = [each for each in engine.running if each.rule.name == alert and each.rule.kind == "alert"]
    if not named:
        alerts = {each.rule.name for each in engine.running if each.rule.kind == "alert"}
        known = sorted(name for name in alerts if name not in silent)
        shown = ", ".join(known[:50]) + (f", and {len(known) - 50} more" if len(known) > 50 else "")
        raise ConfigError(f"there is no alert {alert!r}", hint=f"there are: {shown}")
    affordable(engine, [each.rule for each in named])
    return {
        "alert": alert,
        "time": at,
        "rules": [_rule(engine, each, at) for each in named],
        "alerts": list(_alerts(named))[:MAX_ELEMENTS],
    }


def affordable(engine: Engine, rules: Sequence[Rule]) -> None:
    """Refused for what would look at too much, or at samples that nobody keeps."""
    for rule in rules:
        for pattern in _patterns(rule.expression):
            if _REPEATED_GROUP.search(pattern) or len(_REPEAT.findall(pattern)) > MAX_REPEATS:
                raise Refused(f"the regular expression {pattern[:80]!r} may take long", hint=LISTEN)
        for selector, keep_s, recorded in wanted(rule, lookback_s=0.0):
            looks = 0 if recorded else engine.store.looks(selector)
            if looks > MAX_LOOKS:
                raise Refused(
                    f"{explaining.written(selector)} is held against {looks} series, at most {MAX_LOOKS}",
                    hint=f"name a metric, or {LISTEN}",
                )
            if keep_s <= 0 or recorded:
                continue
            samples, kept_s = engine.store.kept(selector)
            if samples > MAX_WORK:
                raise Refused(f"{explaining.written(selector)} has {samples} samples, at most {MAX_WORK}", hint=LISTEN)
            if kept_s < keep_s:
                raise Refused(
                    f"the engine keeps {explaining.written(selector)} for {kept_s:g} s, and {keep_s:g} s are asked for",
                    hint=f"what no rule's window looks back for is not kept; {LISTEN}",
                )


def told(value: Value, sets: Sequence[Labels]) -> list[dict[str, Any]]:
    """A result as rows: labels, value, and of samples their time in seconds."""
    if isinstance(value, Vector):
        pairs = zip(value.keys.tolist(), value.values.tolist(), strict=True)
        return [{"labels": dict(sets[key]), "value": worth} for key, worth in pairs]
    if isinstance(value, Matrix):
        samples = zip(value.times.tolist(), value.runs.values.tolist(), value.runs.owners().tolist(), strict=True)
        return [{"labels": dict(sets[value.keys[i]]), "time": t / 1000, "value": v} for t, v, i in samples]
    return [{"labels": {}, "value": value}]


def _evaluation(engine: Engine, at: float) -> Evaluation:
    return Evaluation(engine.store, at, lookback=OWN_LOOKBACK_S, budget=MAX_WORK)


def _rule(engine: Engine, running: Running, at: float) -> dict[str, Any]:
    begun: list[Evaluation] = []

    def begin() -> Evaluation:  # all parts of a rule have one budget
        made = _evaluation(engine, at)
        made.spent = sum(each.spent for each in begun)
        begun[:] = [made]
        return made

    found = explaining.explain(running.rule.expression, begin)
    return {
        "rule": running.rule.name,
        "where": running.rule.where,
        "expr": running.rule.text,
        "for": running.rule.for_s,
        "action": running.rule.action,
        "tier": running.tier,
        "why": running.why,
        "error": running.error,
        "parts": [part.to_json(MAX_PART) for part in found],
    }


def _alerts(named: Sequence[Running]) -> Iterator[dict[str, Any]]:
    for running in named:
        for alert in (*running.alerts.current("firing"), *running.alerts.current("pending")):
            yield {
                "state": alert.state,
                "labels": alert.labels,
                "value": alert.value,
                "since": alert.since,
                "sample_time": alert.sample_time,
                "summary": alert.summary,
            }


def _patterns(tree: Expression) -> Iterator[str]:
    """All regular expressions in it."""
    for selector in selectors(tree):
        for group in (selector.matchers, *selector.alternatives):
            yield from (matcher.value for matcher in group if matcher.op in ("=~", "!~"))
    for part in parts(tree):
        if isinstance(part, Call) and part.function == "label_replace" and isinstance(part.arguments[-1], Text):
            yield part.arguments[-1].value
