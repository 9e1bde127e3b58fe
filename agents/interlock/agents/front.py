"""Which gateway fronts an agent. A host imports those that its agents have, and no others: its start is waited for."""

from __future__ import annotations

from functools import partial

from interlock.agents.gateway import Gateway, ZmqGateway
from interlock.agents.launch import Instance
from interlock.broker.config import AgentConfig
from interlock.broker.sockets import Sockets


def open_gateway(agent: str, config: AgentConfig, sockets: Sockets) -> Gateway:
    """The gateway that fits the agent's public endpoint; `run` binds it."""
    if config.endpoint.startswith("http://"):
        from interlock.agents.http_gateway import HttpGateway

        return HttpGateway(agent, config.endpoint, request_timeout_s=config.request_timeout_s, hold_s=config.hold_s)
    if not config.endpoint:
        from interlock.agents.token_gateway import TokenGateway

        return TokenGateway(agent)
    if config.endpoint.startswith("stream://"):
        from interlock.agents.stream_gateway import StreamGateway

        return StreamGateway(agent, config.endpoint, hold_s=config.hold_s)
    return ZmqGateway(agent, config.endpoint, sockets, request_timeout_s=config.request_timeout_s, hold_s=config.hold_s)


def admit(gateway: Gateway, instance: Instance) -> None:
    """An instance is healthy: its gateway knows it from now on, and gives it nothing yet."""
    if not instance.config.endpoint:
        from interlock.agents.token_gateway import TokenGateway

        if isinstance(gateway, TokenGateway):
            gateway.hold(instance.name, instance)
            return
    gateway.attach(
        instance.name,
        instance.requests,
        window=instance.window,
        idempotent=instance.idempotent,
        mirrorable=instance.mirrorable,
    )
    instance.on_reach = partial(gateway.reach, instance.name)
    instance.on_reach(instance.reachable)
