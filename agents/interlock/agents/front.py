"""Which gateway fronts an agent."""

from __future__ import annotations

from interlock.agents.gateway import Gateway, ZmqGateway
from interlock.agents.http_gateway import HttpGateway
from interlock.agents.launch import Instance
from interlock.agents.stream_gateway import StreamGateway
from interlock.agents.token_gateway import TokenGateway
from interlock.broker.config import AgentConfig
from interlock.broker.sockets import Sockets


def open_gateway(agent: str, config: AgentConfig, sockets: Sockets) -> Gateway:
    """The gateway that fits the agent's public endpoint; `run` binds it."""
    if config.endpoint.startswith("http://"):
        return HttpGateway(agent, config.endpoint, request_timeout_s=config.request_timeout_s, hold_s=config.hold_s)
    if not config.endpoint:
        return TokenGateway(agent)
    if config.endpoint.startswith("stream://"):
        return StreamGateway(agent, config.endpoint, hold_s=config.hold_s)
    return ZmqGateway(agent, config.endpoint, sockets, request_timeout_s=config.request_timeout_s, hold_s=config.hold_s)


def admit(gateway: Gateway, instance: Instance) -> None:
    """An instance is healthy: its gateway knows it from now on, and gives it nothing yet."""
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
