"""What an operator sees: coloured lines and tables on a terminal, plain text elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from interlock.broker.facts import WaveResult
from interlock.broker.wire import Event
from interlock.coordinator.fleet import Fleet, Migration, Wave
from interlock.coordinator.ping import Roll
from interlock.coordinator.planning import Forecast
from interlock.coordinator.verbs import Report, Status
from interlock.coordinator.wording import Tone, sentence, tone

if TYPE_CHECKING:  # the parsers that it brings are of no use to the other verbs
    from interlock.coordinator.assess.report import Report as Assessment

STYLES: dict[Tone, str] = {"plain": "", "good": "green", "warn": "yellow", "bad": "bold red", "dim": "dim"}
OUTCOMES: dict[str, Tone] = {
    "committed": "good",
    "started": "plain",
    "rolled-back": "warn",
    "held": "warn",
    "refused": "warn",
    "failed": "bad",
}
CONDITIONS: dict[str, Tone] = {"up": "good", "silent": "bad", "down": "warn"}
PIPE_WIDTH = 200  # columns where there is no terminal: a script wants the row on one line


class _Console(Console):
    """Leaves it to the verb what a reader who went away means."""

    def on_broken_pipe(self) -> None:
        raise  # noqa: PLE0704  (rich calls it while it handles the BrokenPipeError)


class Screen:
    """Lines and tables on one stream."""

    def __init__(self, stream: TextIO) -> None:
        terminal = stream.isatty()
        self._console = _Console(file=stream, highlight=False, width=None if terminal else PIPE_WIDTH)

    def line(self, text: str, tone: Tone = "plain") -> None:
        self._console.print(escape(text), style=STYLES[tone] or None, soft_wrap=True)

    def event(self, event: Event) -> None:
        """Its local time and what it says."""
        self.line(f"{clock(event.header.time)}  {sentence(event.body)}", tone(event.body))

    def report(self, told: Report) -> None:
        """The last line of a verb."""
        self.line(closing(told), OUTCOMES[told.outcome])

    def roll(self, roll: Roll) -> None:
        """Who answered a ping, how fast, and who did not."""
        for answer in roll.answers:
            what = f"refused: {answer.refused}" if answer.refused else "has it"
            self.line(f"{answer.host}  {what}  {answer.ms:.1f} ms", "warn" if answer.refused else "good")
        for host in roll.silent:
            self.line(f"{host}  no answer: is it running? see: interlock status", "bad")

    def status(self, status: Status) -> None:
        view = status.view
        self._hosts(status)
        self._agents(view)
        for name, place in sorted(status.places.items()):
            self.line(f"{name} deviates from the fleet file: {place}", "warn")
        flying = view.in_flight()
        if flying:
            self._table(
                "Migrations in flight",
                ["migration", "agent", "from", "to", "since", "stage", "phase", "waits for", "time left"],
                [
                    [m.id, m.agent, m.previous, m.to, clock(m.times.get("started", 0.0)), *_standing(m, status)]
                    for m in flying
                ],
            )
            for m in flying:
                if m.outcome == "held":
                    fault = f" (the fault of the {m.blame})" if m.blame else ""
                    self.line(f"{m.agent} is held by {m.decided_by}{fault}: {m.reason}", "warn")
                for deviation in m.deviations:
                    self.line(f"{m.agent} deviates: {deviation}", "warn")
        else:
            self.line("No migration is in flight.", "dim")
        for wave in view.waves.values():
            if not wave.outcome:
                self.line(f"{wave.id} is {wave.phase}: interlock wave status {wave.id}")
        if view.alerts:
            self._table(
                "Firing alerts",
                ["rule", "action", "since", "value", "about"],
                [
                    [
                        a.rule,
                        a.action + " (dry run)" * a.dry_run,
                        clock(a.since),
                        f"{a.value:g}",
                        a.summary or str(a.labels),
                    ]
                    for a in view.alerts.values()
                ],
                tone="bad",
            )

    def history(self, migrations: Sequence[Migration]) -> None:
        """What `interlock history` shows."""
        if not migrations:
            self.line("No such migration is known.", "dim")
            return
        rows = []
        for m in migrations:
            begun, ended = m.times.get("started", 0.0), m.times.get("ended")
            took = span(ended - begun) if begun and ended is not None else ""
            outcome = m.outcome or "in flight"
            rows.append([m.id, m.agent, m.previous, m.to, m.strategy, clock(begun), took, outcome, m.decided_by])
        columns = ["migration", "agent", "from", "to", "strategy", "began", "took", "outcome", "decided by"]
        self._table("Migrations", columns, rows)

    def wave(self, results: Sequence[WaveResult]) -> None:
        """The agents of a wave."""
        rows = [[each.agent, each.state, each.migration, each.back, each.reason] for each in results]
        self._table("Agents", ["agent", "state", "migration", "moved back by", "why"], rows)

    def waves(self, waves: Sequence[Wave]) -> None:
        """What `interlock wave list` shows."""
        if not waves:
            self.line("No wave has begun yet.", "dim")
            return
        rows = [[w.id, w.by, clock(w.started), str(len(w.to)), w.outcome or w.phase, w.reason] for w in waves]
        self._table("Waves", ["wave", "by", "began", "agents", "outcome", "why"], rows)

    def forecast(self, found: Forecast) -> None:
        """What `interlock plan` shows."""
        there = f", to host {found.target}" if found.target else ""
        self.line(f"{found.agent} on {found.host}: {found.previous or '?'} -> {found.to}{there}")
        self.line(f"strategy {found.strategy}; due is {found.due}: {found.why}")
        self._risk(found)
        promised = found.promise
        self.line(
            f"rollback within {promised.seconds:.3g} s: {promised.source}", "good" if promised.rehearsed else "warn"
        )
        self._table(
            "Stages",
            ["stage", "asked of the host", "what must hold", "takes"],
            [
                [
                    s.stage + " (after approval)" * s.gate,
                    ", ".join(s.steps),
                    "; ".join(s.checks),
                    _span(s.least_s, s.most_s),
                ]
                for s in found.stages
            ],
        )
        self.line(f"takes {_span(found.least_s, found.most_s)} in all")
        for missing in found.left_out:
            self.line(f"left out: {missing}", "warn")
        for deviation in found.deviations:
            self.line(f"deviates: {deviation}", "warn")
        for reason in found.refused:
            self.line(f"would be REFUSED now: {reason}", "bad")
        if not found.refused:
            self.line("would begin now", "good")

    def assessed(self, found: Assessment, *, details: bool) -> None:
        """What `interlock assess` shows."""
        from interlock.coordinator.assess import text as assess_text

        for line, how in assess_text.head(found):
            self.line(line, how)
        if found.agents:
            self._table("Agents", assess_text.COLUMNS, assess_text.rows(found))
        for line, how in assess_text.rest(found, details=details):
            self.line(line, how)

    # --- inside

    def _risk(self, found: Forecast) -> None:
        backup = f"; backup of {', '.join(found.backup)}"
        source = found.source
        if found.risk or source is None:
            self.line(f"risk {found.risk or 'unknown: nobody scored it'}{backup}")
            return
        what = "; ".join(source.factors) or "no factor holds"
        self.line(f"risk {source.score}, {source.level}, by the source of {found.to}: {what}{backup}")
        if source.problem:
            self.line(f"its source can't run: {source.problem}", "bad")
        if found.under_source:
            self.line(f"by its source {found.under_source} is due: the fleet file is less careful", "warn")

    def _hosts(self, status: Status) -> None:
        if not status.view.hosts:
            self.line("No host has reported to this broker yet.", "warn")
            return
        table = self._empty("Hosts", ["host", "condition", "since", "process", "agents"])
        for host in sorted(status.view.hosts.values(), key=lambda host: host.name):
            condition = status.condition(host)
            row = [host.name, condition, clock(host.since), str(host.pid), str(len(host.agents))]
            table.add_row(*map(escape, row), style=STYLES[CONDITIONS[condition]] if condition != "up" else None)
        self._console.print(table)

    def _agents(self, view: Fleet) -> None:
        rows = []
        for agent in sorted(view.agents.values(), key=lambda agent: agent.name):
            trial = f"{agent.candidate} ({agent.share:.0%})" if agent.candidate else ""
            last = view.last_migration(agent.name)
            told = f"{last.outcome}: {last.to}" if last is not None and not last.in_flight else ""
            rows.append([agent.name, agent.host, agent.state, agent.permanent, trial, agent.endpoint, told])
        if rows:
            self._table(
                "Agents", ["agent", "host", "state", "revision", "on trial", "endpoint", "last migration"], rows
            )

    def _empty(self, title: str, columns: Sequence[str]) -> Table:
        table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for column in columns:
            table.add_column(column, header_style="dim", overflow="fold")
        return table

    def _table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], tone: Tone = "plain") -> None:
        table = self._empty(title, columns)
        for row in rows:
            table.add_row(*map(escape, row), style=STYLES[tone] or None)
        self._console.print(table)


def clock(moment: float) -> str:
    """Local time of day with milliseconds; the date too where it is not today's."""
    if not moment:
        return "-"
    local = time.localtime(moment)
    day = "" if local[:3] == time.localtime()[:3] else time.strftime("%Y-%m-%d ", local)
    return f"{day}{time.strftime('%H:%M:%S', local)}.{int(moment % 1 * 1000):03d}"


