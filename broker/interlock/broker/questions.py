"""Questions to the rule engine, past the broker: an operator asks what an expression is worth, or why an alert fires.

A question is one frame, the answer another: nothing of it is logged, and nothing changes by it. The engine answers when
it has nothing more urgent to do, and says no to what would keep it from its samples.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec
import trio

from interlock.broker import policy, wire
from interlock.broker.config import FleetConfig
from interlock.broker.errors import ConfigError, InterlockError, Refused, Unreachable, WireError
from interlock.broker.fields import says
from interlock.broker.gate import Allowance, Gate
from interlock.broker.protocol import SEE_REFUSALS
from interlock.broker.rejects import Rejects
from interlock.broker.sockets import Sockets

QUESTIONS_PER_S, QUESTIONS = 5.0, 20.0  # answered, and how many at once: each may hold the engine up for some 50 ms
REPEAT_S = 0.5  # without an answer it is asked again: the engine may just have been started
MAX_EXPR = 20_000  # characters of an expression: as many as the engine reads


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """One of `expr` and `alert`."""

    id: Annotated[str, says("stands in the answer too"), msgspec.Meta(max_length=64)]
    expr: Annotated[str, says("PromQL: what is it worth?"), msgspec.Meta(max_length=MAX_EXPR)] = ""
    alert: Annotated[str, says("its rule's name: why does it fire, or not?"), msgspec.Meta(max_length=1000)] = ""
    time: Annotated[float | None, says("when, in seconds since 1970; none: now")] = None


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What the rule engine says to a question. `result` is what `interlock rules eval --json` prints, or `explain`."""

    id: Annotated[str, says("the question's, where it could be read")]
    ok: Annotated[bool, says("there is a result")]
    reason: Annotated[str, says("why not, in one line for people")] = ""
    hint: Annotated[str, says("what to do about that")] = ""
    kind: Annotated[Literal["", "invalid", "refused", "version"], says(SEE_REFUSALS)] = ""
    result: Annotated[Any, says("a map")] = None


_questions = msgspec.msgpack.Decoder(Question)
_answers = msgspec.msgpack.Decoder(Answer)

Respond = Callable[[Question], Any]


def place(fleet: FleetConfig, number: int = 1) -> str:
    """Where the rule engine is asked: `[rules] answers`, or a socket in its state folder.

    Of several that share the fleet only the first answers at `answers`.
    """
    if fleet.rules.partitions > 1:
        own = f"ipc://{fleet.state_dir / f'rules-{number}' / 'answers'}"
        return (fleet.rules.answers or own) if number == 1 else own
    return fleet.rules.answers or f"ipc://{fleet.state_dir / 'rules' / 'answers'}"


async def ask(sockets: Sockets, endpoint: str, server: bytes, question: Question, *, timeout: float) -> Any:
    """The result. Refused or ConfigError with the engine's reason, Unreachable after `timeout` seconds."""
    socket = sockets.open("dealer", connect=endpoint, server=server, label=f"questions {endpoint}")
    answers: list[Answer] = []
    try:
        with trio.move_on_after(timeout):
            while not answers:
                socket.send_nowait([wire.encode(question)])
                with trio.move_on_after(REPEAT_S):
                    while not answers:
                        batch = await socket.receive_batch()
                        answers = [found for frames in batch if (found := _read(frames)).id in (question.id, "")]
    finally:
        socket.close(linger_ms=0)
    if not answers:
        raise Unreachable(f"no answer within {timeout:g} s", where=endpoint, hint="is the rule engine running?")
    answer = answers[0]
    if answer.ok:
        return answer.result
    error = Refused if answer.kind == "refused" else ConfigError
    raise error(answer.reason, where="the rule engine", hint=answer.hint)


def new_id() -> str:
    return uuid.uuid4().hex


async def serve_questions(
    sockets: Sockets,
    endpoint: str,
    respond: Respond,
    *,
    gate: Gate | None = None,
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer questions at `endpoint` until cancelled; `respond` gives the result, or raises an InterlockError.

    gate: who may ask; it serves on these sockets already. None: everybody may. InUse if the place is taken.
    """
    socket = sockets.open("router", bind=endpoint, mandatory=True, label=f"questions {endpoint}")
    if gate is not None:
        gate.guard(socket)
    desk = Desk(respond, gate, Rejects(f"questions {endpoint}"), trio.current_time())
    try:
        task_status.started(socket.endpoint)
        while True:
            for user, (peer, *frames) in await socket.receive_known():
                answer = desk.answer(user, frames, trio.current_time())
                if not socket.send_nowait([peer, answer]):
                    desk.rejects.count("an answer whose asker is gone")
                await trio.lowlevel.checkpoint()  # samples come first
    finally:
        socket.close()


class Desk:
    """Decodes, asks the gate, and limits how often. Pure but for the log: the time is an argument."""

    def __init__(self, respond: Respond, gate: Gate | None, rejects: Rejects, now: float) -> None:
        self._respond = respond
        self._gate = gate
        self.rejects = rejects
        self._allowance = Allowance(QUESTIONS_PER_S, QUESTIONS, now)

    def answer(self, user: str, frames: list[bytes], now: float) -> bytes:
        """The frame that goes back: never larger than what the other side takes."""
        try:
            question = wire.decode(frames[0] if len(frames) == 1 else b"", _questions, what="question")
        except WireError as error:
            self.rejects.count("what is not a question", error)
            if self._gate is not None:
                self._gate.garbage(user)
            return wire.encode(Answer(id="", ok=False, reason=str(error), kind="invalid"))
        made = wire.encode(self._judge(user, question, now))
        if len(made) <= wire.MAX_FRAME:
            return made
        reason = f"the answer has {len(made)} bytes, and may have {wire.MAX_FRAME}"
        return wire.encode(Answer(id=question.id, ok=False, reason=reason, hint="ask for less", kind="invalid"))

    def _judge(self, user: str, question: Question, now: float) -> Answer:
        try:
            if self._gate is not None:
                self._gate.admit(user, policy.ask)
            if not self._allowance.take(now):
                raise Refused(f"more than {QUESTIONS_PER_S:g} questions a second", hint="ask again in a moment")
            return Answer(id=question.id, ok=True, result=self._respond(question))
        except Refused as refused:
            return Answer(id=question.id, ok=False, reason=refused.what, hint=refused.hint, kind="refused")
        except InterlockError as error:
            return Answer(id=question.id, ok=False, reason=error.what, hint=error.hint, kind="invalid")


def _read(frames: list[bytes]) -> Answer:
    try:
        return wire.decode(frames[0], _answers, what="answer")
    except WireError as error:
        return Answer(id="", ok=False, reason=str(error), kind="invalid")
