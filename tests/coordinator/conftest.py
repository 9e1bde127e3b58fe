"""A migration in a log in memory: what the coordinator emits is logged at once, by id; the host does as it is told."""

from __future__ import annotations

from typing import Any

import pytest

from interlock.broker import commands, facts, topics, wire
from interlock.broker.config import FleetConfig, parse_fleet
from interlock.coordinator.decisions import Coordinator
from interlock.coordinator.emit import Emit
from interlock.coordinator.migration import Migration
from interlock.coordinator.observation import Measurement

STEPS = {
    commands.Prepare: "prepare",
    commands.Drill: "drill",
    commands.StartCandidate: "start-candidate",
    commands.Shadow: "shadow",
    commands.CutOver: "cut-over",
    commands.Commit: "commit",
}


def fleet_of(
    *, strategy: dict[str, Any] | None = None, agent: dict[str, Any] | None = None, **rest: Any
) -> FleetConfig:
    """One agent `tutor` on host `alpha`; `strategy` is its own, and staged."""
    revision = {"entry": "tutor:Tutor"}
    short = {"canary": [{"share": 0.1, "seconds": 20.0}], "observation_s": 60.0}
    return parse_fleet(
        {
            "hosts": {"alpha": {"control": "tcp://127.0.0.1:7181"}},
            "strategies": {"staged": short | (strategy or {}), "rapid": {"observation_s": 30.0}},
            "agents": {
                "tutor": {
                    "host": "alpha",
                    "endpoint": "tcp://127.0.0.1:7801",
                    "serve": "r1",
                    "revisions": {"r1": revision, "r2": revision},
                    **(agent or {}),
                }
            },
            **rest,
        }
    )


