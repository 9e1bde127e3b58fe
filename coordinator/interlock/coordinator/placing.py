"""Where agents are: the fleet file says where each begins, and what the log tells of moves holds before it. Pure."""

from __future__ import annotations

import msgspec

from interlock.broker.config import AgentConfig, FleetConfig
from interlock.broker.errors import ConfigError
from interlock.coordinator.fleet import Fleet


def placed(name: str, config: FleetConfig, fleet: Fleet) -> AgentConfig:
    """The agent's settings with the host and the endpoint that it has now. KeyError if the file has no such agent."""
    agent = config.agents[name]
    slot = fleet.agents.get(name)
    if slot is None or not slot.moved or slot.host == agent.host or slot.host not in config.hosts:
        return agent
    endpoint = agent.endpoint_at(slot.host) or slot.endpoint
    return msgspec.structs.replace(agent, host=slot.host, endpoint=endpoint, endpoints={})


def deviations(config: FleetConfig, fleet: Fleet) -> dict[str, str]:
    """By agent: what the fleet file says of its place that is not so any more."""
    found = {}
    for name, agent in config.agents.items():
        slot = fleet.agents.get(name)
        if slot is not None and slot.moved and slot.host != agent.host:
            found[name] = f'it was moved to {slot.host}; the fleet file says host = "{agent.host}"'
    return found


def target_of(asked_host: str | None, name: str, agent: AgentConfig, config: FleetConfig, fleet: Fleet) -> str:
    """The other host that is asked for, or "". ConfigError if the agent can't move there. `agent`: as placed."""
    if not asked_host or asked_host == agent.host:
        return ""
    if asked_host not in config.hosts:
        raise ConfigError(f"there is no host {asked_host!r}", hint=f"known: {', '.join(sorted(config.hosts))}")
    if agent.serves == "nothing":
        raise ConfigError(f"{name} has no endpoint: an agent without a port can't move to another host yet")
    if not config.agents[name].endpoint_at(asked_host):
        raise ConfigError(
            f"the fleet file does not say where clients find {name} on {asked_host}",
            hint=f'add agents.{name}.endpoints = {{ {asked_host} = "..." }}',
        )
    for host in (agent.host, asked_host):
        if not config.hosts[host].link:
            raise ConfigError(
                f"the fleet file does not say where other hosts reach {host}", hint=f"add hosts.{host}.link"
            )
    there = fleet.hosts.get(asked_host)
    if there is None or not there.up:
        raise ConfigError(f"host {asked_host} is not up", hint=f"start it: interlock host --name {asked_host}")
    return asked_host
