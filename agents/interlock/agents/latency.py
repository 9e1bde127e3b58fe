"""Counters of one instance, and the latencies of its last answers. Pure: the time is an argument.

A latency runs from the moment the gateway gave a request to the instance to its answer (HTTP: to the answer's head), so
that a queue in front of the instance, or a slow client behind it, is not held against it. A request that was not
answered in time counts with the time it had.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import msgspec

RING = 8192  # answers kept: a baseline of some seconds at thousands of requests a second
WINDOW_S = 1.0  # seconds that the quantiles look back: a rule sees a change within one
MIN_SAMPLES = 20  # answers at least; of fewer, a p95 is just the slowest one
SHORTEST_S = 1e-6  # a latency below the clock's grain counts as this: its logarithm must be finite
LONG_WINDOW_S = 10.0  # where the last second has fewer (a slow instance answers seldom), the newest 20 of so long count


class TrialFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Live requests since the candidate got its first: what a comparison needs, as counters.

    log_sum, log_squares_sum: of the natural logarithms of the latencies in seconds. slow: answers that took longer than
    the threshold the trial was begun with.
    """

    requests: int = 0
    errors: int = 0
    slow: int = 0
    log_sum: float = 0.0
    log_squares_sum: float = 0.0


class InstanceFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What a gateway knows of an instance. Counters since it was attached; latencies in seconds.

    requests and errors: live requests that were answered, ran out of time, or died with the instance. p50, p95, p99:
    of the last second, or the newest 20 answers of the last ten, mirrored requests included; None of fewer.
    oldest_s: how long the request that has waited longest for this instance has waited; 0 if none does. compared,
    mismatches, dropped and unjudged (their comparison failed): mirrored requests. connections: open ones that stay with
    the instance, of which there were connections_total; bytes_in and bytes_out of its clients. active: it holds the
    token of an agent without a port. None where there is no such thing.
    """

    requests: int = 0
    errors: int = 0
    in_flight: int = 0
    p50: float | None = None
    p95: float | None = None
    p99: float | None = None
    oldest_s: float = 0.0
    compared: int = 0
    mismatches: int = 0
    dropped: int = 0
    trial: TrialFigures | None = None
    unjudged: int = 0
    connections: int | None = None
    connections_total: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    active: bool | None = None


class Tally:
    """The counters and the ring behind `InstanceFigures`."""

    __slots__ = (
        "_errors", "_log_squares_sum", "_log_sum", "_on_trial", "_requests", "_ring", "_slow", "_slow_s", "compared",
        "dropped", "errors", "mismatches", "requests", "unjudged",
    )  # fmt: skip

    def __init__(self) -> None:
        self.requests = 0
        self.errors = 0
        self.compared = 0
        self.mismatches = 0
        self.dropped = 0
        self.unjudged = 0
        self._ring: deque[tuple[float, float]] = deque(maxlen=RING)
        self.begin_trial(None)

    def begin_trial(self, slow_s: float | None) -> None:
        """Count live requests anew from here, those above `slow_s` seconds apart; None: no longer."""
        self._on_trial, self._slow_s = slow_s is not None, slow_s or 0.0
        self._requests = self._errors = self._slow = 0
        self._log_sum = self._log_squares_sum = 0.0

    def record(self, now: float, latency: float, *, error: bool, live: bool) -> None:
        """An answer, or the end of waiting for one. Mirrored ones (not `live`) count for the latencies only."""
        self._ring.append((now, latency))
        if live:
            self.requests += 1
            self.errors += error
            if self._on_trial:
                self._count(latency, error)

    def _count(self, latency: float, error: bool) -> None:
        logarithm = math.log(max(latency, SHORTEST_S))
        self._requests += 1
        self._errors += error
        self._slow += latency > self._slow_s
        self._log_sum += logarithm
        self._log_squares_sum += logarithm * logarithm

    def _trial(self) -> TrialFigures | None:
        if not self._on_trial:
            return None
        return TrialFigures(
            requests=self._requests,
            errors=self._errors,
            slow=self._slow,
            log_sum=self._log_sum,
            log_squares_sum=self._log_squares_sum,
        )

    def latencies(self, seconds: float, now: float) -> list[float]:
        """Latencies of the last `seconds`, newest first; at most `RING`."""
        since = now - seconds
        found = []
        for time, latency in reversed(self._ring):
            if time < since:
                break
            found.append(latency)
        return found

    def figures(self, now: float, *, in_flight: int, oldest_s: float) -> InstanceFigures:
        newest = self.latencies(WINDOW_S, now)
        if len(newest) < MIN_SAMPLES:
            newest = self.latencies(LONG_WINDOW_S, now)[:MIN_SAMPLES]
        window = sorted(newest)
        enough = len(window) >= MIN_SAMPLES
        p50, p95, p99 = (quantile(window, q) if enough else None for q in (0.5, 0.95, 0.99))
        return InstanceFigures(
            requests=self.requests,
            errors=self.errors,
            in_flight=in_flight,
            p50=p50,
            p95=p95,
            p99=p99,
            oldest_s=oldest_s,
            compared=self.compared,
            mismatches=self.mismatches,
            dropped=self.dropped,
            trial=self._trial(),
            unjudged=self.unjudged,
        )


def quantile(ordered: Sequence[float], q: float) -> float:
    """The nearest-rank quantile of an ascending, non-empty sequence: always a value that was measured."""
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)]
