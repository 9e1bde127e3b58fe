"""Events in words: one line each, for `watch`, `migrate` and the logs of the demo. Pure."""

from __future__ import annotations

from typing import Literal

from interlock.broker import commands, facts
from interlock.broker.wire import Body, Event
from interlock.coordinator.state_words import handed_back, handed_over

_STEERED = {
    "approve": "approved",
    "pause": "PAUSED",
    "resume": "resumed",
    "hold": "HELD",
    "abort": "ABORTED",
    "commit": "committed early",
}

Tone = Literal["plain", "good", "warn", "bad", "dim"]


def sentence(body: Body) -> str:
    """What the event says, as one line."""
    match body:
        case facts.HostUp() | facts.HostDown() | facts.InstanceStarted() | facts.InstanceStopped():
            return _of_processes(body)
        case facts.AlertFiring():
            dry = ", a dry run" if body.dry_run else ""
            about = body.summary or _labels(body.labels)
            fault = "".join(f"; held, the fault of the {each.who}: {each.why}" for each in body.blamed.values())
            return f"rule {body.rule} fires ({body.action}{dry}): {about} [{body.value:g}]{fault}"
        case facts.WaveStarted() | facts.WaveRefused() | facts.WaveChanged() | facts.WaveEnded():
            return _of_wave(body)
        case facts.SeriesRecorded():
            return f"{body.agent}: {_count(len(body.series), 'series', '')} of {body.migration} recorded"
        case facts.FleetSnapshot():
            return f"snapshot of the fleet as of event {body.through}"
        case facts.AlertResolved():
            return f"rule {body.rule} is over: {_labels(body.labels)}"
        case facts.GpuFault() | facts.GpuFaultCleared():
            return _of_gpu(body)
        case (
            facts.MigrationStarted()
            | facts.MigrationRefused()
            | facts.StageEntered()
            | facts.MigrationWaiting()
            | facts.MigrationHeld()
            | facts.ChecksMeasured()
            | facts.Steered()
            | facts.Deviation()
            | facts.MigrationEnded()
        ):
            return _of_migration(body)
        case facts.SlotChanged() | facts.StepDone() | facts.StepFailed() | facts.CommandRefused() | facts.RolledBack():
            return _of_slot(body)
        case facts.RollBackEscalated() | facts.RollBackFailed() | facts.DrillDone():
            return _of_safety(body)
        case _:
            return _of_command(body)


def _of_gpu(body: facts.GpuFault | facts.GpuFaultCleared) -> str:
    card = f"GPU {body.gpu}" if body.gpu >= 0 else "the GPUs' driver"
    if isinstance(body, facts.GpuFaultCleared):
        lasted = f"after {body.until - body.since:.1f} s"
        return f"{body.host}: {card}: {body.kind} is over {lasted}" + (f": {body.detail}" if body.detail else "")
    if body.cause == "limit":
        return f"{body.host}: {card} does not give ({body.kind}): {body.detail}"
    whose = f", by {body.agent}" if body.agent else ""
    return f"{body.host}: {card}: {body.kind}: {body.detail}{whose}"


def _left_out(body: facts.MigrationStarted) -> list[object]:
    """Stages that the agent can't go through, and why."""
    found = body.settings.get("left_out")
    return found if isinstance(found, list) else []


def _of_processes(body: facts.HostUp | facts.HostDown | facts.InstanceStarted | facts.InstanceStopped) -> str:
    match body:
        case facts.HostUp():
            return f"host {body.host} is up (process {body.pid}, {_count(len(body.agents), 'agent')})"
        case facts.HostDown():
            return f"host {body.host} is going down"
        case facts.InstanceStarted():
            return f"{body.agent}: {body.role} {body.revision} started (process {body.pid})"
        case facts.InstanceStopped():
            how = "stopped" if body.expected else f"DIED ({_ending(body.returncode)})"
            return f"{body.agent}: {body.role} {body.revision} {how}{_more(body.detail)}"


