"""The command `interlock`.

Exit codes: 0 done (of migrate: committed), 10 rolled back, 11 held, 12 refused, 13 failed, 2 a wrong option or fleet
file, 3 no answer from the broker, the coordinator or a host, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from interlock.broker.config import FleetConfig, load_fleet
from interlock.broker.errors import ConfigError, InterlockError, Refused, Unreachable
from interlock.broker.interrupt import raise_again
from interlock.broker.role import run_role
from interlock.coordinator.options import (
    REPORTS,
    STEERING,
    assess_options,
    drill_options,
    import_options,
    keys_options,
    log_options,
    migrate_options,
    report_options,
    rules_options,
    steer_options,
    top_options,
    watch_options,
    wave_options,
)
from interlock.coordinator.terminal import EXIT_INTERRUPTED, Output, mute, note, on_bus, say_json

if TYPE_CHECKING:  # a verb imports what it needs when it runs, so that `--version` and `--help` answer at once
    from interlock.broker.bus import Bus

FLEET = "INTERLOCK_FLEET"  # the environment variable that names the fleet file
DEFAULT_FLEET = "fleet.toml"
TIMEOUT_S = 10.0  # for an answer of the broker or the coordinator; both answer within milliseconds when they are well
MAX_TIMEOUT_S = 86_400.0  # a day: a longer wait is a slip of the finger
EXIT_USAGE, EXIT_SILENT, EXIT_REFUSED = 2, 3, 12

# Roles that live in other packages, which the coordinator doesn't import: verb -> (module, what it is).
ELSEWHERE = {
    "broker": ("interlock.broker", "run the broker in this process"),
    "host": ("interlock.agents", "run a host in this process: agents and their gateways (--name HOST)"),
    "monitor": (
        "interlock.monitors",
        "run a monitor of a host in this process (--host HOST), or an action on GPUs",
    ),
    "check": ("interlock.agents.check_verb", "start a class agent in a sandbox, and say what is not ready to be moved"),
    "backup": ("interlock.agents.backup_verb", "list, verify or restore the backups of this machine's hosts"),
}
TOOLS = {"backup", "check"}  # of these, what is no role: it ends by itself
TAKE_JSON = TOOLS | {"monitor"}


class WrongUsage(SystemExit):
    def __init__(self, what: str) -> None:
        super().__init__(EXIT_USAGE)
        self.what = what


class Parser(argparse.ArgumentParser):
    """Suggests the nearest verb. Raises WrongUsage after it was said."""

    def error(self, message: str) -> NoReturn:
        found = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if found:
            near = difflib.get_close_matches(found[1], re.findall(r"[\w-]+", found[2]), n=1)
            message = f"{found[1]!r} is none of: {found[2]}" + (f"; did you mean {near[0]!r}?" if near else "")
        try:
            super().error(message)
        except SystemExit:
            raise WrongUsage(message) from None


def parser() -> Parser:
    # suppressed defaults: an option before the verb is not overwritten by its absence after it
    common = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument(
        "--fleet", type=Path, metavar="FILE", help=f"the fleet file (default ${FLEET} or {DEFAULT_FLEET})"
    )
    common.add_argument("--json", action="store_true", help="the result as one JSON object (watch: one a line)")
    common.add_argument(
        "--timeout", type=_seconds, metavar="S", help=f"for an answer, in seconds (default {TIMEOUT_S:g})"
    )
    common.add_argument(
        "--insecure", action="store_true", help="without keys: anybody on this machine may command (loopback only)"
    )
    top = Parser(
        prog="interlock",
        description="Moves live AI agents to new revisions, and rolls a bad one back by itself.",
        parents=[common],
        epilog="exit codes: 0 done or committed, 10 rolled back, 11 held, 12 refused, 13 failed, 2 wrong usage or "
        "fleet file, 3 no answer, 130 interrupted, 143 terminated",
    )
    top.add_argument("--version", action="version", version=f"interlock {version('interlock')}")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", parser_class=Parser, required=True)

    def verb(name: str, help: str) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=help, description=help, parents=[common])

    migrate_options(verb("plan", "what a migration would do, what it promises, and whether it would be refused now"))
    migrate = verb("migrate", "move an agent to another revision, and follow it to its outcome")
    migrate_options(migrate)
    migrate.add_argument("--detach", action="store_true", help="return as soon as it has begun")
    rollback = verb("rollback", "undo an agent's migration in flight")
    rollback.add_argument("agent", metavar="AGENT")
    rollback.add_argument("--reason", default="asked by an operator", metavar="TEXT")
    drill_options(verb("drill", "rehearse the rollback of an agent with real processes, and measure it"))
    for name, help in STEERING.items():
        steer_options(verb(name, help), name)
    wave_options(verb("wave", "move many agents together, within a failure budget"), common)
    for name, help in REPORTS.items():
        report_options(verb(name, help), name)
    ping = verb("ping", "ask hosts whether commands reach them, and how fast")
    ping.add_argument("host", nargs="*", metavar="HOST", help="only these (default: all at once)")
    verb("status", "hosts, agents, migrations in flight and firing alerts")
    top_options(verb("top", "hosts, GPUs and agents as they are now, again and again"))
    watch_options(verb("watch", "follow what happens on the bus"))
    log_options(verb("log", "what is in the event log: list, follow, export or verify it"))
    keys_options(verb("keys", "who belongs to the fleet: issue, revoke and rotate keys"), common)
    assess_options(verb("assess", "find the agents in source trees, and how risky each is to move"))
    import_options(verb("import", "turn a start-up list of scripts into a fleet file"))
    verb("asyncapi", "print the AsyncAPI 3 document of the bus, for programs in other languages")
    verb("shell", "a prompt with these verbs")
    up = verb("up", "run every role of a fleet on this machine")
    up.add_argument("path", nargs="?", type=Path, metavar="FLEET.TOML")
    up.add_argument("--ready-file", type=Path, metavar="PATH", help="written when all roles are ready, for scripts")
    demo = verb("demo", "watch a migration succeed, and a bad one roll itself back")
    demo.add_argument("--report", type=Path, metavar="FILE", help="what was measured, as JSON")
    demo.add_argument("--keep", action="store_true", help="leave the demo's folder in place")
    verb("coordinator", "run the coordinator in this process")
    rules_options(verb("rules", "run the rule engine in this process; or an action on rules"), common)
    for name, (_, help) in ELSEWHERE.items():
        verbs.add_parser(name, help=help, add_help=False, parents=[common])
    return top


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= MAX_TIMEOUT_S:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time in seconds above 0, at most {MAX_TIMEOUT_S:g}")
    return seconds


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code. Returns from everything but a role of another package, which takes this process over."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parser()
    try:
        chosen, rest = options.parse_known_args(arguments)
        if rest and chosen.verb not in ELSEWHERE:
            options.error(f"unrecognized arguments: {' '.join(rest)}")
    except WrongUsage as wrong:
        if "--json" in arguments:
            say_json({"outcome": "error", "reason": wrong.what, "where": "arguments", "hint": "see --help"})
        return EXIT_USAGE
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else EXIT_USAGE
    chosen.json = getattr(chosen, "json", False)
    if getattr(chosen, "insecure", False):
        os.environ["INTERLOCK_INSECURE"] = "1"  # for the roles that are started from here, too
    chosen.timeout = getattr(chosen, "timeout", TIMEOUT_S)
    chosen.fleet = getattr(chosen, "fleet", None) or Path(os.environ.get(FLEET) or DEFAULT_FLEET)
    if chosen.verb in ELSEWHERE:
        as_json = ["--json"] if chosen.json and chosen.verb in TAKE_JSON else []
        _become(chosen.verb, [*rest, *as_json, "--fleet", os.fspath(chosen.fleet)])
    return _run(chosen)


def _run(chosen: argparse.Namespace) -> int:
    code = 0
    try:
        raise_again()
        code = VERBS[chosen.verb](chosen)
        sys.stdout.flush()
    except* InterlockError as group:
        code = _complain(_first(group), as_json=chosen.json)
    except* KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except* BrokenPipeError:
        mute()  # the reader has seen enough
    return code


def _become(verb: str, arguments: Sequence[str]) -> NoReturn:
    """Replace this process by `python -m` of the role's own package. -P: the working directory is not searched."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-P", "-m", ELSEWHERE[verb][0], *_with_fleet(arguments)])


