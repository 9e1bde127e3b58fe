"""The options of verbs that have many. Imports nothing that a verb needs only when it runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args, get_type_hints

from interlock.broker.commands import WaveOrder
from interlock.broker.config import AgentConfig
from interlock.broker.strategies import BUILT_IN, STRATEGY_OF

ORDERS: tuple[str, ...] = get_args(WaveOrder)
CATEGORIES: tuple[str, ...] = get_args(get_type_hints(AgentConfig)["category"])
OUTCOMES = ("committed", "rolled-back", "held", "refused", "failed", "in-flight")
SORTS = ("name", "cpu", "memory", "gpu", "requests")
REPORTS = {
    "report": "all that is known of a migration: stages, checks, who decided, the rollback's times",
    "explain": "why a migration went as it did: the events, samples and the rule that decided",
    "history": "the migrations that were, with their outcomes",
}
STEERING = {
    "approve": "let the next stage of an agent's migration begin",
    "pause": "let an agent's migration stand as it is for a while",
    "resume": "let an agent's migration go on that is paused or held",
    "hold": "stop an agent's migration where it is, until somebody has looked",
    "abort": "end an agent's migration, and put the old revision back",
    "commit": "end the observation of an agent's migration now, and make its revision permanent",
}


def whole_number(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def migrate_options(one: argparse.ArgumentParser) -> None:
    """Of migrate and plan."""
    one.add_argument("agent", metavar="AGENT")
    one.add_argument("--to", required=True, metavar="REVISION")
    chosen = one.add_mutually_exclusive_group()
    chosen.add_argument("--strategy", choices=list(BUILT_IN), help="instead of the one that is due")
    chosen.add_argument("--level", choices=list(STRATEGY_OF), help="the same, by the level of risk it is for")
    one.add_argument("--host", default="", metavar="HOST", help="move it there; default: it stays where it is")
    one.add_argument(
        "--accept", choices=["cold", "hand-over"], default="", help="a slower class of rollback, where no other will do"
    )
    one.add_argument(
        "--because", default="", metavar="TEXT",
        help="why with less care than is due, in a freeze, or though the old one is sick; it is recorded",
    )  # fmt: skip


def drill_options(one: argparse.ArgumentParser) -> None:
    one.add_argument("agent", metavar="AGENT")
    one.add_argument("--host", action="store_true", help="level 3 too: a second process of every agent of its host")


def steer_options(one: argparse.ArgumentParser, name: str) -> None:
    """Of the verbs in STEERING."""
    one.add_argument("agent", metavar="AGENT")
    why = "needed as long as the observation has not passed; it is recorded" if name == "commit" else "for the record"
    one.add_argument("--because", default="", metavar="TEXT", help=why)


def report_options(one: argparse.ArgumentParser, name: str) -> None:
    """Of report, explain and history."""
    what = "AGENT" if name == "history" else "AGENT|MIGRATION"
    help = "only of this agent" if name == "history" else "an agent's last, or one by its id (default: the last of all)"
    one.add_argument("name", metavar=what, nargs="?", default="", help=help)
    if name == "history":
        one.add_argument("--since", metavar="TIME", help="begun since: 10m (ago), 2026-01-31T12:00, seconds since 1970")
        one.add_argument("--outcome", choices=OUTCOMES, default="", help="only those that ended like this")
        return
    one.add_argument("--file", type=Path, metavar="RECORD.json", help="a record instead of the fleet's log")
    if name == "report":
        one.add_argument("--html", type=Path, metavar="FILE", help="write it as a page, with the series drawn")


def wave_options(parser: argparse.ArgumentParser, common: argparse.ArgumentParser) -> None:
    acts = parser.add_subparsers(dest="act", metavar="ACTION", required=True)

    def act(name: str, help: str) -> argparse.ArgumentParser:
        return acts.add_parser(name, help=help, description=help, parents=[common])

    start = act("start", "move many agents, and follow them to the end")
    target = start.add_mutually_exclusive_group(required=True)
    target.add_argument("--to", metavar="REVISION", help="of all that have it and are chosen by the next three")
    target.add_argument("--plan", type=Path, metavar="FILE", help="TOML with [revisions], by agent")
    start.add_argument("--agents", default="", metavar="A,B,...", help="only these")
    start.add_argument("--category", choices=CATEGORIES, help="only those of this category")
    start.add_argument("--host", metavar="HOST", help="only those of this host")
    start.add_argument("--order", choices=ORDERS, help="dependency (default): after all that it depends on")
    start.add_argument("--parallel", type=int, metavar="N", help="so many at once (default 1)")
    start.add_argument("--budget", metavar="N|P%", help="so many may fail; one more, and all go back (default 0)")
    chosen = start.add_mutually_exclusive_group()
    chosen.add_argument("--strategy", choices=list(BUILT_IN), help="instead of the one that is due to each")
    chosen.add_argument("--level", choices=list(STRATEGY_OF), help="the same, by the level of risk it is for")
    start.add_argument("--because", default="", metavar="TEXT", help="why with less care than is due, or in a freeze")
    start.add_argument("--detach", action="store_true", help="return as soon as it has begun")
    status = act("status", "where a wave stands, agent by agent")
    stop = act("stop", "begin no further migration of a wave; --undo: move all of it back")
    for one in (status, stop):
        one.add_argument("name", nargs="?", default="", metavar="WAVE", help="default: the one in flight")
    stop.add_argument("--undo", action="store_true", help="roll back what is in flight, move back what was moved")
    stop.add_argument("--because", default="", metavar="TEXT", help="for the record")
    act("list", "the waves that were")


def watch_options(watch: argparse.ArgumentParser) -> None:
    watch.add_argument("--events", action="store_true", help="only what happens")
    watch.add_argument("--telemetry", action="store_true", help="only measurements")
    watch.add_argument("--after", type=whole_number, metavar="N", help="events from number N of the log on (0: all)")
    watch.add_argument("prefix", nargs="*", metavar="PREFIX", help="of topics, for example fact/migration/")


def top_options(top: argparse.ArgumentParser) -> None:
    top.add_argument("--once", action="store_true", help="one picture, and end (so it is where there is no terminal)")
    top.add_argument("--host", action="append", default=[], metavar="HOST", help="only this one; may be repeated")
    top.add_argument(
        "--sort", choices=SORTS, default="name", help="of the agents: the largest first (default: by name)"
    )


def log_options(log: argparse.ArgumentParser) -> None:
    log.add_argument(
        "act", nargs="?", choices=["list", "follow", "export", "verify"], default="list",
        help="list: the newest; follow: all and what comes; export: all as JSON lines; verify: its hash chain",
    )  # fmt: skip
    log.add_argument("--file", type=Path, metavar="PATH", help="a log file instead of the fleet's broker; only read")
    log.add_argument("--topic", action="append", default=[], metavar="PREFIX", help="only topics that start with it")
    log.add_argument("--type", action="append", default=[], metavar="NAME", help="only this type, such as rolled-back")
    log.add_argument("--agent", default="", metavar="AGENT", help="only what concerns this agent")
    log.add_argument("--since", metavar="TIME", help="logged since: 10m (ago), 2026-01-31T12:00, seconds since 1970")
    log.add_argument("--until", metavar="TIME", help="logged until")
    log.add_argument("--after", type=whole_number, default=0, metavar="N", help="only numbers above N")
    log.add_argument("--limit", type=whole_number, metavar="N", help="list: at most so many, the newest (default 50)")
    log.add_argument("--expect", default="", metavar="N:HASH", help="verify: a head that was printed earlier")


def keys_options(parser: argparse.ArgumentParser, common: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, help: str) -> argparse.ArgumentParser:
        return actions.add_parser(name, help=help, description=help, parents=[common])

    action("init", "make the authority, and keys for everybody whom the fleet file names")
    issue = action("issue", "keys for one more: broker, coordinator, rules, host, monitor, operator or subscriber")
    issue.add_argument("role", metavar="ROLE")
    issue.add_argument("name", metavar="NAME", nargs="?", default="")
    issue.add_argument("--topic", action="append", default=[], metavar="PREFIX", help="what a subscriber may hear")
    action("list", "everybody who belongs, or did")
    revoke = action("revoke", "end the keys of one: at once, on open connections too")
    rotate = action("rotate", "new keys for one; the old ones end at once")
    for one in (revoke, rotate):
        one.add_argument("identity", metavar="NAME", help="for example host/alpha, or alpha if only one is called so")
    for one in (issue, rotate):
        one.add_argument("--out", type=Path, metavar="FILE", help="an enrolment file to carry to where it runs")
    install = action("install", "take over an enrolment file that was made where the authority is")
    install.add_argument("file", type=Path, metavar="FILE")


def assess_options(assess: argparse.ArgumentParser) -> None:
    assess.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="folders or files")
    assess.add_argument("--config", type=Path, metavar="FILE", help="TOML: excludes, points, bounds, base classes")
    assess.add_argument("--exclude", action="append", default=[], metavar="NAME", help="leave out; * and ? are known")
    assess.add_argument("--base", action="append", default=[], metavar="CLASS", help="one more agent base class")
    assess.add_argument("--details", action="store_true", help="each place that shows a factor")
    assess.add_argument("--html", type=Path, metavar="FILE", help="write it as a page, too")
    assess.add_argument("--sarif", type=Path, metavar="FILE", help="write it as SARIF, for editors and code hosts")
    assess.add_argument(
        "--fail-above", choices=list(STRATEGY_OF), metavar="LEVEL",
        help="exit with 13 if an agent's level is higher, or it can't be migrated",
    )  # fmt: skip
    assess.add_argument("--workers", type=whole_number, default=0, metavar="N", help="processes (default: the cores)")


def import_options(one: argparse.ArgumentParser) -> None:
    one.add_argument("list", type=Path, metavar="STARTUP.yaml", help="which scripts run, on which ports")
    one.add_argument("--out", type=Path, metavar="FLEET.toml", help="write it there (default: standard output)")
    one.add_argument("--force", action="store_true", help="overwrite a file that is there")
    one.add_argument(
        "--root", type=Path, metavar="FOLDER", help="where the scripts' paths start (default: is looked for)"
    )
    one.add_argument("--name", default="fleet", metavar="NAME", help="of the fleet")
    one.add_argument("--host", default="main", metavar="NAME", help="of the host that all of them run on")
    one.add_argument("--address", default="127.0.0.1", help="where clients reach the agents (0.0.0.0: from anywhere)")
    one.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a variable of the list; else the environment's",
    )


def rules_options(rules: argparse.ArgumentParser, common: argparse.ArgumentParser) -> None:
    """Without an action, `rules` is the role."""
    which = "which of the rule engines that share the fleet ([rules] partitions) this one is"
    rules.add_argument("--partition", type=whole_number, default=0, metavar="N", help=which)
    acts = rules.add_subparsers(dest="act", metavar="ACTION", required=False)

    def act(name: str, help: str) -> argparse.ArgumentParser:
        return acts.add_parser(name, help=help, description=help, parents=[common])

    check = act("check", "what is wrong with rule files, what never fires, which tier each rule is in, and its cost")
    check.add_argument("files", nargs="+", metavar="FILE", help='rule files; "default", "categories": those that ship')
    check.add_argument("--strict", action="store_true", help="warnings count as errors")
    check.add_argument("--agents", type=whole_number, metavar="N", help="estimate the cost for so many agents")
    check.add_argument("--hosts", type=whole_number, metavar="N", help="on so many hosts (default: as the fleet file)")
    test = act("test", "run promtool's unit-test files against our engine")
    test.add_argument("files", nargs="+", type=Path, metavar="FILE")
    evaluate = act("eval", "the value of an expression, as the rule engine that runs has it, or of a recording")
    evaluate.add_argument("expression", metavar="EXPR")
    replay = act("replay", "what rules would have done on a recorded day: each transition with its time")
    replay.add_argument("recording", type=Path, metavar="RECORDING", help="what interlock watch --json printed")
    explain = act("explain", "why an alert fires or not: each part of its expression, the samples, since when")
    explain.add_argument("alert", metavar="ALERT")
    for one in (evaluate, explain):
        which = "ask this one of the rule engines that share the fleet"
        one.add_argument("--partition", type=whole_number, default=1, metavar="N", help=which)
        listen = "compute it here from what the bus brings, instead of asking the rule engine that runs"
        one.add_argument("--listen", action="store_true", help=listen)
        one.add_argument("--file", type=Path, metavar="RECORDING", help="what interlock watch --json printed")
        when = "at this time (default: now, of a recording its end; explain: the last firing)"
        one.add_argument("--time", metavar="TIME", help=when)
    for one in (replay, explain):
        whose = "instead of those of the fleet file, or those that ship; may be repeated"
        one.add_argument("--rules", action="append", default=[], metavar="FILE", help=whose)
    conformance = act("conformance", "run Prometheus' own test scripts (promqltest) against our engine; JSON")
    conformance.add_argument("files", nargs="+", type=Path, metavar="FILE")
    conformance.add_argument(
        "--failures", action="store_true", help="what differs or is unsupported, on standard error"
    )
