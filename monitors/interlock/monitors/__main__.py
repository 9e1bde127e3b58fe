"""`python -m interlock.monitors --fleet F --host HOST`: one host's monitor; with `--self-test` a look at the GPUs."""

from __future__ import annotations

import sys

from interlock.broker.interrupt import end_quietly


def main(arguments: list[str] | None = None) -> int:
    end_quietly()
    import argparse
    import json
    import os

    import trio

    from interlock.broker.config import load_fleet
    from interlock.broker.role import Ready, run_role
    from interlock.monitors.selftest import survey, table

    parser = argparse.ArgumentParser(prog="interlock monitor", description="Sample GPUs, agents and the machine.")
    parser.add_argument("--fleet", default=os.environ.get("INTERLOCK_FLEET", "fleet.toml"), help="the fleet file")
    parser.add_argument("--host", help="which host of the fleet this machine is")
    parser.add_argument("--self-test", action="store_true", help="the same as the action selftest --json")
    parser.add_argument("--json", action="store_true", help="of the action selftest: everything, as one JSON object")
    parser.add_argument("action", nargs="?", choices=["selftest"], help="ask NVML for each reading, and time it")
    options = parser.parse_args(arguments)
    if options.self_test or options.action == "selftest":
        report = trio.run(survey)
        print(json.dumps(report, indent=2) if options.json or options.self_test else table(report))
        return 0
    if not options.host:
        parser.error("--host is needed")

    from interlock.monitors.service import run_monitor  # the self-test above needs no bus

    async def serve(ready: Ready) -> None:
        await run_monitor(load_fleet(options.fleet), options.host, ready)

    return run_role("monitor", serve)


if __name__ == "__main__":
    sys.exit(main())
