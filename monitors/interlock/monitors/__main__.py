"""`interlock monitor`: one host's monitor, or an action: a look at the GPUs, or letting go of their driver."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from interlock.broker.interrupt import end_quietly

if TYPE_CHECKING:
    import argparse

EXIT_USAGE, EXIT_SILENT, EXIT_FAILED = 2, 3, 13


def main(arguments: list[str] | None = None) -> int:
    end_quietly()
    options = _options(arguments)
    if options.action == "selftest" or options.self_test:
        return _selftest(as_json=options.json or options.self_test)
    if options.action:
        return _ask(options)

    from interlock.broker.config import load_fleet
    from interlock.broker.role import Ready, run_role
    from interlock.monitors.service import run_monitor

    async def serve(ready: Ready) -> None:
        await run_monitor(load_fleet(options.fleet), options.host, ready)

    return run_role("monitor", serve)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    import argparse
    import os

    parser = argparse.ArgumentParser(prog="interlock monitor", description="Sample GPUs, agents and the machine.")
    parser.add_argument(
        "action",
        nargs="?",
        choices=["selftest", "release", "resume"],
        help="selftest: ask NVML for each reading, and time it. release: have the monitor that runs here let go of the "
        "GPUs' driver, so that it can be reset or unloaded. resume: have it take the driver up again. None: run it",
    )
    parser.add_argument("--fleet", default=os.environ.get("INTERLOCK_FLEET", "fleet.toml"), help="the fleet file")
    parser.add_argument("--host", help="which host of the fleet this machine is")
    parser.add_argument("--for", dest="seconds", type=float, metavar="S", help="release: so long (120)")
    parser.add_argument("--json", action="store_true", help="selftest: everything, as one JSON object")
    parser.add_argument("--self-test", action="store_true", help="the same as selftest --json")
    options = parser.parse_args(arguments)
    if not options.host and options.action != "selftest" and not options.self_test:
        parser.error("--host is needed")
    return options


def _selftest(*, as_json: bool) -> int:
    import json
    import os

    import trio

    from interlock.monitors.selftest import survey, table

    report = trio.run(survey)
    try:
        print(json.dumps(report, indent=2) if as_json else table(report), flush=True)
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _ask(options: argparse.Namespace) -> int:
    import trio

    from interlock.broker.config import load_fleet
    from interlock.broker.errors import InterlockError, Unreachable
    from interlock.monitors.control import Request, ask
    from interlock.monitors.service import place

    request = Request(options.action)
    if options.seconds is not None:
        request = Request(options.action, options.seconds)

    async def asked() -> str:
        return (await ask(place(load_fleet(options.fleet), options.host), request)).reason

    try:
        reason = trio.run(asked)
    except InterlockError as error:
        print(f"interlock monitor: {error}", file=sys.stderr)
        return EXIT_SILENT if isinstance(error, Unreachable) else EXIT_USAGE
    if reason:
        print(f"interlock monitor: {options.host}: {reason}", file=sys.stderr)
        return EXIT_FAILED
    done = f"let go for {request.seconds:g} s" if options.action == "release" else "taken up again"
    print(f"{options.host}: the GPUs' driver was {done}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
