"""The demo's screen: what moves, how the clients fare, the GPU, the timeline; plain lines without a terminal."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

PLAIN_WIDTH = 120  # columns where there is no terminal to ask
TIMELINE = 14  # lines of it on the screen
COLOURS = {"committed": "green", "rolled-back": "yellow", "refused": "red", "failed": "red", "held": "magenta"}


class Scene:
    """`say` adds to the timeline, `show` draws what is going on. Use as a context manager."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)
        if not self.console.is_terminal:
            self.console = Console(highlight=False, width=PLAIN_WIDTH)
        self.began = time.time()
        self._lines: deque[Text] = deque(maxlen=TIMELINE)
        self._live: Live | None = None
        if self.console.is_terminal:
            self._live = Live(console=self.console, refresh_per_second=8, transient=True)

    def __enter__(self) -> Scene:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str, style: str = "") -> None:
        line = Text.assemble((f"{time.time() - self.began:6.2f}s  ", "dim"), (text, style))
        self._lines.append(line)
        if self._live is None:
            self.console.print(line, soft_wrap=True)

    def show(self, results: list[dict[str, Any]], now: dict[str, str]) -> None:
        if self._live is None:
            return
        facts = Table.grid(padding=(0, 2))
        for name, value in now.items():
            facts.add_row(Text(name, "bold"), value)
        parts: list[RenderableType] = [Panel(facts, title="now"), Panel(Group(*self._lines), title="timeline")]
        if results:
            parts.append(table(results))
        self._live.update(Group(*parts))


def table(results: list[dict[str, Any]]) -> Table:
    """The figures of all moves that are over."""
    shown = Table(title="moves under live load, all figures measured in this run")
    for name in ("move", "", "outcome", "decided by"):
        shown.add_column(name, no_wrap=True)
    for name in ("breach to\nevent ms", "breach to\nrestored ms", "requests", "failed", "longest\ngap ms"):
        shown.add_column(name, justify="right")
    for entry in results:
        shown.add_row(
            entry["name"],
            f"{entry['agent']} {entry['from']} to {entry['to']}",
            Text(entry["outcome"], COLOURS.get(entry["outcome"], "")),
            entry["decided_by"],
            _ms(entry["breach_to_event_ms"]),
            _ms(entry["breach_to_restored_ms"]),
            str(entry["requests"]),
            str(entry["failed_requests"]),
            _ms(entry["longest_gap_ms"]),
        )
    return shown


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
