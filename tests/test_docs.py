"""What docs/ says of the code is what the code says. `python tests/test_docs.py` writes the generated parts anew.

A generated part stands between `<!-- generated: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args
from xml.etree import ElementTree

import msgspec
import pytest

import wire_parts
from interlock.agents import token_machine
from interlock.agents.ladder import LADDER, LEAST_S, NEXT, WITHIN_S, Ascent, Rung, Turn
from interlock.agents.slot import ON_TRIAL, STEPS, Slot
from interlock.agents.slot_io import (
    DrillEnded,
    Gone,
    HandedOver,
    Healthy,
    Input,
    Moment,
    PrepareEnded,
    Row,
    ShadowEnded,
    State,
    Tick,
    Verified,
)
from interlock.broker import commands, config, fields
from interlock.broker import strategies as strategy_tables
from interlock.broker.bounds import range_of
from interlock.broker.commands import Breach
from interlock.broker.config import parse_fleet
from interlock.broker.errors import ConfigError
from interlock.broker.strategies import BUILT_IN, StrategyConfig
from interlock.coordinator.assess import scoring
from interlock.coordinator.assess import settings as assess_settings
from interlock.coordinator.demo.scenarios import SCENARIOS
from interlock.coordinator.phases import EVENTS, TRANSITIONS, Phase
from interlock.coordinator.rules import language, operators, template
from interlock.coordinator.rules.rule import Rule
from interlock.coordinator.rules.rulefile import default_rules, parse_rules
from interlock.coordinator.steps import Stage, plan
from interlock.monitors import gpu_faults, gpu_metrics

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md"])
PART = re.compile(r"(?s)<!-- generated: ([\w-]+) -->\n(.*?)<!-- end -->")

# --- the fleet file


# The tables of the fleet file in the order of the page: its heading, and the class that reads it.
TABLES = {
    "top level": "FleetConfig",
    "[broker]": "BrokerConfig",
    "[security]": "SecurityConfig",
    "[log]": "LogConfig",
    "[coordinator]": "CoordinatorConfig",
    "[freeze]": "FreezeConfig",
    "[[freeze.windows]]": "FreezeWindow",
    "[rules]": "RulesConfig",
    "[monitor]": "MonitorConfig",
    "[[monitor.simulated]]": "SimulatedGpu",
    "[monitor.templates.NAME]": "MonitorTemplate",
    "[strategies.NAME]": "StrategyConfig",
    "[[strategies.NAME.canary]]": "CanaryStep",
    "[strategies.NAME.observe]": "ObserveConfig",
    "[hosts.NAME]": "HostConfig",
    "[agents.NAME]": "AgentConfig",
    "[agents.NAME.compare]": "CompareConfig",
    "[agents.NAME.compare.handlers.NAME]": "HandlerCompare",
    "[agents.NAME.revisions.NAME]": "RevisionConfig",
    "[agents.NAME.revisions.NAME.probe]": "ProbeConfig",
    "[agents.NAME.revisions.NAME.needs]": "NeedsConfig",
    "[agents.NAME.revisions.NAME.state]": "StateConfig",
}
NOT_KEYS = {("FleetConfig", "path")}
NESTED = {name: heading for heading, name in TABLES.items()}
TYPES = {
    "str": "text",
    "int": "whole number",
    "float": "number",
    "bool": "true or false",
    "list[str]": "list of texts",
    "list[str] | bool": "list of texts, or true or false",
    "dict[str, Any]": "table",
    "dict[str, str]": "table of texts",
    "Level": ", ".join(f'"{level}"' for level in get_args(strategy_tables.Level)),
    "list[BackupLevel]": "list of " + ", ".join(f'"{level}"' for level in get_args(fields.BackupLevel)),
}


def fleet_file() -> str:
    """Every key of the fleet file's classes: its type, its default, and the comment beside it."""
    classes = {}
    for module in (config, strategy_tables):
        source = inspect.getsource(module)
        lines = source.splitlines()
        found = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
        classes |= {node.name: (node, lines) for node in found}
    parts = []
    for heading, name in TABLES.items():
        node, lines = classes[name]
        theory = ast.get_docstring(node) or ""
        rows = [_key_row(name, field, lines) for field in _fields(node) if (name, field_name(field)) not in NOT_KEYS]
        title = heading if heading == "top level" else f"`{heading}`"
        table = ["| key | is | default | |", "|---|---|---|---|", *rows]
        parts.append("\n".join([f"## {title}", "", *([theory, ""] if theory else []), *table, ""]))
    return "\n".join(parts)


