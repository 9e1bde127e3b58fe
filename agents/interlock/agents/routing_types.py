"""What the routing core speaks of: the commands that it returns, and its records of requests, copies and instances."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, Generic, TypeVar

import msgspec

from interlock.agents.latency import Tally

ClientT = TypeVar("ClientT")
BodyT = TypeVar("BodyT")
AnswerT = TypeVar("AnswerT")


class Send(msgspec.Struct, Generic[BodyT], frozen=True):
    """Give the request to the instance. Not possible right now: say so with `failed(..., sent=False)`."""

    instance: str
    copy: int
    body: BodyT
    mirrored: bool


class Reply(msgspec.Struct, Generic[ClientT, AnswerT], frozen=True):
    client: ClientT
    answer: AnswerT


class Fail(msgspec.Struct, Generic[ClientT, BodyT], frozen=True):
    """Answer with an error. code: instance-died, timeout, overloaded, quarantined or no-instance."""

    client: ClientT
    body: BodyT
    code: str
    message: str


class Compare(msgspec.Struct, Generic[BodyT, AnswerT], frozen=True):
    """Both answers to a mirrored request are there, or the candidate (`instance`) owes its own for too long."""

    instance: str
    body: BodyT
    old: AnswerT
    new: AnswerT | None
    old_latency: float
    new_latency: float | None


class Answered(msgspec.Struct, frozen=True):
    """The instance answered a request that it was given after `watch`."""

    tag: Any
    time: float


class Gone(msgspec.Struct, frozen=True):
    """Nothing is expected of the instance any more: close what leads to it."""

    instance: str


class MirrorPair(Generic[AnswerT]):
    __slots__ = ("has_new", "has_old", "instance", "new", "new_latency", "old", "old_latency", "waits")

    def __init__(self, instance: Instance[Any]) -> None:
        self.instance = instance
        self.waits = True  # its copy was not sent yet
        self.has_old = self.has_new = False
        self.old: AnswerT | None = None
        self.new: AnswerT | None = None
        self.old_latency = 0.0
        self.new_latency: float | None = None


class Request(Generic[ClientT, BodyT]):
    __slots__ = (
        "arrived",
        "attempts",
        "body",
        "client",
        "copies",
        "done",
        "hedging",
        "id",
        "pair",
        "peer",
        "size",
        "waits",
    )

    def __init__(self, id: int, client: ClientT, peer: Hashable, body: BodyT, *, size: int, arrived: float) -> None:
        self.id = id
        self.client = client
        self.peer = peer
        self.body = body
        self.size = size
        self.arrived = arrived
        self.attempts = 0
        self.done = False  # its client has, or is getting, the reply
        self.waits = False  # stands in the line
        self.hedging = False  # waits to be given to a second instance
        self.copies: list[Copy] = []
        self.pair: MirrorPair[Any] | None = None


class Copy:
    __slots__ = ("id", "instance", "latency", "mirrored", "request", "sent", "wins")

    def __init__(
        self, id: int, request: Request[Any, Any], instance: Instance[Any], now: float, mirrored: bool
    ) -> None:
        self.id = id
        self.request = request
        self.instance = instance
        self.sent = now
        self.mirrored = mirrored
        self.latency: float | None = None
        self.wins = False  # its answer is the one that the client gets


class Instance(Generic[BodyT]):
    __slots__ = (
        "blocked_until",
        "copies",
        "ends_at",
        "idempotent",
        "mirrorable",
        "name",
        "reachable",
        "suspect",
        "tally",
        "watches",
        "window",
    )

    def __init__(
        self, name: str, window: int, idempotent: Callable[[BodyT], bool], mirrorable: Callable[[BodyT], bool]
    ) -> None:
        self.name = name
        self.window = window
        self.idempotent = idempotent
        self.mirrorable = mirrorable
        self.copies: dict[int, Copy] = {}
        self.tally = Tally()
        self.watches: list[tuple[int, Any]] = []
        self.blocked_until = float("-inf")
        self.reachable = True
        self.suspect: Request[Any, BodyT] | None = None  # what it had alone in hand when the way to it broke
        self.ends_at = float("inf")  # of a lost one: until then its last answers may still come in

    @property
    def lost(self) -> bool:
        return self.ends_at != float("inf")

    def owed(self) -> Iterable[Copy]:
        """Copies whose answer a client waits for."""
        return (c for c in self.copies.values() if not c.mirrored and (c.wins or not c.request.done))
