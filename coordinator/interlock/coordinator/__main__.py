"""`python -m interlock.coordinator coordinator|rules`: the same as the command `interlock`."""

import sys

from interlock.coordinator.cli import main

if __name__ == "__main__":
    sys.exit(main())
