"""The host role: `python -m interlock.agents --fleet FILE --name HOST`."""

from __future__ import annotations

import argparse
import sys
from functools import partial

from interlock.agents.host import run_host
from interlock.broker.config import load_fleet
from interlock.broker.role import Ready, run_role


async def _main(path: str, name: str, ready: Ready) -> None:
    await run_host(load_fleet(path), name, ready)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="interlock host", description="Supervise the agents of one host.")
    parser.add_argument("--fleet", default="fleet.toml", metavar="FILE", help="the fleet file (default: fleet.toml)")
    parser.add_argument("--name", required=True, metavar="HOST", help="which of its hosts this is")
    given = parser.parse_args(arguments)
    return run_role(f"host {given.name}", partial(_main, given.fleet, given.name))


if __name__ == "__main__":
    sys.exit(main())
