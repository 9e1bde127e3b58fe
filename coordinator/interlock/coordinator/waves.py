"""The waves in flight, and what operators ask of them. Pure: a part of the coordinator's fold over the log."""

from __future__ import annotations

from collections.abc import Callable

from interlock.broker import commands, facts, topics
from interlock.broker.config import FleetConfig
from interlock.broker.errors import ConfigError
from interlock.broker.wire import Event
from interlock.coordinator.admission import freeze, near
from interlock.coordinator.emit import Emit
from interlock.coordinator.fleet import Fleet
from interlock.coordinator.wave import Flying, Wave
from interlock.coordinator.wave_plan import Asker, plan_wave


class Waves:
    """`load` reads the fleet file anew; ConfigError if it is wrong."""

    def __init__(self, load: Callable[[], FleetConfig]) -> None:
        self.open: dict[str, Wave] = {}
        self._load = load
        self._begun: dict[str, int] = {}  # where each begins in the log

    @property
    def begun(self) -> list[int]:
        """Where those that are in flight begin in the log."""
        return list(self._begun.values())

    def apply(self, event: Event) -> None:
        body = event.body
        if isinstance(body, facts.WaveStarted):
            self.open[body.wave] = Wave(body)
            self._begun[body.wave] = event.header.seq
        for wave in list(self.open.values()):
            wave.apply(event)
            if wave.closed:
                del self.open[wave.id], self._begun[wave.id]

    def decide(self, now: float, flying: Flying) -> list[Emit]:
        return [emit for wave in self.open.values() for emit in wave.decide(now, flying, lambda: self._frozen(now))]

    def next_deadline(self, now: float) -> float:
        return min((wave.next_deadline(now) for wave in self.open.values()), default=float("inf"))

    def undoes(self, request: str) -> bool:
        """The request moves a member of a wave back."""
        return any(wave.undoes(request) for wave in self.open.values())

    def start(self, body: commands.StartWave, event: Event, fleet: Fleet, now: float) -> Emit:
        """WaveStarted, or why not."""
        request = event.header.id
        asker = Asker(wave=f"wave-{event.header.seq}", request=request, by=event.header.source)
        taken = {member.agent: wave.id for wave in self.open.values() for member in wave.started.members}
        try:
            if now > body.deadline:
                raise ConfigError("the request's deadline has passed", hint="is the coordinator overloaded? ask again")
            started = plan_wave(body, self._load(), fleet, asker, taken=taken, now=now)
        except ConfigError as error:
            return _refused(request, str(error))
        return Emit(topics.wave_fact(started.wave), started, f"{started.wave}/started")

    def stop(self, body: commands.StopWave, event: Event, now: float) -> Emit:
        """WaveChanged, or why not."""
        request, wave = event.header.id, self.open.get(body.wave)
        if now > body.deadline:
            return _refused(request, "the request's deadline has passed")
        if wave is None:
            return _refused(request, f"no wave {body.wave!r} is in flight; {near(body.wave, self.open)}")
        reason = wave.refusal(body)
        return _refused(request, reason, wave.id) if reason else wave.change(body, request, event.header.source)

    def _frozen(self, now: float) -> bool:
        """A fleet file that can't be read begins nothing either: it is being written, perhaps."""
        try:
            return freeze(self._load(), now) is not None
        except ConfigError:
            return True


def _refused(request: str, reason: str, wave: str = "") -> Emit:
    refused = facts.WaveRefused(request=request, reason=reason, wave=wave)
    return Emit(topics.wave_fact(wave or "unknown"), refused, f"{request}/refused")