def _with_fleet(arguments: Sequence[str]) -> list[str]:
    named = any(a == "--fleet" or a.startswith("--fleet=") for a in arguments)
    asked = {"-h", "--help"} & set(arguments)
    return [*arguments, *([] if named or asked else ["--fleet", os.environ.get(FLEET) or DEFAULT_FLEET])]


def _complain(error: InterlockError, *, as_json: bool) -> int:
    if isinstance(error, Unreachable):
        outcome, code = "unreachable", EXIT_SILENT
    elif isinstance(error, Refused):
        outcome, code = "refused", EXIT_REFUSED
    else:
        outcome, code = "error", EXIT_USAGE
    print(f"interlock: {error}", file=sys.stderr, flush=True)
    if as_json:
        say_json({"outcome": outcome, "reason": error.what, "where": error.where, "hint": error.hint})
    return code


def check_writable(path: Path, option: str) -> None:
    """ConfigError for a file that could not be written in the end: better known before the work than after it."""
    if path.is_dir() or not path.parent.is_dir():
        problem = "is a folder" if path.is_dir() else f"there is no folder {path.parent}"
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        problem = "can't be written"
    else:
        return
    raise ConfigError(problem, where=f"{option} {path}")


def _first(group: BaseExceptionGroup[InterlockError]) -> InterlockError:
    inner = group.exceptions[0]
    return _first(inner) if isinstance(inner, BaseExceptionGroup) else inner


