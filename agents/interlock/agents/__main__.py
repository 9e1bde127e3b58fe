"""The host role: `python -m interlock.agents --fleet FILE --name HOST`."""

from __future__ import annotations

import sys

from interlock.broker.interrupt import end_quietly


def main(arguments: list[str] | None = None) -> int:
    end_quietly()
    import argparse

    from interlock.agents.host import run_host
    from interlock.broker.config import load_fleet
    from interlock.broker.role import Ready, run_role

    parser = argparse.ArgumentParser(prog="interlock host", description="Supervise the agents of one host.")
    parser.add_argument("--fleet", default="fleet.toml", metavar="FILE", help="the fleet file (default: fleet.toml)")
    parser.add_argument("--name", required=True, metavar="HOST", help="which of its hosts this is")
    given = parser.parse_args(arguments)

    async def run(ready: Ready) -> None:
        await run_host(load_fleet(given.fleet), given.name, ready)

    return run_role(f"host {given.name}", run)


if __name__ == "__main__":
    sys.exit(main())