def _of_migration(
    body: facts.MigrationStarted
    | facts.MigrationRefused
    | facts.StageEntered
    | facts.MigrationWaiting
    | facts.MigrationHeld
    | facts.ChecksMeasured
    | facts.Steered
    | facts.Deviation
    | facts.MigrationEnded,
) -> str:
    match body:
        case facts.MigrationStarted():
            route = f"{body.previous} -> {body.to}" if body.previous else f"to {body.to}"
            place = f"from {body.host} to {body.target}" if body.target else f"on {body.host}"
            said = f"{body.agent}: migration {body.migration} started, {route}, {body.strategy}, {place}"
            return "; ".join([said, *map(str, _left_out(body))])
        case facts.MigrationRefused():
            to = f" to {body.to}" if body.to else ""
            return f"{body.agent}{to}: refused: {body.reason}"
        case facts.StageEntered():
            return f"{body.agent}: stage {body.stage}{_more(body.note)}"
        case facts.MigrationWaiting():
            return f"{body.agent}: WAITS for approval of stage {body.stage}: interlock approve {body.agent}"
        case facts.MigrationHeld():
            fault = f", the fault of the {body.blame}" if body.blame else ""
            return f"{body.agent}: HELD by {body.breach.by}{fault}: {body.breach.reason}"
        case facts.Steered():
            return f"{body.agent}: {_STEERED[body.action]} by {body.by}{_more(body.reason)}"
        case facts.Deviation():
            return f"{body.agent}: DEVIATION by {body.by}: {body.what}; because: {body.because}"
        case facts.ChecksMeasured():
            when = "" if body.final else f" at {body.checkpoint:.0%} of the time"
            return f"{body.agent}: checks {body.verdict}{when}: {body.reason}"
        case facts.MigrationEnded():
            return f"{body.agent}: {body.outcome.upper()}, decided by {body.decided_by}{_more(body.reason)}"


def _of_wave(body: facts.WaveStarted | facts.WaveRefused | facts.WaveChanged | facts.WaveEnded) -> str:
    match body:
        case facts.WaveStarted():
            agents = ", ".join(member.agent for member in body.members)
            return f"{body.wave}: {_count(len(body.members), 'agent')}, {body.parallel} at a time: {agents}"
        case facts.WaveRefused():
            return f"{body.wave or 'wave'}: refused: {body.reason}"
        case facts.WaveChanged():
            return f"{body.wave}: {body.phase.upper()} by {body.by}: {body.reason}"
        case facts.WaveEnded():
            return f"{body.wave}: {body.outcome.upper()}: {body.reason}"


def _of_slot(
    body: facts.SlotChanged | facts.StepDone | facts.StepFailed | facts.CommandRefused | facts.RolledBack,
) -> str:
    match body:
        case facts.SlotChanged():
            trial = f", {body.candidate} on trial with {body.share:.0%} of the requests" if body.candidate else ""
            return f"{body.agent}: {body.state} ({body.permanent} is permanent{trial})"
        case facts.StepDone():
            more = handed_over(body.evidence) if body.step == "hand-over" else ""
            return f"{body.agent}: {body.step} done{_more(more)}"
        case facts.StepFailed():
            return f"{body.agent}: {body.step} FAILED, check {body.check}: {body.reason}"
        case facts.CommandRefused():
            return f"{body.agent}: host {body.host} refused a command: {body.reason}"
        case facts.RolledBack():
            took = reaction(body)
            since = f", {took:.2f} s after the sample that showed it" if took is not None else ""
            state = handed_back(body.evidence)
            again = f"{body.agent}: {body.revision} serves again{since} ({body.breach.by}: {body.breach.reason})"
            return f"{again}; {state}" if state else again


