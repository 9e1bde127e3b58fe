"""The actions of the verb `rules`: from its options to what it prints."""

from __future__ import annotations

import argparse
import glob
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from interlock.broker.config import load_fleet
from interlock.broker.errors import ConfigError
from interlock.coordinator import rules_history_verbs, rules_live_verbs
from interlock.coordinator.rules import check, conformance, unittests
from interlock.coordinator.rules.check import Checked
from interlock.coordinator.rules.rule import Rule
from interlock.coordinator.rules.rulefile import SHIPPED, load_rules, parse_rules, shipped_rules
from interlock.coordinator.rules.sharing import Part, share
from interlock.coordinator.rules.vocabulary import Size
from interlock.coordinator.terminal import say_json

EXIT_FAILED = 13  # something differs, or does not load
SMALL_FLEET = (2, 77, "no fleet file")  # hosts and agents of a fleet as users run it today


def run(chosen: argparse.Namespace) -> int:
    """The exit code: 0, or 13 if something is not as it should be. ConfigError for a file that can't be read."""
    acts = {
        "check": _check,
        "test": _test,
        "eval": rules_live_verbs.evaluate if _live(chosen) else rules_history_verbs.evaluate,
        "replay": rules_history_verbs.run_replay,
        "explain": rules_live_verbs.explain if _live(chosen) else rules_history_verbs.run_explain,
        "conformance": _conformance,
    }
    return acts[chosen.act](chosen)


def _live(chosen: argparse.Namespace) -> bool:
    """The engine that runs is asked, unless others samples, or other rules, are meant than it has."""
    if chosen.act == "explain" and chosen.rules:
        return False
    return chosen.act in ("eval", "explain") and not chosen.file and not chosen.listen


def _check(chosen: argparse.Namespace) -> int:
    problems: list[ConfigError] = []
    rules = []
    for name in chosen.files:
        try:
            found = (
                shipped_rules(name)
                if name in SHIPPED
                else parse_rules(text_of(Path(name)), file=name, problems=problems)
            )
        except ConfigError as error:
            problems.append(error)
            continue
        rules += found
    if chosen.fleet.exists() and (count := load_fleet(chosen.fleet).rules.partitions) > 1:
        problems += _not_shared(rules, Part(1, count))
    size, told = _size(chosen)
    checked = [*map(check.broken, problems), *check.check(rules, size)]
    severities = [finding.severity for each in checked for finding in each.findings]
    counts = {f"{kind}s": severities.count(kind) for kind in ("error", "warning", "note")}
    if chosen.json:
        say_json({"rules": [each.to_json() for each in checked], **counts, "estimated_for": told})
    else:
        for each in checked:
            print("\n".join(_told(each)))
        print(f"{len(rules)} rules: {', '.join(f'{count} {kind}' for kind, count in counts.items())}; {told}")
    wrong = counts["errors"] + (counts["warnings"] if chosen.strict else 0)
    return EXIT_FAILED if wrong else 0


def _not_shared(rules: Sequence[Rule], part: Part) -> Iterator[ConfigError]:
    """Of rules that the engines of the fleet file, being several, could not run."""
    recording = [rule for rule in rules if rule.kind == "record"]
    for rule in rules:
        try:
            share([*recording, rule], part)
        except ConfigError as error:
            if error.where == rule.where:
                yield error


def _test(chosen: argparse.Namespace) -> int:
    told: list[dict[str, object]] = []
    failed = total = 0
    for path in chosen.files:
        found = unittests.parse_tests(text_of(path), file=str(path))
        for test, differences in unittests.run(found, _rules_of(found, path)):
            total += 1
            failed += bool(differences)
            told.append({"file": str(path), "test": test.name, "differences": [asdict(each) for each in differences]})
            if not chosen.json:
                print(f"{path}: {test.name}: {'FAILED' if differences else 'ok'}")
                print("".join(f"  {line}\n" for each in differences for line in each.lines()), end="")
    if chosen.json:
        say_json({"tests": told, "failed": failed, "total": total})
    else:
        print(f"{total} tests, {failed} failed")
    return EXIT_FAILED if failed else 0


def _rules_of(found: unittests.TestFile, path: Path) -> list[Rule]:
    """Of the files that a test file names, relative to itself, patterns among them; or by the names of what ships."""
    names: list[str] = []
    for name in found.rule_files:
        matching = [] if name in SHIPPED else sorted(glob.glob(name, root_dir=path.parent))
        names += matching or [name]
    return load_rules(names, path.parent) if names else []


def _told(each: Checked) -> list[str]:
    lines = [each.where]
    if each.cost is not None:
        why = f" ({each.why})" if each.why else ""
        cost = each.cost
        kept = f", {cost.samples} samples kept ({cost.bytes / 1e6:.1f} MB)" if cost.samples else ""
        lines.append(f"  {each.tier}{why}: {cost.series} series{kept}, {cost.looks:g} elements/s")
    return lines + [f"  {finding.severity}: {finding.text}" for finding in each.findings]


def _size(chosen: argparse.Namespace) -> tuple[Size, str]:
    """The fleet that costs are estimated for: as asked for, as the fleet file has it, or a small one."""
    hosts, agents, why = SMALL_FLEET
    if chosen.fleet.exists():
        fleet = load_fleet(chosen.fleet)
        hosts, agents, why = len(fleet.hosts), len(fleet.agents), str(chosen.fleet)
    if chosen.agents is not None or chosen.hosts is not None:
        why = "as asked for"
    hosts = hosts if chosen.hosts is None else chosen.hosts
    agents = agents if chosen.agents is None else chosen.agents
    told = f"cost for {hosts} hosts with a GPU each and {agents} agents, all being migrated ({why})"
    return Size(hosts=hosts, agents=agents, gpus=hosts), told


def _conformance(chosen: argparse.Namespace) -> int:
    files: dict[str, dict[str, int]] = {}
    for path in chosen.files:
        verdicts = list(conformance.check(text_of(path)))
        files[_name(path, files)] = conformance.tally(verdicts)
        for verdict in verdicts if chosen.failures else ():
            if verdict.outcome != "pass":
                print(f"{path}:{verdict.line}: {verdict.outcome}: {verdict.query}: {verdict.detail}", file=sys.stderr)
    report = conformance.report(files)
    print(json.dumps(report, indent=2))
    return EXIT_FAILED if report["failed"] else 0


def _name(path: Path, taken: dict[str, dict[str, int]]) -> str:
    return path.name if path.name not in taken else str(path)


def text_of(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        raise ConfigError("there is no such file", where=str(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"can't be read: {error}", where=str(path)) from None
