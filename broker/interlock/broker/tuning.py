"""What our ZeroMQ links are set to: limits, and libzmq's options by their names. `sockets.py` applies them."""

from __future__ import annotations

from dataclasses import dataclass, field

from interlock.broker.connections import PINGS

# A half-open link is known within 2 s, on both sides. Servers don't ping: it would cost them four times as much.
HEARTBEAT_S = 1.0  # clients ping each link this often, in a fleet of up to 400 hosts,
HEARTBEAT_TIMEOUT = 0.9  # and give it up when nothing comes for so many of these times after a ping;
HEARTBEAT_TTL = 1.8  # they let libzmq on the server give it up so many after the last ping, if nothing else came
# A ping and its answer cost a broker 40 us, and more in a large fleet, since libzmq goes through all its timers to end
# one: with 5,000 hosts all of a core, and who is answered late gives up a link that is sound and comes back, which
# costs 1 ms. A larger fleet pings less often (`config.HOSTS_PER_S`), sets no timer for it on the server, and its
# kernels watch the links: TCP asks the other kernel after some seconds without a byte, again after one more without
# an answer, and gives the link up 0.4 s after that: one lost packet must not end a link.
KEEPALIVE = 0.2  # of the time between pings: 5 s with 10,000 hosts, whose links were 80,000 packets a second otherwise,
KEEPALIVE_S = 1  # and at least, with up to 2,000
KEEPALIVE_PROBES = 2
UNSENT_MS = 1400
HANDSHAKE_MS = 10_000  # a handshake ends within this, or begins anew: 5,000 at once take a broker so long, 1.1 ms each,
HANDSHAKE = 4  # and within so many times between pings: who begins anew makes all others wait longer
BACKLOG = 4096  # connections that wait to be accepted: the default of Linux; who finds no room asks after 1, 3, 7 s
RECONNECT_MS, RECONNECT_MAX_MS = 50, 1000  # between attempts to connect, doubled until the second
STARTING_MS = 10  # the same to a program of this machine that is just starting: so late it is found, and no later
MAX_MESSAGE = 1 << 21  # bytes per frame; a peer that sends more is disconnected
MAX_SUBSCRIPTION = 2048  # the same on a feed, where nothing but subscriptions and the greeting comes in
LINGER_MS = 200  # what a closing socket may still deliver: the last rollback still leaves
METADATA = "METADATA"  # ZMQ_METADATA, which pyzmq has no name for
ZAP_DOMAIN = "interlock"

Options = dict[str, int | bytes]


@dataclass(frozen=True)
class Curve:
    """Our CURVE key pair, and the public key of the server that we connect to where none is named (32 bytes each)."""

    public: bytes
    secret: bytes = field(repr=False)
    server: bytes


def link(*, pings: bool, heartbeat_s: float = HEARTBEAT_S, starting: bool = False) -> Options:
    """Of every socket. `pings`: this end finds out whether the other is still there, and lets it find out too.

    starting: the peer may not be there yet, and is waited for.
    """
    every_ms = round(heartbeat_s * 1000)
    options: Options = {
        "LINGER": LINGER_MS,
        "HANDSHAKE_IVL": max(HANDSHAKE_MS, HANDSHAKE * every_ms),
        "BACKLOG": BACKLOG,
        "RECONNECT_IVL": RECONNECT_MS,
        "RECONNECT_IVL_MAX": RECONNECT_MAX_MS,
    }
    if starting:
        options |= {"RECONNECT_IVL": STARTING_MS, "RECONNECT_IVL_MAX": 0}
    if pings:
        options |= {
            "HEARTBEAT_IVL": every_ms,
            "HEARTBEAT_TIMEOUT": round(every_ms * HEARTBEAT_TIMEOUT),
            "HEARTBEAT_TTL": round(every_ms * HEARTBEAT_TTL),
            METADATA: f"{PINGS}:{every_ms}".encode(),
        }
    if heartbeat_s > HEARTBEAT_S:
        idle_s = max(KEEPALIVE_S, round(heartbeat_s * KEEPALIVE))
        options |= {
            "HEARTBEAT_TTL": 0,
            "TCP_KEEPALIVE": 1,
            "TCP_KEEPALIVE_IDLE": idle_s,
            "TCP_KEEPALIVE_INTVL": KEEPALIVE_S,
            "TCP_KEEPALIVE_CNT": KEEPALIVE_PROBES,
            "TCP_MAXRT": idle_s * 1000 + UNSENT_MS,
        }
    return options


def encryption(curve: Curve, server: bytes, *, binds: bool) -> Options:
    """Of a socket with these keys. server: the public key of whom it connects to, where that is not the broker."""
    options: Options = {"CURVE_SECRETKEY": curve.secret, "CURVE_PUBLICKEY": curve.public}
    if binds:
        # no connection where nobody answers for it
        return options | {"CURVE_SERVER": 1, "ZAP_ENFORCE_DOMAIN": 1}
    return options | {"CURVE_SERVERKEY": server or curve.server}


def of_kind(kind: str, *, manual: bool = False, mandatory: bool = False, relaxed: bool = False) -> Options:
    """Of sockets of one kind: see `Sockets.open`."""
    match kind:
        case "xpub":
            return {"XPUB_VERBOSE": 1, "XPUB_MANUAL": int(manual)}
        case "router" if mandatory:
            return {"ROUTER_MANDATORY": 1}
        case "req" if relaxed:
            return {"REQ_RELAXED": 1, "REQ_CORRELATE": 1}
    return {}
