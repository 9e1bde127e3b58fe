"""An agent's process at work: two sockets, one nursery, and an orderly end.

Requests come in on one ROUTER, `[peer, request id, b"", body]`, and leave in the same envelope. The host asks about the
instance on the other, `[peer, id, map]`; that one is answered also during `setup`, while requests are being answered
and while the agent stops. Whatever is not in these shapes is dropped and counted in the log.

The end: no new request is taken, those in flight are finished, background tasks are cancelled, threads are told to stop
and joined, then `teardown` runs. Each of these has a share of `stop_timeout_s`; the host kills after that.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import os
import signal
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import trio

from interlock.agents.activity import Activity
from interlock.agents.agent import Agent, RequestError
from interlock.agents.answers import MAX_BODY
from interlock.agents.contract import (
    HEALTH,
    Action,
    Contract,
    bind_arguments,
    decode_map,
    encoding_of,
    health_of,
    name_action,
    reply_error,
    reply_ok,
)
from interlock.agents.state_door import StateDoor
from interlock.broker import __version__
from interlock.broker.sockets import Socket, open_sockets

MAX_IN_FLIGHT = 256  # requests begun at once; four gateways with their usual window of 64
BLOCKING_THREADS = 64  # plain `def` handlers at once: the gateway's window, so that none waits for a thread
HEALTH_TIMEOUT_S = 10.0  # a health() that takes longer is not well; hosts give up on it sooner
MAX_HEALTH_CHECKS = 16  # at once; a health() that hangs must not pile them up
MAX_TURNS = 32  # health checks and changes of the turn at once; one host asks for one change at a time
DRAIN_SHARE = 0.6  # of stop_timeout_s, for requests in flight
THREADS_SHARE = 0.1  # for threads that were told to stop
TEARDOWN_SHARE = 0.2  # for teardown(); the rest is for leaving

_map = msgspec.msgpack.Decoder(dict[str, Any])


class Spec(msgspec.Struct, kw_only=True):
    """What the host tells a new instance, as JSON. Keys that are not known here are ignored."""

    agent: str
    entry: str  # "module:Class"
    source: str  # the folder of its code
    revision: str = ""
    instance: str = ""
    config: dict[str, Any] = {}
    requests: str = ""  # endpoint to bind for requests; not needed to check a revision
    control: str = ""  # endpoint to bind for the host's questions
    stop_timeout_s: float = 5.0  # after which the host kills
    standby: bool = False  # an agent without an endpoint: the host says when its turn at work begins
    candidate: bool = False  # so with state hooks: the turn begins once it has the state


class Serving:
    """One agent in one process. `run` returns the exit code; `stop` may be called from any task."""

    def __init__(self, spec: Spec, agent: Agent, contract: Contract) -> None:
        self._spec = spec
        self._agent = agent
        self._contract = contract
        self._log = logging.getLogger(f"agent.{spec.agent}")
        self._state = "starting"
        self._crashes: list[str] = []
        self._dropped = 0
        self._in_flight = 0
        self._stopping_at = math.inf
        self._slots = trio.Semaphore(MAX_IN_FLIGHT)
        self._pool = trio.CapacityLimiter(BLOCKING_THREADS)
        self._own_threads = trio.CapacityLimiter(math.inf)  # for hooks: never behind a handler that blocks
        self._health_turn = trio.Lock()
        self._setup_scope = trio.CancelScope()
        self._taking_scope = trio.CancelScope()
        self._activity = Activity(agent, contract.turns, call=self._call, watched=self._watched, log=self._log)
        self._turns: trio.Nursery | None = None  # of what runs while this instance is active
        self._state_door = StateDoor(agent, call=self._call, log=self._log)

    async def run(self) -> int:
        async with open_sockets() as sockets:
            control = sockets.open("router", bind=self._spec.control, label="control")
            requests = sockets.open("router", bind=self._spec.requests, label="requests", max_message=MAX_BODY)
            async with trio.open_nursery() as nursery:
                await nursery.start(self._watch_signals)
                nursery.start_soon(self._control, control)
                code = await self._live(requests)
                nursery.cancel_scope.cancel()
        return code

    def stop(self) -> None:
        if self._state != "stopping":
            self._log.info("stopping, %d requests in flight", self._in_flight)
            self._stopping_at = trio.current_time()
        self._state = "stopping"
        self._setup_scope.cancel()
        self._taking_scope.cancel()

    # --- the agent's life

    async def _live(self, requests: Socket) -> int:
        ready = False
        with self._setup_scope:
            try:
                await self._call(self._agent.setup)
            except Exception:
                self._log.exception("setup failed")
                return 1
            ready = True
        if not ready:
            return 0
        if self._state == "starting":
            self._state = "serving"
            actions = ", ".join(sorted(self._contract.actions)) or "nothing"
            self._log.info("revision %s serves %s", self._spec.revision or "-", actions)
        stop = threading.Event()
        try:
            async with trio.open_nursery() as threads, trio.open_nursery() as tasks:
                self._turns = tasks
                if not (self._spec.standby or (self._spec.candidate and self._contract.state)):
                    await self._change_turn("activate")
                for name in self._contract.threads:
                    threads.start_soon(
                        self._watched, f"thread {name}", self._run_thread, getattr(self._agent, name), stop
                    )
                for name in self._contract.backgrounds:
                    tasks.start_soon(self._watched, f"background task {name}", getattr(self._agent, name))
                await self._answer_requests(requests)
                await self._leave()
                tasks.cancel_scope.cancel()
                stop.set()
                threads.cancel_scope.deadline = self._deadline(THREADS_SHARE)
        finally:
            stop.set()
        await self._teardown()
        return 0

    async def _leave(self) -> None:
        """The turn ends, if there is one, before all else does."""
        self._turns = None
        with trio.move_on_at(self._stopping_at + self._share(DRAIN_SHARE)):
            await self._change_turn("deactivate")

    async def _teardown(self) -> None:
        with trio.move_on_after(self._share(TEARDOWN_SHARE)) as scope:
            try:
                await self._call(self._agent.teardown)
            except Exception:
                self._log.exception("teardown failed")
        if scope.cancelled_caught:
            self._log.warning("teardown was not done within %.1f s", self._share(TEARDOWN_SHARE))

    async def _watched(self, what: str, run: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        try:
            await run(*arguments)
        except Exception as error:
            self._crashes.append(f"{what} crashed: {type(error).__name__}: {error}")
            self._log.exception("%s crashed; the agent is unhealthy from now on", what)

    async def _run_thread(self, method: Callable[[threading.Event], None], stop: threading.Event) -> None:
        done = False
        try:
            await trio.to_thread.run_sync(method, stop, abandon_on_cancel=True, limiter=self._own_threads)
            done = True
        finally:
            if not done and stop.is_set():
                self._log.warning("thread %s did not end when told to", method.__name__)

    async def _call(self, hook: Callable[[], Any]) -> Any:
        """A hook's result; a plain `def` runs in a thread, which is left behind on cancellation."""
        if inspect.iscoroutinefunction(hook):
            return await hook()
        result = await trio.to_thread.run_sync(hook, abandon_on_cancel=True, limiter=self._own_threads)
        return await result if inspect.isawaitable(result) else result

    def _share(self, share: float) -> float:
        return max(0.0, self._spec.stop_timeout_s * share)

    def _deadline(self, share: float) -> float:
        return trio.current_time() + self._share(share)

    async def _watch_signals(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            task_status.started()
            async for _ in signals:
                self.stop()

    # --- requests

    async def _answer_requests(self, socket: Socket) -> None:
        """Until told to stop; then what is in flight has its share of time, and is given up after that."""
        async with trio.open_nursery() as flights:
            with self._taking_scope:
                while True:
                    await self._slots.acquire()
                    frames = await socket.receive()  # one at a time: what isn't begun stays with ZeroMQ
                    if len(frames) == 4 and frames[2] == b"":
                        self._in_flight += 1
                        flights.start_soon(self._fly, socket, frames)
                    else:
                        self._slots.release()
                        self._refuse_shape(socket, frames)
            flights.cancel_scope.deadline = self._deadline(DRAIN_SHARE)
        if flights.cancel_scope.cancelled_caught:
            self._log.warning("requests in flight were given up after %.1f s", self._share(DRAIN_SHARE))

    def _refuse_shape(self, socket: Socket, frames: list[bytes]) -> None:
        """A request in several frames, or none, is told so; what has no envelope can't be answered."""
        if len(frames) < 3 or frames[2] != b"":
            self._drop("requests", frames)
            return
        body = frames[3:]
        problem = f"a request is one frame, this one has {len(body)}"
        socket.send_nowait([*frames[:3], reply_error("bad-request", problem, encoding_of(body[0] if body else b""))])

    async def _fly(self, socket: Socket, frames: list[bytes]) -> None:
        try:
            socket.send_nowait([*frames[:3], await self.answer(frames[3])])
        finally:
            self._in_flight -= 1
            self._slots.release()

    async def answer(self, body: bytes) -> bytes:
        """The reply to one request's body, whatever the body is. Only cancellation gets out."""
        encoding = encoding_of(body)
        action = ""
        try:
            request = decode_map(body)
            action = name_action(request, self._contract.actions)
            if action == HEALTH:
                well, detail = await self.check_health()
                if not well:
                    raise RequestError("unhealthy", detail)
                return reply_ok({"ok": True, "detail": detail}, encoding)
            result = await self._handle(self._contract.actions[action], request)
            return reply_ok(result, encoding)
        except RequestError as error:
            return reply_error(error.code, error.message, encoding)
        except Exception as error:
            self._log.exception("handler of %s failed", action)
            return reply_error("internal", f"{type(error).__name__}: {error}", encoding)

    async def _handle(self, action: Action, request: dict[str, Any]) -> Any:
        call = functools.partial(getattr(self._agent, action.method), **bind_arguments(action, request))
        if action.blocking:
            return await trio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=self._pool)
        return await call()

    def _drop(self, where: str, frames: list[bytes]) -> None:
        self._dropped += 1
        if self._dropped & (self._dropped - 1) == 0:  # the 1st, 2nd, 4th, 8th...: a flood must not fill the log
            sizes = [len(frame) for frame in frames[:6]]
            self._log.warning("%s: dropped a message of frame sizes %s (%d so far)", where, sizes, self._dropped)

    # --- the host's questions

    async def check_health(self) -> tuple[bool, str]:
        """(well, detail): in service, no background task or thread crashed, and the agent's own `health` says so."""
        if self._state != "serving":
            return False, self._state
        if self._crashes:
            return False, "; ".join(self._crashes)
        try:
            with trio.fail_after(HEALTH_TIMEOUT_S):
                async with self._health_turn:
                    return health_of(await self._call(self._agent.health))
        except trio.TooSlowError:
            return False, f"health() took longer than {HEALTH_TIMEOUT_S:.0f} s"
        except Exception as error:
            self._log.exception("health() failed")
            return False, f"health() failed: {type(error).__name__}: {error}"

    async def _control(self, socket: Socket) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                for frames in await socket.receive_batch():
                    try:
                        peer, id, body = frames
                        question = _map.decode(body)
                    except (ValueError, RecursionError):  # msgspec's errors are ValueErrors too
                        self._drop("control", frames)
                        continue
                    if question.get("op") == "health" and len(nursery.child_tasks) < MAX_HEALTH_CHECKS:
                        nursery.start_soon(self._tell_health, socket, peer, id)
                    elif question.get("op") in ("activate", "deactivate") and len(nursery.child_tasks) < MAX_TURNS:
                        nursery.start_soon(self._tell_turn, question["op"], socket, peer, id)
                    elif question.get("op") in ("export", "import", "imported") and self._takes_state(nursery):
                        nursery.start_soon(self._tell_state, question, nursery, socket, peer, id)
                    else:
                        socket.send_nowait([peer, id, msgspec.msgpack.encode(self._tell(question))])

    async def _tell_health(self, socket: Socket, peer: bytes, id: bytes) -> None:
        well, detail = await self.check_health()
        socket.send_nowait([peer, id, msgspec.msgpack.encode({"ok": well, "detail": detail})])

    async def _change_turn(self, op: str) -> str:
        """Why the turn could not begin or end; empty once it has begun, or once all that was begun in it has ended."""
        try:
            if op == "deactivate":
                await self._activity.end()
            elif self._turns is None or self._state != "serving":
                return self._state
            else:
                await self._activity.begin(self._turns)
        except Exception as error:
            hook = "activated" if op == "activate" else "deactivated"
            self._crashes.append(f"{hook}() failed: {type(error).__name__}: {error}")
            self._log.exception("%s() failed; the agent is unhealthy from now on", hook)
            return self._crashes[-1]
        return ""

    async def _tell_turn(self, op: str, socket: Socket, peer: bytes, id: bytes) -> None:
        detail = await self._change_turn(op)
        socket.send_nowait([peer, id, msgspec.msgpack.encode({"ok": not detail, "detail": detail})])

    def _takes_state(self, nursery: trio.Nursery) -> bool:
        return self._contract.state and self._state == "serving" and len(nursery.child_tasks) < MAX_TURNS

    async def _tell_state(
        self, question: dict[str, Any], nursery: trio.Nursery, socket: Socket, peer: bytes, id: bytes
    ) -> None:
        answer = await self._state_door.answer(question, nursery)
        socket.send_nowait([peer, id, msgspec.msgpack.encode(answer)])

    def _tell(self, question: dict[str, Any]) -> dict[str, Any]:
        op = question.get("op")
        if op == "describe":
            return {
                "agent": self._spec.agent,
                "revision": self._spec.revision,
                "instance": self._spec.instance,
                "pid": os.getpid(),
                "version": __version__,
                "handlers": self._contract.describe(),
                "state": self._contract.state,
            }
        if op == "metrics":
            return dict(self._agent.metrics.values())
        if op == "stop":
            self.stop()
            return {"ok": True}
        if op == "health":
            return {"ok": False, "detail": f"{MAX_HEALTH_CHECKS} health checks wait already"}
        if op in ("activate", "deactivate", "export", "import", "imported"):
            return {"ok": False, "detail": "it is busy, or keeps no state that can be handed over"}
        known = "activate, deactivate, describe, export, health, import, imported, metrics, stop"
        return {"error": f"no op {str(op)[:100]!r}; known: {known}"}