def closing(told: Report) -> str:
    """The outcome in one line."""
    begun, ended = told.times.get("started"), told.times.get("ended")
    took = f" after {ended - begun:.1f} s" if begun is not None and ended is not None else ""
    why = f" (decided by {told.decided_by}: {told.reason})" if told.decided_by else ""
    match told.outcome:
        case "committed":
            return f"COMMITTED{took}: {told.agent} runs {told.to}"
        case "started":
            return f"STARTED: {told.migration}; follow it with: interlock watch --events"
        case "rolled-back":
            return f"ROLLED BACK{took}: {told.agent} runs {told.previous or 'its old revision'} again{why}"
        case "held":
            return (
                f"HELD: {told.agent} stays where it is until you decide{why}; go on: interlock resume {told.agent}; "
                f"undo: interlock abort {told.agent}"
            )
        case "refused":
            return f"REFUSED, nothing was changed: {told.reason}"
        case _:
            return f"FAILED: {told.agent}{why}"


def _standing(migration: Migration, status: Status) -> list[str]:
    """Stage, phase, what is waited for, and the time left; as far as the log tells."""
    found = status.standings.get(migration.id)
    if found is None:
        return [migration.stage, migration.phase, migration.note, ""]
    left = max(0.0, found.until - status.now)
    return [found.stage, found.phase, found.waits_for, f"{span(left)}, then {found.then}" if found.until else ""]


def _span(least: float, most: float) -> str:
    return span(least) if span(least) == span(most) else f"{span(least)} to {span(most)}"


def span(seconds: float) -> str:
    """Such as "40 s", "12 min" or "24 h": rounded to what matters."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