def _of_safety(body: facts.RollBackEscalated | facts.RollBackFailed | facts.DrillDone) -> str:
    match body:
        case facts.RollBackEscalated():
            return f"{body.agent}: the roll back goes on with level {body.level}: {body.reason}"
        case facts.RollBackFailed():
            kept = f"; {body.kept}, which is on trial, serves meanwhile" if body.kept else ""
            return f"{body.agent}: the ROLL BACK FAILED on {body.host}: {body.reason}{kept}; a human must look"
        case facts.DrillDone():
            took = ", ".join(f"level {level} in {took:.2f} s" for level, took in sorted(body.seconds.items()))
            problems = _more("; ".join(body.problems))
            return f"{body.agent}: drill of {body.revision}: {took or 'nothing rehearsed'}{problems}"


def _of_command(body: Body) -> str:
    agent = getattr(body, "agent", "?")
    match body:
        case commands.Migrate():
            return f"{agent}: asked to migrate to {body.to}"
        case commands.RollBackAgent():
            return f"{agent}: asked to roll back: {body.reason}"
        case commands.RunDrill():
            return f"{agent}: asked for a drill"
        case commands.Steer():
            return f"{agent}: asked to {body.action} it{_more(body.reason)}"
        case commands.StartWave():
            return f"asked to move many agents to {body.to or 'revisions of their own'}"
        case commands.StopWave():
            return f"{body.wave}: asked to {'undo' if body.undo else 'stop'} it{_more(body.reason)}"
        case commands.RollCall():
            return "hosts are asked whether they are there"
        case commands.RollBack():
            return f"{agent}: roll back {body.migration} ({body.breach.by}: {body.breach.reason})"
        case commands.Receive():
            return f"{agent}: {body.to} is to come from host {body.source}"
        case commands.HandOver():
            return f"{agent}: hand over {'the state' if body.route else 'a copy of the state'}"
        case commands.CutOver():
            return f"{agent}: cut over {body.share:.0%} of the requests"
        case _:
            return f"{agent}: {type(body).__name__}"


def tone(body: Body) -> Tone:
    """How much the line should stand out."""
    match body:
        case (
            facts.MigrationEnded(outcome="committed")
            | facts.WaveEnded(outcome="committed")
            | facts.HostUp()
            | facts.AlertResolved()
            | facts.GpuFaultCleared()
        ):
            return "good"
        case facts.GpuFault(cause="device" | "driver"):
            return "bad"
        case facts.GpuFault(cause="limit"):
            return "dim"
        case facts.RollBackFailed() | facts.StepFailed():
            return "bad"
        case facts.MigrationEnded(outcome="failed") | facts.WaveEnded(outcome="failed"):
            return "bad"
        case facts.InstanceStopped(expected=False) | facts.AlertFiring(action="rollback", dry_run=False):
            return "bad"
        case (
            facts.RolledBack()
            | facts.RollBackEscalated()
            | facts.MigrationWaiting()
            | facts.MigrationHeld()
            | facts.Steered(action="hold" | "abort")
            | facts.Deviation()
            | facts.MigrationRefused()
            | facts.MigrationEnded()
            | facts.WaveRefused()
            | facts.WaveChanged()
            | facts.WaveEnded()
            | facts.AlertFiring()
            | commands.RollBack()
            | commands.RollBackAgent()
        ):
            return "warn"
        case (
            facts.StageEntered() | facts.MigrationStarted() | facts.Steered() | facts.DrillDone() | facts.WaveStarted()
        ):
            return "plain"
        case _:
            return "dim"


def concerns(event: Event, migration: str) -> bool:
    """The event belongs to this migration."""
    body = event.body
    return getattr(body, "migration", None) == migration or migration in getattr(body, "migrations", ())


def reaction(body: facts.RolledBack) -> float | None:
    """Seconds from the first sample that showed the breach until live requests went to the old revision."""
    return None if body.breach.sample_time is None else max(0.0, body.routed - body.breach.sample_time)


def _labels(labels: dict[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in sorted(labels.items())) or "no labels"


def _more(text: str) -> str:
    return f": {text}" if text else ""


def _count(number: int, what: str, plural: str = "s") -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}{plural}"


def _ending(returncode: int) -> str:
    return f"exit code {returncode}" if returncode >= 0 else f"signal {-returncode}"