def _fields(node: ast.ClassDef) -> list[ast.AnnAssign]:
    return [line for line in node.body if isinstance(line, ast.AnnAssign)]


def field_name(field: ast.AnnAssign) -> str:
    assert isinstance(field.target, ast.Name)
    return field.target.id


def _key_row(owner: str, field: ast.AnnAssign, lines: list[str]) -> str:
    key = field_name(field)
    assert field.end_lineno is not None
    _, _, comment = lines[field.end_lineno - 1][field.end_col_offset or 0 :].partition("#")
    above = lines[field.lineno - 2].strip()
    if not comment and above.startswith("#"):
        comment = above[1:]
    assert comment.strip(), f"{owner}.{key} has no comment that says what it means"
    annotation = ast.unparse(field.annotation)
    allowed = f", {range_of(owner, key)}" if annotation.split(" ")[0] in ("int", "float") else ""
    field_of = {each.name: each for each in msgspec.structs.fields(_class(owner))}
    cells = [
        f"`{field_of[key].encode_name}`",
        _type(annotation) + allowed,
        _default(owner, key),
        comment.strip(),
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _class(name: str) -> Any:
    return getattr(config, name, None) or getattr(strategy_tables, name)


def _type(annotation: str) -> str:
    annotation = annotation.removesuffix(" | None")
    if annotation in TYPES:
        return TYPES[annotation]
    if annotation.startswith("Literal["):
        return ", ".join(f'"{choice}"' for choice in re.findall(r"'(.*?)'", annotation))
    found = re.fullmatch(r"(list\[|dict\[str, )?(\w+)\]?", annotation)
    assert found is not None, annotation
    kind = {None: "table", "list[": "list of tables", "dict[str, ": "tables by name"}[found[1]]
    return f"{kind}, see `{NESTED[found[2]]}`"


def _default(owner: str, key: str) -> str:
    field = {each.name: each for each in msgspec.structs.fields(_class(owner))}[key]
    if field.required:
        return "*needed*"
    value = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    return "as below" if isinstance(value, msgspec.Struct) else _toml(value)


def _toml(value: Any) -> str:
    if value is None or value in ("", [], {}):
        return "-"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, dict):
        return "`{ " + ", ".join(f'{key} = "{text}"' for key, text in value.items()) + " }`"
    if isinstance(value, list):
        return "`[" + ", ".join(f'"{text}"' for text in value) + "]`"
    return f'`"{value}"`' if isinstance(value, str) else f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def strategies() -> str:
    """The built-in strategies beside each other."""
    rows = [f"| key | {' | '.join(BUILT_IN)} |", "|---" * (len(BUILT_IN) + 1) + "|"]
    for key in StrategyConfig.__struct_fields__:
        rows.append(f"| `{key}` | {' | '.join(_figure(getattr(each, key)) for each in BUILT_IN.values())} |")
    return "\n".join(rows) + "\n"


