"""What holds for all tests."""

from __future__ import annotations

from hypothesis import settings

# a machine that others use too may take any time for an example
settings.register_profile("any-machine", deadline=None)
settings.load_profile("any-machine")