class Story:
    """Says events, lets the coordinator decide, and collects what it logs as short lines."""

    def __init__(self, config: FleetConfig) -> None:
        self.config = config
        self.now = 1000.0
        self.events: list[wire.Event] = []
        self.ids: set[str] = set()
        self.direct: list[Emit] = []
        self.verdict: facts.Verdict | None = "passed"  # of every measurement; None: nobody measures
        self.restart()
        self.fact(facts.HostUp(host="alpha", control="c", pid=1, boot="b", agents=["tutor"]))
        self.fact(self.slot("serving"))

    def restart(self) -> None:
        """The coordinator is killed, and another one reads the log."""
        self.core = Coordinator(lambda: self.config, self.config)
        for event in self.events:
            self.core.apply(event)

    @property
    def migration(self) -> Migration:
        (migration,) = self.core.migrations.values()
        return migration

    # --- what others say

    def say(self, topic: str, body: wire.Body, id: str = "") -> None:
        id = id or f"e{len(self.events)}"
        if id in self.ids:
            return
        self.ids.add(id)
        raw = wire.encode(body)
        header = wire.Header(id=id, source="operator/ann", time=self.now, seq=len(self.events) + 1, logged=self.now)
        event = wire.Event(topic, header, wire.decode_body(raw), raw)
        self.events.append(event)
        self.core.apply(event)

    def fact(self, body: wire.Body) -> list[str]:
        self.say(topics.host_fact("alpha"), body)
        return self.run()

    @staticmethod
    def slot(state: str, **rest: Any) -> facts.SlotChanged:
        return facts.SlotChanged(**{"host": "alpha", "agent": "tutor", "state": state, "permanent": "r1", **rest})

    def migrate(self, to: str = "r2", **rest: Any) -> list[str]:
        self.say(topics.COORDINATOR, commands.Migrate(agent="tutor", to=to, deadline=self.now + 10, **rest))
        return self.run()

    def steer(self, action: Any, reason: str = "", **rest: Any) -> list[str]:
        body = commands.Steer(
            **{"agent": "tutor", "action": action, "deadline": self.now + 10, "reason": reason, **rest}
        )
        self.say(topics.COORDINATOR, body)
        return self.run()

    def asked(self) -> wire.Event:
        """What the host was last asked to do."""
        return next(event for event in reversed(self.events) if event.topic == "command/alpha/")

    def done(self, **evidence: Any) -> list[str]:
        """The host does it."""
        event = self.asked()
        body: Any = event.body
        return self.fact(
            facts.StepDone(
                host="alpha",
                agent="tutor",
                migration=body.migration,
                epoch=body.epoch,
                step=STEPS[type(body)],  # type: ignore[arg-type]
                command=event.header.id,
                evidence=evidence,
            )
        )

    def failed(self, check: str) -> list[str]:
        event = self.asked()
        body: Any = event.body
        return self.fact(
            facts.StepFailed(
                host="alpha",
                agent="tutor",
                migration=body.migration,
                epoch=body.epoch,
                step=STEPS[type(body)],  # type: ignore[arg-type]
                command=event.header.id,
                check=check,
                reason="as found",
            )
        )

    def rolled_back(self) -> list[str]:
        """The host does what it was last asked to roll back."""
        body = next(e.body for e in reversed(self.events) if isinstance(e.body, commands.RollBack))
        return self.fact(
            facts.RolledBack(
                host="alpha",
                agent="tutor",
                migration=body.migration,
                epoch=body.epoch,
                revision="r1",
                level=1,
                breach=body.breach,
                received=self.now,
                routed=self.now,
                restored=self.now,
                verified=True,
            )
        )

    def fires(self, rule: str = "odd") -> list[str]:
        """A rule that holds."""
        alert = facts.AlertFiring(
            rule=rule, labels={"agent": "tutor"}, value=1.0, action="hold", sample_time=self.now, summary="it is odd",
            migrations=list(self.core.migrations),
        )  # fmt: skip
        self.say(topics.alert_fact(rule), alert)
        return self.run()

    # --- what the coordinator says

    def run(self) -> list[str]:
        """Let it decide until it has nothing more to say; what it logged but measurements."""
        before = len(self.events)
        for _ in range(100):
            emits = self.core.decide(self.now) + self.measure()
            self.direct += [emit for emit in emits if emit.direct or emit.also_direct]
            logged = [emit for emit in emits if not emit.direct]
            if not logged:
                bodies = [event.body for event in self.events[before:]]
                return [told(body) for body in bodies if not isinstance(body, facts.ChecksMeasured)]
            for emit in logged:
                self.say(emit.topic, emit.body, emit.id)
        raise AssertionError("the coordinator says something without end")

    def measure(self) -> list[Emit]:
        """What the observers do: each candidate with live requests is found to be as `verdict` says."""
        emits = []
        for migration in self.core.migrations.values():
            watched = migration.watched(self.now)
            if watched is not None and self.verdict is not None:
                checks = [facts.Check(check="latency", verdict=self.verdict, value=1.2, limit=1.05, reason="slower")]
                why = "as measured" if self.verdict == "passed" else "latency: slower"
                found = Measurement(self.verdict, why, checks, min(watched.share, 1.0))
                emits += migration.observe(found, self.now)
        return [emit for emit in emits if emit.id not in self.ids]

    def later(self, seconds: float) -> list[str]:
        self.now += seconds
        return self.run()

    # --- ways to somewhere

    def to_canary(self) -> Story:
        self.migrate()
        self.done()
        self.done()
        self.done()
        return self

    def to_observation(self) -> Story:
        self.to_canary()
        self.later(20.1)
        self.done()
        return self


def told(body: Any) -> str:
    match body:
        case facts.StageEntered():
            return f"stage {body.stage}"
        case facts.Steered():
            return f"{body.action} by {body.by}"
        case facts.MigrationWaiting():
            return f"waits for {body.stage} until {body.until - 1000:.0f}"
        case facts.MigrationHeld():
            return f"held by {body.breach.by}" + (f", blames {body.blame}" if body.blame else "")
        case facts.MigrationRefused():
            return f"refused: {body.reason}"
        case facts.Deviation():
            return f"deviation: {body.what}; because {body.because}"
        case facts.MigrationEnded():
            return f"{body.outcome} by {body.decided_by}: {body.reason}"
        case commands.RollBack():
            return f"roll back: {body.breach.by}: {body.breach.reason}"
        case commands.CutOver():
            return f"cut over {body.share:.0%}"
    return type(body).__name__


@pytest.fixture
def story() -> Any:
    """Makes a Story; arguments are those of `fleet_of`."""
    return lambda **options: Story(fleet_of(**options))
