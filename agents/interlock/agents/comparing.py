"""From two answers to a verdict: by the handler's own settings, its function, or the defaults of the agent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec
import trio

from interlock.agents.compare import NO_ANSWER, Pair, Verdict, difference, handler_of, merged
from interlock.agents.routing_types import Compare
from interlock.broker.config import CompareConfig

LARGE_ANSWER = 1 << 15  # bytes: comparing two of these is moved to a thread, so that no client waits for it


class Judge(Protocol):
    """Whoever asks a revision's own comparison functions."""

    async def judge(
        self, function: str, request: list[bytes], old: list[bytes], new: list[bytes], http: dict[str, str] | None
    ) -> Verdict: ...


class Comparison(msgspec.Struct, frozen=True):
    """How pairs are compared while something is mirrored, and who is told of them."""

    config: CompareConfig = msgspec.field(default_factory=CompareConfig)
    on_pair: Callable[[Pair], None] | None = None
    judge: Judge | None = None
    action_field: str = "action"


class Answers(msgspec.Struct, frozen=True):
    """A request and both answers to it, as frames. `found`: a difference known already; `http`: method and path."""

    name: str
    request: list[bytes]
    old: list[bytes]
    new: list[bytes] | None
    found: str = ""
    http: dict[str, str] | None = None


async def verdict_of(answers: Answers, comparison: Comparison) -> Verdict:
    """Never raises for what an answer is, or what a function does."""
    await trio.lowlevel.checkpoint()
    if answers.new is None or answers.found:
        return Verdict(difference=answers.found or NO_ANSWER)
    handler = handler_of(answers.name, comparison.config.handlers)
    if handler is not None and handler.function:
        if comparison.judge is None:
            return Verdict(error=f"{handler.function} can't be asked: it has no process")
        return await comparison.judge.judge(handler.function, answers.request, answers.old, answers.new, answers.http)
    config, exact = merged(comparison.config, handler), handler is not None and handler.mode == "exact"
    if sum(map(len, answers.old)) > LARGE_ANSWER:
        found = await trio.to_thread.run_sync(lambda: difference(answers.old, answers.new, config, exact=exact))
    else:
        found = difference(answers.old, answers.new, config, exact=exact)
    return Verdict(difference=found)


def paired(command: Compare[Any, Any], answers: Answers, request: Sequence[bytes], verdict: Verdict) -> Pair:
    """The Pair of two answers and what is thought of them. `request`: as a report shows it."""
    return Pair(
        request=b"".join(request),
        old=b"".join(answers.old),
        new=b"".join(answers.new) if answers.new is not None else None,
        old_latency=command.old_latency,
        new_latency=command.new_latency,
        equal=not (verdict.difference or verdict.error),
        difference=verdict.difference,
        error=verdict.error,
        handler=answers.name,
    )
