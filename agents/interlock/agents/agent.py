"""The base class of agents written in Python.

An agent is a class. Its methods marked with `@handler` answer requests, those marked with `@background` run as tasks
while it serves, those marked with `@thread` run as threads that are told to stop. `setup`, `teardown`, `health` and the
handlers may be `async def`, or plain `def`: then they run in a thread, and may block.

This module needs the standard library only, so that an agent's own tests can import it and call its methods.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, TypeVar

from interlock.agents.gpu_lease import Gpu

MAX_METRICS = 200  # names per instance: each becomes a series of its own, and dashboards list them all
MARK = "__interlock__"  # the attribute that a decorator leaves on a method

_METRIC = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
_ACTION = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")

F = TypeVar("F", bound=Callable[..., Any])


class RequestError(Exception):
    """Raised by a handler to answer with an error of its own: a `code` for programs, a `message` for people."""

    def __init__(self, code: str, message: str = "") -> None:
        super().__init__(message or code)
        self.code = code
        self.message = message or code


class HandlerMark(NamedTuple):
    action: str
    idempotent: bool
    side_effects: bool = False


class BackgroundMark:
    pass


class ThreadMark:
    pass


class ActiveMark:
    pass


def handler(action: str = "", *, idempotent: bool = False, side_effects: bool = False) -> Callable[[F], F]:
    """The method answers requests whose "action" is `action` (by default its own name).

    idempotent: asking twice is as good as asking once, so a request whose answer was lost may be sent again.
    side_effects: it does something outside, so a request is never mirrored to a candidate, idempotent or not.
    """
    if not isinstance(action, str):
        raise TypeError('write @handler("name") or @handler(), with parentheses')
    if action and not _ACTION.fullmatch(action):
        raise ValueError(f"{action!r} can't be an action: use up to 64 letters, digits, dots, dashes or underscores")

    def mark(method: F) -> F:
        setattr(method, MARK, HandlerMark(action or method.__name__, idempotent, side_effects))
        return method

    return mark


def background(method: F) -> F:
    """The `async def` method runs as a task from the end of `setup` until the agent stops.

    If it raises, the agent goes on serving but is unhealthy from then on; returning is no fault.
    """
    setattr(method, MARK, BackgroundMark())
    return method


def thread(method: F) -> F:
    """The method runs in a thread of its own, and returns soon after the `threading.Event` it is given is set.

    If it raises, the agent goes on serving but is unhealthy from then on; returning is no fault.
    """
    setattr(method, MARK, ThreadMark())
    return method


def while_active(method: F) -> F:
    """The method runs only while this instance is the active one of its agent, each time from the beginning.

    `async def`: a task that is cancelled when the turn ends. Plain `def`: a thread, given a `threading.Event` that is
    set then. Another instance begins only after it has returned; one that takes longer than `stop_timeout_s` is killed.
    """
    setattr(method, MARK, ActiveMark())
    return method


class Counter:
    """A number that only grows."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock
        self.value = 0.0

    def add(self, amount: float = 1.0) -> None:
        """ValueError if `amount` is negative or not a number: a counter never falls."""
        if not amount >= 0:
            raise ValueError(f"a counter can't grow by {amount}")
        with self._lock:
            self.value += amount


class Metrics:
    """The agent's own numbers, read by the host and published as `agent_<name>`. Safe to use from any thread.

    Beyond `MAX_METRICS` names, new ones are dropped and the log says so once: a name made from a request would
    otherwise grow without end.
    """

    def __init__(self, log: logging.Logger | None = None) -> None:
        self._lock = threading.Lock()
        self._gauges: dict[str, float] = {}
        self._counters: dict[str, Counter] = {}
        self._log = log or logging.getLogger("agent")
        self._full = False

    def gauge(self, name: str, value: float) -> None:
        """Set a number that goes up and down. ValueError for a name that Prometheus would not take."""
        number = float(value)
        with self._lock:
            if self._admit(name, name in self._gauges, name in self._counters):
                self._gauges[name] = number

    def counter(self, name: str) -> Counter:
        """The counter of that name, made when first asked for. ValueError as for `gauge`."""
        with self._lock:
            known = self._counters.get(name)
            if known is None:
                known = Counter(threading.Lock())
                if self._admit(name, False, name in self._gauges):
                    self._counters[name] = known
            return known

    def values(self) -> dict[str, float]:
        with self._lock:
            return {**self._gauges, **{name: counter.value for name, counter in self._counters.items()}}

    def _admit(self, name: str, known: bool, other_kind: bool) -> bool:
        if known:
            return True
        if other_kind:
            raise ValueError(f"metric {name!r} is already of the other kind")
        if not _METRIC.fullmatch(name):
            raise ValueError(f"{name!r} can't be a metric: use letters, digits and underscores, no digit first")
        if len(self._gauges) + len(self._counters) < MAX_METRICS:
            return True
        if not self._full:
            self._full = True
            self._log.warning("metric %s dropped: an agent has at most %d", name, MAX_METRICS)
        return False


class Agent:
    """Base of every class agent. Subclasses add handlers and override the hooks below; none has to."""

    def __init__(
        self,
        *,
        name: str = "agent",
        revision: str = "",
        instance: str = "",
        config: dict[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.revision = revision
        self.instance = instance
        self.config: dict[str, Any] = config if config is not None else {}
        self.log = logging.getLogger(f"agent.{name}")
        self.metrics = Metrics(self.log)
        self.gpu = Gpu()  # where it reserves GPU memory
        self.active = True  # this instance is the one that works: of several, the others wait
        self._wait_active: Callable[[], Awaitable[None]] | None = None

    async def until_active(self) -> None:
        """Returns once this instance is the active one: at once, if it has an endpoint and no state to hand over."""
        if self._wait_active is not None:
            await self._wait_active()

    def setup(self) -> Awaitable[None] | None:
        """Open what the agent needs. Requests are answered only after it; raising ends the process with exit code 1."""
        return None

    def teardown(self) -> Awaitable[None] | None:
        """Close what `setup` opened. Runs after the last request in flight, if `setup` came to its end."""
        return None

    def health(self) -> Awaitable[dict[str, Any] | bool | None] | dict[str, Any] | bool | None:
        """None or True: well. False, {"ok": False, "detail": "why"} or an exception: not well."""
        return None

    def snapshot(self) -> Any:
        """The state in memory that another process is to go on with: bytes, or an iterable (async too) of bytes.

        Called while no request is in hand and nothing marked `@while_active` runs. Changing nothing is part of the
        bargain: where the hand-over fails, this instance goes on with what it has. Override `restore` too.
        """
        raise NotImplementedError

    def restore(self, state: Any) -> Awaitable[None] | None:
        """Take over what `snapshot` of another instance gave: bytes if it gave bytes, else an iterator of bytes.

        A plain `def` gets an ordinary iterator, and runs in a thread; an `async def` an async one. Raising means that
        the state was not taken, and leaves this instance as it was before.
        """
        raise NotImplementedError

    def activated(self) -> Awaitable[None] | None:
        """A turn at work begins: take what only one instance may have. Raising means that there is no turn."""
        return None

    def deactivated(self) -> Awaitable[None] | None:
        """A turn ended, all `@while_active` has returned: give back what only one instance may have. Be quick."""
        return None
