"""How `interlock top` looks: three tables, again and again on a terminal, once elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from interlock.coordinator.overview import AgentRow, GpuRow, HostRow, State, View

PIPE_WIDTH = 200  # columns where there is no terminal: a script wants the row on one line
BAR = 12  # columns of a bar
STYLES: dict[State, str] = {"ok": "", "busy": "yellow", "down": "bold red", "silent": "bold red"}
WARN, BAD = 0.85, 0.95  # of a ratio that may fill up: the limits of the default rules for GPU memory


class TopScreen:
    """A picture on one stream; with `live`, each replaces the one before, and Ctrl-C leaves the terminal as it was."""

    def __init__(self, stream: TextIO, *, live: bool) -> None:
        terminal = stream.isatty()
        self._console = Console(file=stream, highlight=False, width=None if terminal else PIPE_WIDTH)
        self._live = Live(console=self._console, screen=True, auto_refresh=False) if live else None

    def __enter__(self) -> TopScreen:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, view: View) -> None:
        """Draw it."""
        if self._live is None:
            self._console.print(self._picture(view, None))
        else:
            self._live.update(self._picture(view, self._console.height), refresh=True)

    def _picture(self, view: View, height: int | None) -> Group:
        """Agents get the lines that hosts and GPUs leave, of a terminal so high."""
        parts: list[Table | Text] = [_hosts(view.hosts)]
        if view.gpus:
            parts.append(_gpus(view.gpus))
        room = None if height is None else max(3, height - len(view.hosts) - len(view.gpus) - 8)
        shown = view.agents if room is None else view.agents[:room]
        if view.agents:
            parts.append(_agents(shown))
        if len(shown) < len(view.agents):
            parts.append(Text(f"and {len(view.agents) - len(shown)} more agents; --host shows those of one", "dim"))
        if view.left_out:
            parts.append(Text(f"{view.left_out} series are beyond what is looked at: use --host", "yellow"))
        if self._live is not None:
            parts.append(Text(f"{time.strftime('%H:%M:%S')}  Ctrl-C leaves", "dim"))
        return Group(*parts)


def _table(title: str, columns: Sequence[str], rows: Sequence[tuple[State, Sequence[str | Text]]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in columns:
        right = name.startswith(" ")
        table.add_column(name.strip(), header_style="dim", justify="right" if right else "left", overflow="ellipsis")
    for state, cells in rows:
        table.add_row(*[cell if isinstance(cell, Text) else escape(cell) for cell in cells], style=STYLES[state])
    return table


def _hosts(hosts: Sequence[HostRow]) -> Table:
    columns = ["host", "state", "cpu", " load/core", "memory", " of", " swap", " stalled", " agents", " gpus", "beat"]
    rows = []
    for row in hosts:
        silent = row.state == "silent"
        age = "never heard" if row.age_s is None else f"silent {row.age_s:.0f} s"
        cells: list[str | Text] = [
            row.host, age if silent else row.state, _bar(row.cpu_ratio, grows=False), _number(row.load_per_core),
            _bar(row.memory_used_ratio), _bytes(row.memory_total_bytes), _bytes(row.swap_used_bytes),
            _percent(row.pressure_ratio), str(row.agents), str(row.gpus), "fast" if row.fast else "",
        ]  # fmt: skip
        rows.append((row.state, cells))
    return _table("Hosts", columns, rows)


def _gpus(gpus: Sequence[GpuRow]) -> Table:
    columns = ["gpu", "state", "memory", " used", " of", " nobody's", "busy", " degrees C", " W", "uuid"]
    rows = []
    for row in gpus:
        cells: list[str | Text] = [
            f"{row.host}/{row.gpu}", row.state, _bar(row.memory_used_ratio), _bytes(row.memory_used_bytes),
            _bytes(row.memory_total_bytes), _bytes(row.unattributed_bytes), _bar(row.utilization_ratio, grows=False),
            _number(row.temperature_celsius, 0), _number(row.power_watts, 0), row.uuid,
        ]  # fmt: skip
        rows.append((row.state, cells))
    return _table("GPUs", columns, rows)


def _agents(agents: Sequence[AgentRow]) -> Table:
    columns = ["agent", "host", "revision", "role", "state", " cores", " memory", " gpu memory", " processes"]
    columns += [" requests/s", " errors/s", " p95", " in flight"]
    rows = []
    for row in agents:
        cells: list[str | Text] = [
            row.agent, row.host, row.revision, row.role, row.state, _number(row.cpu), _bytes(row.memory_bytes),
            _bytes(row.gpu_memory_bytes), _number(row.processes, 0), _number(row.requests_per_s, 1),
            _number(row.errors_per_s, 1), "-" if row.p95_s is None else f"{row.p95_s * 1000:.1f} ms",
            _number(row.in_flight, 0),
        ]  # fmt: skip
        rows.append((row.state, cells))
    return _table("Agents", columns, rows)


def _bar(ratio: float | None, *, grows: bool = True) -> Text:
    """`grows`: a full one is bad, as it is of memory."""
    if ratio is None:
        return Text("-", "dim")
    full = round(min(1.0, max(0.0, ratio)) * BAR)
    style = "red" if grows and ratio > BAD else "yellow" if grows and ratio > WARN else "green"
    return Text.assemble(("#" * full, style), ("." * (BAR - full), "dim"), f" {ratio * 100:3.0f} %")


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio * 100:.0f} %"


def _bytes(value: float | None) -> str:
    if value is None:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit in ("B", "KiB") else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
