"""Whose fault a breach is. Pure.

A breach during a migration is the candidate's until there is evidence against that: it began before the migration did,
or the same rule is breached by the permanent revision of the same agent, or by several other agents of the host. Then
nothing is won by going back: the migration is held, and a human looks.

The rules that ship look at candidates only. So each rollback rule that selects `role="candidate"` has a twin that asks
the same of permanent revisions. A twin is evaluated, and its alerts are evidence; nobody else hears of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from interlock.broker.facts import Blame
from interlock.coordinator.rules.alerts import Transition
from interlock.coordinator.rules.expression import (
    Aggregate,
    Binary,
    Call,
    Expression,
    Matcher,
    Negate,
    Number,
    Selector,
    Subquery,
    Text,
    Window,
)
from interlock.coordinator.rules.inflight import Migration
from interlock.coordinator.rules.rule import Rule

OTHERS = 2  # agents of the host that breach the same rule, before it is the host's fault: one is its own affair
CANDIDATE, PERMANENT = Matcher("role", "=", "candidate"), Matcher("role", "=", "permanent")


def twin(rule: Rule) -> Rule | None:
    """The same rule about permanent revisions; None if it is not about candidates alone, or undoes nothing."""
    if rule.kind != "alert" or rule.action != "rollback" or rule.dry_run:
        return None
    expression = _about_permanent(rule.expression)
    if expression == rule.expression:
        return None
    name = f"{rule.name} of the permanent revision"
    return replace(
        rule, name=name, expression=expression, action="notify", no_data="resolve", keep_firing_for_s=0.0, resolve=None
    )


def whose(alert: Transition, migration: Migration, breaches: Iterable[Transition]) -> Blame | None:
    """Who else it is; None: the candidate, as far as anybody can tell. breaches: of the same rule and of its twin."""
    labels = alert.labels
    if alert.since < migration.started:
        why = f"it began {migration.started - alert.since:.1f} s before the migration"
        if labels.get("role") == "candidate":  # of an earlier one
            return None
        return Blame(who="permanent" if "agent" in labels else "host", why=why)
    if "agent" not in labels:  # of the host as a whole: its one alert says nothing about who
        return None
    found = [breach for breach in breaches if _of_another(breach, alert, migration)]
    others = sorted({breach.labels["agent"] for breach in found} - {migration.agent})
    if len(others) >= OTHERS:
        return Blame(who="host", why=f"{', '.join(others)} on {migration.host} breach the same rule")
    if any(breach.labels["agent"] == migration.agent for breach in found):
        return Blame(who="permanent", why="the permanent revision breaches the same rule")
    return None


def _of_another(breach: Transition, alert: Transition, migration: Migration) -> bool:
    """It is about an agent of the migration's host, and about no candidate."""
    labels = breach.labels
    if "agent" not in labels or labels.get("host", migration.host) != migration.host:
        return False
    role = labels.get("role", "")
    if role == "" and labels["agent"] == migration.agent:  # a sum over both revisions says nothing; the twin's does
        return breach.rule.name != alert.rule.name
    return role != "candidate"


def _about_permanent(tree: Expression) -> Expression:
    match tree:
        case Number():
            return tree
        case Text():
            return tree
        case Selector(matchers):
            return replace(tree, matchers=tuple(PERMANENT if matcher == CANDIDATE else matcher for matcher in matchers))
        case Window(selector):
            changed = _about_permanent(selector)
            assert isinstance(changed, Selector)
            return replace(tree, selector=changed)
        case Negate(operand) | Aggregate(operand=operand) | Subquery(operand):
            return replace(tree, operand=_about_permanent(operand))
        case Binary(left=left, right=right):
            return replace(tree, left=_about_permanent(left), right=_about_permanent(right))
        case Call(arguments=arguments):
            return replace(tree, arguments=tuple(map(_about_permanent, arguments)))
