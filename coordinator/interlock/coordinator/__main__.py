"""The command `interlock`, also as `python -m interlock.coordinator`."""

from __future__ import annotations

import sys

from interlock.broker.interrupt import end_quietly


def main() -> int:
    """The exit code. What takes long to import comes after Ctrl-C is taken care of."""
    end_quietly()
    from interlock.coordinator import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
