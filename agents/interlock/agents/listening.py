"""Listening at an agent's public endpoint, and connecting to its instances."""

from __future__ import annotations

import errno

import trio

from interlock.broker.errors import ConfigError, InUse

BACKLOG = 1024  # connections that the kernel holds until they are accepted


def place_of(endpoint: str) -> tuple[str, int]:
    """Host and port of scheme://host:port."""
    host, _, port = endpoint.partition("://")[2].rstrip("/").rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError("is no endpoint with an address and a port", where=endpoint)
    return host, int(port)


async def open_listeners(endpoint: str) -> tuple[list[trio.SocketListener], str]:
    """Listeners at scheme://host:port, and the endpoint with its real port. InUse or ConfigError if it can't be."""
    host, port = place_of(endpoint)
    try:
        listeners = await trio.open_tcp_listeners(port, host=None if host == "*" else host, backlog=BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            hint = "who listens there? try: ss -ltnp"
            raise InUse("the address is in use", where=endpoint, hint=hint) from None
        raise ConfigError(f"can't bind: {error}", where=endpoint) from None
    scheme = endpoint.partition("://")[0]
    return listeners, f"{scheme}://{host}:{listeners[0].socket.getsockname()[1]}"
