"""What rules would have done on a recorded day: the engine over a recording, with the recording's times. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from interlock.coordinator.rules.alerts import Transition
from interlock.coordinator.rules.engine import SCAN_PERIOD_S, Engine
from interlock.coordinator.rules.recording import Taken
from interlock.coordinator.rules.rule import Rule

FINE_S = 30.0  # after so long without a sample, all that time alone brings came, but what is told in minutes
COARSE_S = 1.0  # between looks from then on: a recording may have holes of hours


def replay(
    taken: Iterable[Taken], rules: Sequence[Rule], *, engine: Engine | None = None
) -> Iterator[tuple[float, Transition]]:
    """(when, transition) in their order; what is pending is told too, as states are.

    A sample is taken in at the time it was measured at: what it waited on its way isn't recorded.
    """
    engine = engine or Engine(rules)
    now: float | None = None
    for each in taken:
        if each.events and not each.samples and not each.ended:
            continue
        at = each.time if now is None else max(now, each.time)
        if now is not None:
            yield from _passing(engine, now, at)
        now = at
        made = engine.ingest(each.samples.items(), each.ended, each.time, at, publisher=each.source)
        while engine.backlog:
            engine.bind()
        yield from ((at, transition) for transition in made)
    if now is not None:
        yield from _passing(engine, now, now + SCAN_PERIOD_S)


def _passing(engine: Engine, since: float, until: float) -> Iterator[tuple[float, Transition]]:
    at = since
    while True:
        at += SCAN_PERIOD_S if at < since + FINE_S else COARSE_S
        if at > until:
            return
        yield from ((at, transition) for transition in engine.tick(at))
