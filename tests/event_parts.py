"""Events as a log has them, for tests of what is folded from it."""

from __future__ import annotations

from interlock.broker import commands, facts, topics, wire
from interlock.broker.policy import BY_HOST
from interlock.broker.wire import Body, Event, Header


def topic_of(body: Body, host: str = "") -> str:
    """Where an honest sender says it; `host`: the one that says it instead, or of which a rollback is asked."""
    if isinstance(body, BY_HOST):
        return topics.host_fact(host or body.host)
    if isinstance(body, commands.RollBack):
        return topics.rollback(host or "alpha")
    if isinstance(body, facts.FleetSnapshot):
        return topics.FLEET_SNAPSHOT
    return "fact/test/"


def logged(body: Body, seq: int, at: float | None = None, *, host: str = "", source: str = "test") -> Event:
    """Event `seq` of a log, said and logged at second `at` (left out: a second apart)."""
    raw, time = wire.encode(body), float(seq) if at is None else at
    header = Header(id=str(seq), source=f"host/{host}" if host else source, time=time, seq=seq, logged=time)
    return Event(topic_of(body, host), header, wire.decode_body(raw), raw)