def _migrate(chosen: argparse.Namespace) -> int:
    from interlock.coordinator import verbs

    output = Output(chosen)
    started: list[str] = []

    async def run(bus: Bus, fleet: FleetConfig) -> int:
        report = await verbs.migrate(
            bus, fleet, chosen.agent, chosen.to, strategy=chosen.strategy, level=chosen.level, accept=chosen.accept,
            because=chosen.because, host=chosen.host, timeout=chosen.timeout, detach=chosen.detach, tell=output.tell,
            note=note, begun=started.append,
        )  # fmt: skip
        output.end(report)
        return report.exit_code

    def interrupted() -> None:
        if started:
            note(f"migration {started[0]} goes on without you; to undo it: interlock rollback {chosen.agent}")
        else:
            note("interrupted before an answer came; look with: interlock status")

    return on_bus(chosen, run, on_interrupt=interrupted)


def _rollback(chosen: argparse.Namespace) -> int:
    from interlock.coordinator import verbs

    output = Output(chosen)

    async def run(bus: Bus, fleet: FleetConfig) -> int:
        report = await verbs.roll_back(
            bus, fleet, chosen.agent, reason=chosen.reason, timeout=chosen.timeout, tell=output.tell, note=note
        )
        output.end(report)
        return 0 if report.outcome == "rolled-back" else report.exit_code

    return on_bus(
        chosen, run, on_interrupt=lambda: note("the rollback goes on without you; look with: interlock status")
    )


def _drill(chosen: argparse.Namespace) -> int:
    from interlock.coordinator import drill_verb

    return drill_verb.run(chosen)


def _plan(chosen: argparse.Namespace) -> int:
    from interlock.coordinator import plan_verb

    return plan_verb.run(chosen)


def _steer(chosen: argparse.Namespace) -> int:
    from interlock.coordinator import steer_verbs

    return steer_verbs.run(chosen)


def _wave(chosen: argparse.Namespace) -> int:
    from interlock.coordinator import wave_verb

    return wave_verb.run(chosen)


def _report(chosen: argparse.Namespace) -> int:
    from interlock.coordinator import report_verb

    return report_verb.run_history(chosen) if chosen.verb == "history" else report_verb.run(chosen)


def _ping(chosen: argparse.Namespace) -> int:
    from interlock.coordinator.ping import ping
    from interlock.coordinator.screen import Screen

    async def run(bus: Bus, fleet: FleetConfig) -> int:
        roll = await ping(bus, fleet, chosen.host, timeout=chosen.timeout)
        if chosen.json:
            say_json(roll)
        else:
            Screen(sys.stdout).roll(roll)
        return roll.exit_code

    return on_bus(chosen, run, on_interrupt=lambda: None)


def _status(chosen: argparse.Namespace) -> int:
    from interlock.coordinator import verbs
    from interlock.coordinator.screen import Screen

    async def run(bus: Bus, fleet: FleetConfig) -> int:
        status = await verbs.status(bus, fleet, timeout=chosen.timeout)
        if chosen.json:
            say_json(status.to_json())
        else:
            Screen(sys.stdout).status(status)
        return 0

    return on_bus(chosen, run, on_interrupt=lambda: None)


def _top(chosen: argparse.Namespace) -> int:
    from interlock.coordinator import top

    return top.run(chosen)


