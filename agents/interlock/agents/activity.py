"""An agent's turns at work, in its own process: what runs only while this instance is the active one.

An agent with an endpoint is active from the end of `setup` on. One without is told by its host when its turn begins and
when it ends; the host hears that it ended only after all that was begun in it has stopped.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from interlock.agents.agent import Agent

Watched = Callable[..., Awaitable[None]]  # runs a task of the agent, and notes its crash
Call = Callable[[Callable[[], Any]], Awaitable[Any]]  # runs a hook, in a thread where it is a plain def


class Activity:
    """`begin` and `end` a turn; each returns when that is done. `names`: the methods marked @while_active."""

    def __init__(self, agent: Agent, names: list[str], *, call: Call, watched: Watched, log: logging.Logger) -> None:
        self._agent = agent
        self._names = names
        self._call = call
        self._watched = watched
        self._log = log
        self._one_at_a_time = trio.Lock()
        self._over: trio.Event | None = None  # of the turn that goes on
        self._ended = trio.Event()
        self._began = trio.Event()
        self._threads = trio.CapacityLimiter(max(1, len(names)))
        agent._wait_active = self._until_active
        agent.active = False

    async def begin(self, nursery: trio.Nursery) -> None:
        """Raises what `activated` raises; then there is no turn."""
        async with self._one_at_a_time:
            if self._over is not None:
                return
            await self._call(self._agent.activated)
            self._over, self._ended = trio.Event(), trio.Event()
            self._agent.active = True
            self._began.set()
            nursery.start_soon(self._turn, self._over, self._ended)
            self._log.info("active")

    async def end(self) -> None:
        """Raises what `deactivated` raises; all tasks of the turn have ended in any case."""
        async with self._one_at_a_time:
            if self._over is None:
                return
            self._agent.active = False
            self._began = trio.Event()
            self._over.set()
            self._over = None
            await self._ended.wait()
            await self._call(self._agent.deactivated)
            self._log.info("on standby")

    async def _turn(self, over: trio.Event, ended: trio.Event) -> None:
        stop = threading.Event()
        try:
            async with trio.open_nursery() as nursery:
                for name in self._names:
                    method = getattr(self._agent, name)
                    if inspect.iscoroutinefunction(method):
                        nursery.start_soon(self._watched, f"task {name}", method)
                    else:
                        nursery.start_soon(self._watched, f"thread {name}", self._in_thread, method, stop)
                await over.wait()
                stop.set()
                nursery.cancel_scope.cancel()
        finally:
            stop.set()
            ended.set()

    async def _in_thread(self, method: Callable[[threading.Event], None], stop: threading.Event) -> None:
        """Never left behind: as long as it runs, the turn has not ended."""
        await trio.to_thread.run_sync(method, stop, limiter=self._threads)

    async def _until_active(self) -> None:
        await trio.lowlevel.checkpoint()
        while not self._agent.active:
            await self._began.wait()
