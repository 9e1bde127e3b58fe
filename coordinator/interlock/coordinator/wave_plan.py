"""Which agents a wave moves, and in which order. Pure: the request, the fleet file, and the fleet of the log."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from interlock.broker import commands, facts
from interlock.broker.config import FleetConfig
from interlock.broker.errors import ConfigError
from interlock.broker.facts import WaveMember
from interlock.broker.strategies import BUILT_IN, STRATEGY_OF
from interlock.coordinator.admission import freeze, near
from interlock.coordinator.fleet import Fleet

MEMBERS = 1000  # of a wave: its table still fits into one event, of 1 MiB


@dataclass(frozen=True)
class Asker:
    """Whose request it is: the wave's id to be, the event's id, the operator."""

    wave: str
    request: str
    by: str


def plan_wave(
    asked: commands.StartWave, config: FleetConfig, fleet: Fleet, asker: Asker, *, taken: Mapping[str, str], now: float
) -> facts.WaveStarted:
    """ConfigError if it can't be. taken: agents that are in a wave already, and which."""
    _check(asked, config, now)
    wanted = _wanted(asked, config)
    left_out, members = {}, {}
    for agent, to in wanted.items():
        slot = fleet.agents.get(agent)
        previous = slot.permanent if slot is not None else ""
        if previous == to:
            left_out[agent] = f"serves {to} already"
        else:
            members[agent] = WaveMember(agent=agent, previous=previous, to=to)
    if not members:
        why = "; ".join(f"{agent} {reason}" for agent, reason in left_out.items())
        raise ConfigError("there is nobody to move" + (f": {why}" if why else ""), hint="see: interlock status")
    if len(members) > MEMBERS:
        raise ConfigError(f"{len(members)} agents", hint=f"at most {MEMBERS} in one wave")
    busy = sorted(agent for agent in members if agent in taken)
    if busy:
        waves = ", ".join(f"{agent} in {taken[agent]}" for agent in busy)
        raise ConfigError(f"already moved by another wave: {waves}", hint=f"interlock wave stop {taken[busy[0]]}")
    budget = max(asked.budget, int(asked.budget_share * len(members)))
    return facts.WaveStarted(
        wave=asker.wave, request=asker.request, by=asker.by, members=_ordered(asked, members, config),
        order=asked.order, parallel=asked.parallel, budget=budget, strategy=asked.strategy, level=asked.level,
        because=asked.because, left_out=left_out,
    )  # fmt: skip


def _check(asked: commands.StartWave, config: FleetConfig, now: float) -> None:
    if bool(asked.revisions) == bool(asked.to):
        raise ConfigError("it takes either one revision for all, or one for each agent", hint="--to, or --plan")
    if not 1 <= asked.parallel <= MEMBERS:
        raise ConfigError(f"{asked.parallel} at once", hint=f"1 to {MEMBERS}")
    if asked.budget < 0 or not 0 <= asked.budget_share <= 1:
        raise ConfigError("a failure budget is a number from 0 on, or a share from 0 to 100 %")
    if asked.strategy is not None and asked.level is not None:
        raise ConfigError("both a level and a strategy are asked for", hint="a level says the strategy: leave one away")
    if asked.strategy is not None and asked.strategy not in BUILT_IN:
        raise ConfigError(f"there is no strategy {asked.strategy!r}", hint=near(asked.strategy, BUILT_IN))
    if asked.level is not None and asked.level not in STRATEGY_OF:
        raise ConfigError(f"there is no level {asked.level!r}", hint=near(asked.level, STRATEGY_OF))
    if asked.host and asked.host not in config.hosts:
        raise ConfigError(f"there is no host {asked.host!r}", hint=near(asked.host, config.hosts))
    frozen = freeze(config, now)
    if frozen is not None and not asked.because:
        what = f"the fleet is frozen from {frozen.start} to {frozen.end}: {frozen.because}"
        raise ConfigError(what, hint="if it must be now, say why: --because TEXT")


def _wanted(asked: commands.StartWave, config: FleetConfig) -> dict[str, str]:
    """Revisions by agent. Who is named must be there; who is only found by a filter is left away if he does not fit."""
    for agent in [*asked.revisions, *asked.agents]:
        if agent not in config.agents:
            raise ConfigError(f"there is no agent {agent!r}", hint=near(agent, config.agents))
    named = dict(asked.revisions) if asked.revisions else dict.fromkeys(asked.agents, asked.to)
    for agent, to in named.items():
        if to not in config.agents[agent].revisions:
            hint = near(to, config.agents[agent].revisions)
            raise ConfigError(f"agent {agent} has no revision {to!r}", hint=hint)
    if not named:
        named = {name: asked.to for name, agent in config.agents.items() if asked.to in agent.revisions}
        if not named:
            every = {revision for agent in config.agents.values() for revision in agent.revisions}
            raise ConfigError(f"no agent has a revision {asked.to!r}", hint=near(asked.to, every))
    return {
        agent: to
        for agent, to in named.items()
        if asked.category in ("", config.agents[agent].category) and asked.host in ("", config.agents[agent].host)
    }


def _ordered(asked: commands.StartWave, members: Mapping[str, WaveMember], config: FleetConfig) -> list[WaveMember]:
    match asked.order:
        case "name":
            return [members[agent] for agent in sorted(members)]
        case "host":
            return [members[agent] for agent in sorted(members, key=lambda agent: (config.agents[agent].host, agent))]
    found = []
    needs = {agent: _needs(agent, config) & members.keys() for agent in members}
    for agent in _by_dependency(members, config):
        further = {each for needed in needs[agent] for each in needs[needed]}  # said of those already
        member, after = members[agent], sorted(needs[agent] - further)
        found.append(WaveMember(agent=agent, previous=member.previous, to=member.to, after=after))
    return found


def _by_dependency(members: Iterable[str], config: FleetConfig) -> list[str]:
    """Each after all that it depends on, also by way of agents that are not moved; else by name."""
    needs = {agent: _needs(agent, config) for agent in sorted(members)}
    for agent, needed in needs.items():
        if agent in needed:
            circle = " -> ".join(_circle(agent, config))
            raise ConfigError(
                f"agents depend on each other in a circle: {circle}", hint="--order host, or --order name"
            )
    pending = {agent: len(needed & needs.keys()) for agent, needed in needs.items()}
    dependents: dict[str, list[str]] = {agent: [] for agent in needs}
    for agent, needed in needs.items():
        for each in needed & needs.keys():
            dependents[each].append(agent)
    ready = [agent for agent, count in pending.items() if not count]  # sorted, so a heap
    found = []
    while ready:
        found.append(heapq.heappop(ready))
        for agent in dependents[found[-1]]:
            pending[agent] -= 1
            if not pending[agent]:
                heapq.heappush(ready, agent)
    return found


def _needs(agent: str, config: FleetConfig) -> set[str]:
    """All agents that it depends on, directly or not."""
    found: set[str] = set()
    todo = [agent]
    while todo:
        for needed in config.agents[todo.pop()].depends:
            if needed in config.agents and needed not in found:
                found.add(needed)
                todo.append(needed)
    return found


def _circle(agent: str, config: FleetConfig) -> list[str]:
    """The agents of a shortest circle through this one, with it at both ends."""
    before: dict[str, str] = {}
    todo = [agent]
    while agent not in before:
        here = todo.pop(0)
        for needed in config.agents[here].depends:
            if needed in config.agents and needed not in before:
                before[needed] = here
                todo.append(needed)
    trail = [agent, before[agent]]
    while trail[-1] != agent:
        trail.append(before[trail[-1]])
    return trail[::-1]
