"""`python -m interlock.agents.fixed_ports 7200=41001 [8200=41002] SCRIPT [ARGUMENT...]`: a script with fixed ports.

A script that binds a port which is written in it can't run twice on a machine, and so can't be moved. Run by this,
what it binds at the first number of a pair is bound at the second one instead, on 127.0.0.1: the host stands in front
of it at the first. ZeroMQ's and Python's own sockets are known, and so what is built on them, such as HTTP servers
and asyncio; programs that the script starts are not.
"""

from __future__ import annotations

import os
import re
import runpy
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

EXIT_USAGE = 2
LOOPBACK = "127.0.0.1"

_PAIR = re.compile(r"(\d{1,5})=(\d{1,5})")
_ENDPOINT = re.compile(r"(tcp://.+):(\d{1,5})")


def endpoint_for(endpoint: Any, ports: Mapping[int, int]) -> Any:
    """Of ZeroMQ: the endpoint that is bound instead; what is none of ours stays."""
    text = endpoint.decode("utf-8", "replace") if isinstance(endpoint, bytes) else endpoint
    found = _ENDPOINT.fullmatch(text) if isinstance(text, str) else None
    if found is None or int(found[2]) not in ports:
        return endpoint
    return f"tcp://{LOOPBACK}:{ports[int(found[2])]}"


def address_for(address: Any, ports: Mapping[int, int]) -> Any:
    """Of Python's sockets: the address that is bound instead, in the family that it is of."""
    if not isinstance(address, tuple) or len(address) < 2 or address[1] not in ports:
        return address
    host = address[0] if ":" in str(address[0]) else LOOPBACK
    return (host, ports[address[1]], *address[2:])


def replace(ports: Mapping[int, int]) -> None:
    """From now on, in this process and in those that it forks."""
    plain = socket.socket.bind

    def bind(self: socket.socket, address: Any) -> None:
        plain(self, address_for(address, ports))

    socket.socket.bind = bind  # type: ignore[method-assign,assignment]
    try:
        import zmq
    except ImportError:  # of the script's own environment: it has no use for it
        return
    plain_zmq = zmq.Socket.bind

    def bind_zmq(self: Any, addr: Any) -> Any:
        return plain_zmq(self, endpoint_for(addr, ports))

    zmq.Socket.bind = bind_zmq  # type: ignore[method-assign]


def main(arguments: Sequence[str] | None = None) -> None:
    rest = list(sys.argv[1:] if arguments is None else arguments)
    ports: dict[int, int] = {}
    while rest and (found := _PAIR.fullmatch(rest[0])) is not None:
        ports[int(found[1])] = int(found[2])
        del rest[0]
    if not ports or not rest:
        print("usage: python -m interlock.agents.fixed_ports PORT=PORT... SCRIPT [ARGUMENT...]", file=sys.stderr)
        raise SystemExit(EXIT_USAGE)
    if not Path(rest[0]).is_file():
        print(f"interlock: there is no script {rest[0]}", file=sys.stderr)
        raise SystemExit(EXIT_USAGE)
    replace(ports)
    sys.argv = rest
    sys.path.insert(0, os.path.dirname(os.path.abspath(rest[0])))  # as `python SCRIPT` does
    runpy.run_path(rest[0], run_name="__main__")


if __name__ == "__main__":
    main()
