"""May this migration begin, and how careful is it to be? Pure: the fleet file, the fleet as the log tells it, the time.

The coordinator answers a request with it, and `interlock plan` shows beforehand what the answer would be.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from interlock.broker import commands
from interlock.broker.config import AgentConfig, FleetConfig, FreezeWindow
from interlock.broker.errors import ConfigError
from interlock.broker.freeze import parse_zone
from interlock.broker.strategies import BUILT_IN, STRATEGY_OF, Level, StrategyConfig, StrategyName
from interlock.coordinator.fitting import fitted
from interlock.coordinator.fleet import Alert, Fleet
from interlock.coordinator.placing import placed, target_of

Name = TypeVar("Name", bound=str)
ORDER: list[StrategyName] = list(BUILT_IN)  # the later, the more careful
CLASSES = ("", "cold", "hand-over")  # of a rollback, the slower the later


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What a migration keeps from the fleet file of the moment it began; it travels in MigrationStarted."""

    strategy: StrategyConfig
    start_timeout_s: float
    accept: str = ""  # the slowest class of rollback that will do
    sick_ok: bool = False  # the old revision may be sick
    hand_over_s: float = 5.0  # for its state in memory
    left_out: list[str] = []  # what this agent can't go through, and why


@dataclass(frozen=True)
class Choice:
    """The strategy of a migration, and why it is that one. `lowered`: less careful than what is `due`."""

    strategy: StrategyName
    due: StrategyName
    why: str

    @property
    def lowered(self) -> bool:
        return ORDER.index(self.strategy) < ORDER.index(self.due)


@dataclass(frozen=True)
class Case:
    """A request, held against the fleet. objections: why it can't begin now, the weightiest first.

    deviations: what of it is not the rule, and is allowed since the operator said why.
    """

    agent: AgentConfig
    previous: str
    choice: Choice
    settings: Settings
    objections: list[ConfigError]
    deviations: list[str]
    target: str = ""  # the host that it moves to


def consider(
    asked: commands.Migrate,
    config: FleetConfig,
    fleet: Fleet,
    *,
    in_flight: str,
    risk: Mapping[str, Level],
    now: float,
    undo: bool = False,
) -> Case:
    """ConfigError for what no time and no word of an operator would make possible: it names nothing there is.

    in_flight: the migration that the agent is in, or "". undo: it moves a member of a wave back, and a rule that fires
    is no reason against that.
    """
    if asked.agent not in config.agents:
        raise ConfigError(f"there is no agent {asked.agent!r}", hint=near(asked.agent, config.agents))
    agent = placed(asked.agent, config, fleet)
    target = target_of(asked.host, asked.agent, agent, config, fleet)
    revision = agent.revisions.get(asked.to)
    if revision is None:
        raise ConfigError(f"agent {asked.agent} has no revision {asked.to!r}", hint=near(asked.to, agent.revisions))
    choice = choose(asked, agent, risk.get(asked.agent))
    if asked.accept not in CLASSES:
        raise ConfigError(f"there is no class of rollback {asked.accept!r}", hint="cold or hand-over")
    objections = list(_state(asked, agent, fleet, in_flight, target))
    objections += [] if undo else list(_alerts(asked, agent, fleet))
    deviations = []
    for alert in _about(asked.agent, fleet) if asked.because else ():
        deviations.append(f"rule {alert.rule} fires for the revision that serves: it is no verified way back")
    frozen = freeze(config, now)
    if frozen is not None:
        what = f"the fleet is frozen from {frozen.start} to {frozen.end}: {frozen.because}"
        deviations.append(what)
        if not asked.because:
            objections.append(ConfigError(what, hint="if it must be now, say why: --because TEXT"))
    if choice.lowered:
        what = f"strategy {choice.strategy} is less careful than {choice.due}, which is due ({choice.why})"
        deviations.append(what)
        if not asked.because:
            objections.append(ConfigError(what, hint="if it must be, say why: --because TEXT"))
    slot = fleet.agents.get(asked.agent)
    hands_over = slot is not None and slot.hands_over
    possible, left_out = fitted(config.strategy(choice.strategy), agent, hands_over=hands_over)
    settings = Settings(
        strategy=possible, start_timeout_s=revision.start_timeout_s, accept=asked.accept, sick_ok=bool(asked.because),
        left_out=left_out, hand_over_s=agent.hand_over_s,
    )  # fmt: skip
    return Case(agent, slot.permanent if slot else "", choice, settings, objections, deviations, target)


