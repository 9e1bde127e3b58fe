"""`python -m interlock.broker --fleet FILE`: the broker role."""

from __future__ import annotations

import sys

from interlock.broker.interrupt import end_quietly


def main(arguments: list[str] | None = None) -> int:
    end_quietly()
    import argparse
    import os

    from interlock.broker.config import load_fleet
    from interlock.broker.planes import run_broker, run_telemetry
    from interlock.broker.role import Ready, run_role

    parser = argparse.ArgumentParser(prog="interlock broker", description="The bus: event log and telemetry.")
    parser.add_argument(
        "--fleet",
        default=os.environ.get("INTERLOCK_FLEET", "fleet.toml"),
        help="the fleet file (default: INTERLOCK_FLEET, or fleet.toml)",
    )
    parser.add_argument(
        "--plane",
        choices=["telemetry"],
        help="only this plane; the broker starts it so, and it ends with its standard input",
    )
    options = parser.parse_args(arguments)

    async def run(ready: Ready) -> None:
        serve = run_telemetry if options.plane else run_broker
        await serve(load_fleet(options.fleet), ready)

    return run_role("broker", run)


if __name__ == "__main__":
    sys.exit(main())
