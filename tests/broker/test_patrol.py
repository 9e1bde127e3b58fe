"""Who is looked at for being dead: only where the kernel does not find out by itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from interlock.broker.connections import Connections
from interlock.broker.patrol import Patrol


class Warden:
    where = "a plane"

    def __init__(self, found: Connections[Any]) -> None:
        self._found = found

    def connections(self) -> Iterator[Connections[Any]]:
        yield self._found

    def cut_off(self, user: str, why: str) -> None: ...
    def note(self, who: str, why: str) -> None: ...

    def name_of(self, key: str) -> str:
        return key


@pytest.mark.parametrize("kernel_watches", [False, True])
def test_a_line_that_has_spoken_is_watched_unless_tcp_does_so(kernel_watches: bool) -> None:
    found: Connections[Any] = Connections(b"x", lambda: (), lambda *_: "", 10.0, kernel_watches=kernel_watches)
    line = found.lines.let_in("host/alpha", 0.0)
    line.pings_s = 1.0
    found.talked.add(line)
    patrol = Patrol(Warden(found))
    patrol.look(0.5)
    assert (line in patrol._watched) is not kernel_watches
    assert not found.talked