def choose(asked: commands.Migrate, agent: AgentConfig, risk: Level | None) -> Choice:
    """What is asked for, else what is due: by the risk score where there is one, else by the fleet file."""
    if risk is not None:
        due, why = STRATEGY_OF[risk], f"its risk is {risk}"
    elif agent.strategy:
        due, why = agent.strategy_name, "the fleet file says so"
    else:
        due, why = agent.strategy_name, f"its level in the fleet file is {agent.level}"
    if asked.strategy is not None and asked.level is not None:
        raise ConfigError("both a level and a strategy are asked for", hint="a level says the strategy: leave one away")
    chosen = due
    if asked.strategy is not None:
        chosen = _known(asked.strategy, ORDER, "strategy")
    elif asked.level is not None:
        chosen = STRATEGY_OF[_known(asked.level, list(STRATEGY_OF), "level")]
    return Choice(chosen, due, why)


def freeze(config: FleetConfig, now: float) -> FreezeWindow | None:
    """The window that `now` (seconds since 1970) lies in, if any."""
    zone = parse_zone(config.freeze.timezone)
    return next((each for each in config.freeze.windows if each.window.covers(now, zone)), None)


def concerns(alert: Alert, agent: str, host: str) -> bool:
    """The alert is about this agent's permanent revision, or about its host as a whole."""
    labels = alert.labels
    if labels.get("role") == "candidate" or not ({"agent", "host"} & set(labels)):
        return False
    return labels.get("agent", agent) == agent and labels.get("host", host) == host


def near(name: str, known: Iterable[str]) -> str:
    """A hint for a name that is not known."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names) or 'none'}"


def _known(name: str, names: list[Name], what: str) -> Name:
    for each in names:
        if each == name:
            return each
    raise ConfigError(f"there is no {what} {name!r}", hint=near(name, names))


def _state(
    asked: commands.Migrate, agent: AgentConfig, fleet: Fleet, in_flight: str, target: str
) -> Iterator[ConfigError]:
    """Why the fleet is in no state to move this agent."""
    slot = fleet.agents.get(asked.agent)
    yield from busy(asked.agent, agent, fleet, in_flight)
    if _is_up(agent, fleet) and (slot is None or not slot.permanent):
        yield ConfigError(
            f"host {agent.host} does not serve {asked.agent} yet", hint="restart the host to add an agent"
        )
    if slot is not None and slot.permanent == asked.to and not target:
        yield ConfigError(f"{asked.agent} serves revision {asked.to} already")


def _alerts(asked: commands.Migrate, agent: AgentConfig, fleet: Fleet) -> Iterator[ConfigError]:
    """Rules that fire about it already."""
    accepted = _about(asked.agent, fleet) if asked.because else []
    for alert in fleet.alerts.values():
        if alert.action == "rollback" and not alert.dry_run and concerns(alert, asked.agent, agent.host):
            if alert in accepted:
                continue
            yield ConfigError(
                f"rule {alert.rule} fires already ({alert.summary or alert.labels})",
                hint="mend that first: a bad candidate could not be told from it",
            )


def busy(name: str, agent: AgentConfig, fleet: Fleet, in_flight: str) -> Iterator[ConfigError]:
    """Why its host can be asked for nothing of this agent now."""
    if not _is_up(agent, fleet):
        yield ConfigError(f"host {agent.host} is not up", hint=f"start it: interlock host --name {agent.host}")
    if in_flight:
        yield ConfigError(
            f"migration {in_flight} of {name} is in flight", hint=f"wait for it, or: interlock rollback {name}"
        )


def _is_up(agent: AgentConfig, fleet: Fleet) -> bool:
    host = fleet.hosts.get(agent.host)
    return host is not None and host.up


def _about(name: str, fleet: Fleet) -> list[Alert]:
    """Alerts that say its permanent revision is sick: no reason to keep it, if somebody says why it is replaced."""
    return [
        alert for alert in fleet.alerts.values()
        if alert.action == "rollback" and not alert.dry_run and alert.labels.get("agent") == name
        and alert.labels.get("role") != "candidate"
    ]  # fmt: skip