def _watch(chosen: argparse.Namespace) -> int:
    from interlock.coordinator.screen import Screen
    from interlock.coordinator.watch import planes, watch

    events, telemetry = planes(chosen.prefix, events=chosen.events, telemetry=chosen.telemetry)
    if not events and not telemetry:
        raise ConfigError(
            f"no topic starts with {' or '.join(chosen.prefix)}",
            where="interlock watch",
            hint="topics start with command/, rollback/, fact/ or telemetry/",
        )

    async def run(bus: Bus, fleet: FleetConfig) -> int:
        await watch(
            bus, fleet, events, telemetry, after=chosen.after, timeout=chosen.timeout, as_json=chosen.json,
            screen=Screen(sys.stdout), note=note,
        )  # fmt: skip
        return 0

    return on_bus(chosen, run, on_interrupt=lambda: None)


def _log(chosen: argparse.Namespace) -> int:
    from interlock.coordinator import log_verb

    def with_bus(run: Callable[[Bus, FleetConfig], Awaitable[int]]) -> int:
        return on_bus(chosen, run, on_interrupt=lambda: None)

    return log_verb.run(chosen, lambda: load_fleet(chosen.fleet), with_bus)


def _assess(chosen: argparse.Namespace) -> int:
    from interlock.coordinator import assess_verb

    for option, path in (("--sarif", chosen.sarif), ("--html", chosen.html)):
        if path is not None:
            check_writable(path, option)
    return assess_verb.run(chosen)


def _import(chosen: argparse.Namespace) -> int:
    from interlock.coordinator import import_verb

    if chosen.out is not None:
        check_writable(chosen.out, "--out")
    return import_verb.run(chosen)


def _asyncapi(chosen: argparse.Namespace) -> int:
    from interlock.coordinator.asyncapi import rendered

    sys.stdout.write(rendered())
    return 0


def _shell(chosen: argparse.Namespace) -> int:
    from interlock.coordinator.ids import read_ids
    from interlock.coordinator.shell import Shell

    shell = Shell(load_fleet(chosen.fleet), chosen.fleet, _run_line, read_ids)
    shell.cmdloop()
    return shell.exit_code


def _run_line(words: list[str]) -> int:
    """A verb of the shell: one of another package in a process of its own, as it would replace the shell's."""
    if words[0] not in TOOLS:
        return main(words)
    code = subprocess.run([sys.executable, "-P", "-m", "interlock.coordinator", *words], check=False).returncode
    return code if code >= 0 else 128 - code


def _keys(chosen: argparse.Namespace) -> int:
    from interlock.coordinator import keys_verb

    tree, lines = keys_verb.run(load_fleet(chosen.fleet), chosen)
    if chosen.json:
        say_json(tree)
    else:
        print("\n".join(lines), flush=True)
    return 0


def _up(chosen: argparse.Namespace) -> int:
    from interlock.coordinator.up import up

    if chosen.ready_file is not None:
        check_writable(chosen.ready_file, "--ready-file")
    return up(chosen.path or chosen.fleet, as_json=chosen.json, ready_file=chosen.ready_file)


def _demo(chosen: argparse.Namespace) -> int:
    from interlock.coordinator.demo.play import main as demo_main

    if chosen.report is not None:
        check_writable(chosen.report, "--report")
    return demo_main(chosen.report, chosen.keep)


def _coordinator(chosen: argparse.Namespace) -> int:
    from interlock.coordinator.service import run_coordinator

    return _here("coordinator", chosen.fleet, run_coordinator)


def _rules(chosen: argparse.Namespace) -> int:
    if chosen.act is not None:
        from interlock.coordinator import rules_verb

        return rules_verb.run(chosen)
    from interlock.coordinator.rules.service import run_rules

    async def run(fleet: FleetConfig, ready: Callable[[], None]) -> None:
        await run_rules(fleet, ready, chosen.partition)

    return _here("rules", chosen.fleet, run)


def _here(name: str, path: Path, run: Callable[[FleetConfig, Callable[[], None]], Awaitable[None]]) -> int:
    async def role(ready: Callable[[], None]) -> None:
        await run(load_fleet(path), ready)

    return run_role(name, role)


VERBS: dict[str, Callable[[argparse.Namespace], int]] = {
    "migrate": _migrate,
    "rollback": _rollback,
    "drill": _drill,
    "plan": _plan,
    **dict.fromkeys(STEERING, _steer),
    "wave": _wave,
    **dict.fromkeys(REPORTS, _report),
    "ping": _ping,
    "status": _status,
    "top": _top,
    "watch": _watch,
    "log": _log,
    "keys": _keys,
    "assess": _assess,
    "import": _import,
    "asyncapi": _asyncapi,
    "shell": _shell,
    "up": _up,
    "demo": _demo,
    "coordinator": _coordinator,
    "rules": _rules,
}