def _figure(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value and isinstance(value, list) and isinstance(value[0], str):
        return ", ".join(value)
    if isinstance(value, list):
        return ", ".join(f"{step.share:.0%} for {step.seconds:g} s" for step in value) or "none: all at once"
    if isinstance(value, msgspec.Struct):
        plain = type(value)()
        changed = {key: new for key, new in msgspec.structs.asdict(value).items() if new != getattr(plain, key)}
        return ", ".join(f"`{key}` {_figure(new)}" for key, new in changed.items()) or "as it is"
    return f"{value:g}"


# --- migrations


# What a host finds out by itself in a state, as an input of its machine. Where it leads is asked of the machine.
FOUND: list[tuple[State, str, Input]] = [
    (State.PREPARING, "every check passed", PrepareEnded("m", True, digest="d")),
    (State.PREPARING, "a check failed", PrepareEnded("m", False, check="c", reason="r")),
    (State.DRILLING, "within the promise", DrillEnded(True)),
    (State.DRILLING, "not within the promise", DrillEnded(False)),
    (State.STARTING, "healthy, and its contract covers the old one's", Healthy("i")),
    (State.SHADOWING, "enough compared, or the time is over", ShadowEnded("m", True, "")),
    (State.HANDING_OVER, "the candidate has it, and the requests", HandedOver("m", True)),
    (State.HANDING_OVER, "it has not, or it was a copy", HandedOver("m", False)),
    (State.ROLLING_BACK, "the old revision answered", Verified("m", True, 2.0, 1.0)),
    (State.ROLLING_BACK, "it did not, and is started again", Verified("m", False, 2.0, 1.0, "r")),
    (State.ROLLING_BACK, "level 2 failed, and the candidate is healthy", Tick()),
    (State.KEPT, "the old revision answered", Verified("m", True, 2.0, 1.0)),
    (State.KEPT, "the candidate ended, or an operator asks again", Gone("i", "process-died", "r", 1.0)),
]


HAND_OVER = commands.HandOver(
    migration="m", agent="a", epoch=1, deadline=1.0, route=True, promise_s=5.0, lease_s=6.0
)  # fmt: skip


def slot_diagram() -> str:
    """The slot machine: the table of steps, what the host finds out, and the way back from everywhere."""
    lines = ["[*] --> serving"]
    lines += [f"{_id(before)} --> {_id(after)}: {step}" for (before, step), after in STEPS.items()]
    lines.append("starting --> live: healthy, in the place of the old one (cold)")
    for before, what, given in FOUND:
        slot = Slot("h", Row("a", "p", "d", candidate="c", state=before, migration="m", epoch=1))
        slot.candidate, slot.permanent, slot.permanent_up = "i", "o", True
        slot._hand_over_asked = HAND_OVER
        slot.candidate_up = before in (State.ROLLING_BACK, State.KEPT)
        if before in (State.ROLLING_BACK, State.KEPT):
            rung = Rung.KEPT if before is State.KEPT else Rung.CODE
            slot.ascent = Ascent.begin(Breach(by="b", reason="r"), rung, Moment(1.0, 1.0))
            slot.ascent.keepable = True
        slot.handle(given, Moment(100.0 if isinstance(given, Tick) else 1.0, 1.0))
        lines.append(f"{_id(before)} --> {_id(slot.row.state)}: {what}")
    lines += [f"{_id(state)} --> rolling_back: roll back" for state in State if state in ON_TRIAL]
    return _diagram(lines, State)


def rollback_levels() -> str:
    """The levels with their times, and what each sign leads to."""
    restores = {
        Rung.ROUTE: "the requests go to the old process, which still runs",
        Rung.CODE: "the old revision is started again from the store",
        Rung.HOST: "every other slot of the host returns to its permanent revision, too",
        Rung.BACKUP: "code and state come from the newest verified backup; then as level 2",
    }
    rows = ["| level | restores | within | or, if reached late, after | then |", "|---|---|---|---|---|"]
    for rung, what in restores.items():
        then = NEXT[rung]
        word = f"level {then.value}" if then in WITHIN_S else "somebody is paged; it is tried on, every 30 s"
        word += ", or *kept*" if rung is Rung.CODE else ""
        rows.append(
            f"| {rung.value} {rung.name.lower()} | {what} | {WITHIN_S[rung]:g} s | {LEAST_S[rung]:g} s | {word} |"
        )
    signs = sorted({sign for _, sign in LADDER}, key=lambda sign: list(type(sign)).index(sign))
    rows += ["", "| | " + " | ".join(signs) + " |", "|---|" + "---|" * len(signs)]
    for rung in Rung:
        cells = ["" if LADDER[rung, sign] is Turn.WAIT else str(LADDER[rung, sign]) for sign in signs]
        rows.append(f"| *{rung.name.lower()}* | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def token_diagram() -> str:
    """The token machine: its table."""
    lines = ["[*] --> free", *(f"{old} --> {new}: {what}" for (old, what), new in token_machine.TRANSITIONS.items())]
    return _diagram(lines, token_machine.Phase)


def migration_diagram() -> str:
    """The migration machine: its table."""
    arrows: dict[tuple[Phase, Phase], list[str]] = {}
    for (old, what), new in TRANSITIONS.items():
        if new is not None:
            arrows.setdefault((old, new), []).append(what)
    lines = [f"{_id(old)} --> {_id(new)}: {', '.join(arrows[old, new])}" for old, new in sorted(arrows)]
    return _diagram(["[*] --> running", *lines, "ended --> [*]"], Phase)


def migration_table() -> str:
    """The same table, whole: every event in every phase."""
    rows = [f"| event | {' | '.join(Phase)} |", "|---" * (len(Phase) + 1) + "|"]
    for event in EVENTS:
        cells = [_becomes(phase, TRANSITIONS[phase, event]) for phase in Phase]
        rows.append(f"| {event} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _becomes(phase: Phase, to: Phase | None) -> str:
    return "-" if to is None else "stays" if to is phase else to


def _id(state: str) -> str:
    return str(state).replace("-", "_")


def _diagram(lines: list[str], names: Any) -> str:
    renamed = [f'state "{name}" as {_id(name)}' for name in names if "-" in name]
    return "\n".join(["```mermaid", "stateDiagram-v2", *(f"    {line}" for line in [*renamed, *lines]), "```", ""])


def stages() -> str:
    """The steps of the strategies, as the plan has them."""
    rows = [f"| stage | the host is asked to | {' | '.join(BUILT_IN)} |", "|---" * (len(BUILT_IN) + 2) + "|"]
    planned = [plan(each, start_timeout_s=30.0) for each in BUILT_IN.values()]
    kinds = {(step.stage, step.step, step.share) for steps in planned for step in steps}
    for stage, step, share in sorted(
        kinds, key=lambda kind: (list(Stage).index(kind[0]), _ORDER.index(kind[1]), kind[2])
    ):
        cells = [
            [one for one in steps if (one.stage, one.step, one.share) == (stage, step, share)] for steps in planned
        ]
        words = f"`{step}`" + (f" {share:.0%}" if share else "")
        rows.append(f"| {stage} | {words} | {' | '.join(_lasts(same[0]) if same else 'left out' for same in cells)} |")
    return "\n".join(rows) + "\n"


_ORDER = get_args(commands.Step)


def _lasts(step: Any) -> str:
    return f"yes, then {step.dwell_s:g} s of watching" if step.dwell_s else "yes"


# --- rules


def rule_table() -> str:
    """The default rules."""
    rows = ["| rule | group | holds when | for | action |", "|---|---|---|---|---|"]
    for rule in default_rules():
        expr = " ".join(rule.text.split()).replace("|", "\\|")
        lasts = f"{rule.for_s:g} s" if rule.for_s else ""
        rows.append(f"| `{rule.name}` | {rule.group} | `{expr}` | {lasts} | {rule.action} |")
    return "\n".join(rows) + "\n"


def rule_language() -> str:
    """What an expression may be made of."""
    elementwise = [*operators.ELEMENTWISE, *operators.OTHER_FUNCTIONS]
    groups = {
        "operators": [*operators.ARITHMETIC, *operators.COMPARISONS, *operators.SETS],
        "aggregations, with `by` and `without`": operators.AGGREGATIONS,
        "functions of a window, such as `rate(x[1m])`": operators.WINDOWED,
        "other functions": elementwise,
        "in texts: `{{ $value | NAME }}`": [*template._FUNCTIONS, "printf"],
    }
    rows = ["| | |", "|---|---|"]
    rows += [f"| {what} | {', '.join(f'`{name}`' for name in names)} |" for what, names in groups.items()]
    return "\n".join(rows) + "\n"


# --- the demo


def demo() -> str:
    """docs/demo-report.json, which `interlock demo --report docs/demo-report.json` wrote."""
    report = json.loads((DOCS / "demo-report.json").read_text("utf-8"))
    rows = ["| move | outcome | decided by | reaction | restored | requests | failed | longest gap |"]
    rows += ["|---|---|---|---|---|---|---|---|"]
    for entry in report["scenarios"]:
        cells = [
            f"{entry['agent']} {entry['from']} to {entry['to']} ({entry['name']})",
            entry["outcome"],
            entry["decided_by"],
            _ms(entry["breach_to_event_ms"]),
            _ms(entry["breach_to_restored_ms"]),
            str(entry["requests"]),
            str(entry["failed_requests"]),
            _ms(entry["longest_gap_ms"]),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    settings = report["settings"]
    apart = " and ".join(f"{period:.0f} ms ({name})" for name, period in settings["client_period_ms"].items())
    said = (
        f"Sampled every {settings['sampling_period_ms']:g} ms. Each client asks every {apart}: no gap can be smaller."
    )
    return "\n".join([*rows, "", said, ""])


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} ms" if value >= 10 else f"{value:.1f} ms"


def gpu_table() -> str:
    """Every metric of a GPU, as the monitor's own table has it."""
    rows = ["| metric | labels | unit | meaning | source | |", "|---|---|---|---|---|---|"]
    for name, metric in gpu_metrics.METRICS.items():
        also = ", ".join(metric.labels) or ("only `host`" if metric.of_host else "")
        rows.append(f"| `{name}` | {also} | {metric.unit} | {metric.help} | {metric.source} | {metric.tier} |")
    return "\n".join(rows) + "\n"


def gpu_faults_table() -> str:
    """Every kind of fault of a GPU: whose it is, and what ends it."""
    rows = ["| kind | cause | what ends it |", "|---|---|---|"]
    rows += [f"| `{name}` | {kind.cause} | {kind.recovery} |" for name, kind in gpu_faults.KINDS.items()]
    return "\n".join(rows) + "\n"


# --- risk


def risk_factors() -> str:
    """The first matrix."""
    found = {
        "no_base": "class bases, resolved over files",
        "sockets": "calls that make or bind sockets of zmq, socket, asyncio, trio, HTTP and RPC servers",
        "threads": "threading, multiprocessing, concurrent.futures, subprocess, executors",
        "health": "routes, words and functions that answer or watch health; overriding the base class's hook is none",
        "long": f"more than {assess_settings.Settings().long_lines} lines that are neither blank nor comment",
        "large": f"more than {assess_settings.Settings().large_bytes // assess_settings.KB} KiB",
        "database": "calls of sqlite3, redis, psycopg, sqlalchemy, mysql, mongo and others",
        "config": "yaml, toml, ini and dotenv loads; json loads of what is named as a configuration",
    }
    rows = ["| factor | | points | found as |", "|---|---|---|---|"]
    for name, meaning in scoring.FACTORS.items():
        points = getattr(assess_settings.Points(), name)
        rows.append(f"| `{name}` | {meaning} | {points} | {found[name]} |")
    return "\n".join(rows) + "\n"


def risk_levels() -> str:
    """The bounds of the levels, and the strategy that each is due."""
    rows = ["| score | level | strategy that is due |", "|---|---|---|"]
    bounds = msgspec.structs.asdict(assess_settings.Bounds())
    low = 0
    for level in assess_settings.LEVELS:
        high = bounds.get(level)
        rows.append(f"| {low} to {high} | {level} | " if high is not None else f"| {low} and more | {level} | ")
        rows[-1] += f"`{strategy_tables.STRATEGY_OF[level]}` |"
        low = (high or 0) + 1
    return "\n".join(rows) + "\n"


def risk_weights() -> str:
    """The second matrix."""
    sizes = [f"below {bound // assess_settings.KB} KiB {value}" for bound, value in scoring.SIZES]
    values = {
        "size": ", ".join([*sizes, f"above {scoring.SIZE_ABOVE}"]),
        **{
            name: ", ".join(f"{word} {value}" for word, value in table.items())
            for name, table in (
                ("gpu", scoring.GPU), ("threading", scoring.THREADING), ("databases", scoring.DATABASES),
                ("criticality", scoring.CRITICALITY),
            )
        },
    }  # fmt: skip
    rows = ["| what | weight | values |", "|---|---|---|"]
    rows += [f"| {name} | {weight:.2f} | {values[name]} |" for name, weight in scoring.WEIGHTS.items()]
    return "\n".join(rows) + "\n"


PARTS: dict[str, Callable[[], str]] = {
    "gpu-metrics": gpu_table,
    "gpu-faults": gpu_faults_table,
    "risk-factors": risk_factors,
    "risk-levels": risk_levels,
    "risk-weights": risk_weights,
    "demo": demo,
    "fleet-file": fleet_file,
    "strategies": strategies,
    "stages": stages,
    "slot": slot_diagram,
    "rollback-levels": rollback_levels,
    "token": token_diagram,
    "migration": migration_diagram,
    "migration-table": migration_table,
    "default-rules": rule_table,
    "rule-language": rule_language,
    **wire_parts.PARTS,
}


def parts() -> Iterator[tuple[Path, str, str]]:
    """(page, name, text) of each generated part."""
    for page in PAGES:
        for found in PART.finditer(page.read_text("utf-8")):
            yield page, found[1], found[2]


def write() -> None:
    for page in PAGES:
        text = page.read_text("utf-8")
        made = PART.sub(lambda found: f"<!-- generated: {found[1]} -->\n{PARTS[found[1]]()}<!-- end -->", text)
        if made != text:
            page.write_text(made, "utf-8")
            print(f"written: {page.relative_to(ROOT)}")


# --- the tests


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"(?ms)^```{language}[^\n]*\n(.*?)^```$", page.read_text("utf-8"))


def test_each_generated_part_stands_in_one_place_and_is_what_the_code_says_now() -> None:
    found = list(parts())
    assert sorted(name for _, name, _ in found) == sorted(PARTS)
    for page, name, text in found:
        assert text == PARTS[name](), f"{page.name}: {name} is old; run: python tests/test_docs.py"


def test_the_reference_has_a_table_for_every_class_of_the_fleet_file() -> None:
    classes = {cls.__name__ for cls in strategy_tables._Config.__subclasses__()}
    assert set(TABLES.values()) == classes


def test_every_toml_block_of_the_docs_is_part_of_a_fleet_file() -> None:
    whole = {"hosts": {"alpha": {"control": "tcp://127.0.0.1:7180"}}}
    for block in blocks(DOCS / "fleet-file.md", "toml"):
        parse_fleet({**whole, **tomllib.loads(block)})


def test_the_settings_that_the_page_on_risk_shows_are_those_that_hold() -> None:
    (block,) = blocks(DOCS / "assessing.md", "toml")
    shown = assess_settings.parse_settings(block, where="docs/assessing.md")
    changed = {"exclude": (), "base_classes": assess_settings.BASES}
    assert msgspec.structs.replace(shown, **changed) == assess_settings.Settings()


def test_every_yaml_block_of_the_rules_page_is_a_rule_file() -> None:
    found = blocks(DOCS / "rules.md", "yaml")
    assert found
    rules: list[Rule] = [rule for block in found for rule in parse_rules(block, file="docs/rules.md")]
    assert {rule.action for rule in rules} == {"rollback", "hold", "notify"}


def test_what_the_rules_page_calls_unsupported_is_refused() -> None:
    text = (DOCS / "rules.md").read_text("utf-8")
    expressions = re.findall(r"(?m)^- .*?: `(.+?)`$", text.split("## Not supported", 1)[1])
    assert len(expressions) >= 1
    for expression in expressions:
        with pytest.raises(ConfigError, match="not supported"):
            language.parse(expression)


ENTRY = (
    "name", "agent", "from", "to", "outcome", "decided_by", "breach_to_event_ms", "breach_to_restored_ms", "requests",
    "failed_requests", "longest_gap_ms",
)  # fmt: skip


def test_the_report_of_the_demo_is_of_the_scenarios_that_it_plays() -> None:
    report = json.loads((DOCS / "demo-report.json").read_text("utf-8"))
    played = [(entry["name"], entry["outcome"], entry["failed_requests"]) for entry in report["scenarios"]]
    assert {tuple(entry) for entry in report["scenarios"]} == {ENTRY}
    assert played == [(scenario.name, scenario.expected, 0) for scenario in SCENARIOS]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"(?ms)^```.*?^```$", "", page.read_text("utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(there), f"{page.name}: {target}"


def anchors(page: Path) -> set[str]:
    """As the usual renderers make them: lower case, punctuation dropped, spaces as dashes."""
    text = re.sub(r"(?ms)^```.*?^```$", "", page.read_text("utf-8"))
    titles = re.findall(r"(?m)^#+ (.+)$", text)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_readme_names_every_page() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert [page.name for page in DOCS.glob("*.md") if f"docs/{page.name}" not in text] == []


def test_the_picture_is_well_formed_and_loads_nothing() -> None:
    root = ElementTree.parse(DOCS / "architecture.svg").getroot()
    assert root.tag.endswith("svg")
    for element in root.iter():
        for value in element.attrib.values():
            assert "href" not in element.attrib
            assert value.startswith("url(#") or "url(" not in value


def test_no_page_names_a_place_of_one_machine() -> None:
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=False)
    pages = {ROOT / name for name in listed.stdout.split()} | set(PAGES)
    for page in pages:
        assert not re.search(r"(?<![\w.])/(work|root|home)/", page.read_text("utf-8")), page.name


if __name__ == "__main__":
    write()
