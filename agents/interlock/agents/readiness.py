"""Whether an agent goes through its base class, and can be moved: from what was seen of it to remarks. Pure.

An error stands in the way of a move; a warning is something that a move can lose or leave behind; a note is told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from interlock.agents.instance import HandlerContract, contract_gaps
from interlock.agents.sandbox import Left, Use, Watched

Verdict = Literal["ok", "note", "warning", "error"]

OPENED: dict[str, str] = {"thread": "threads", "socket": "sockets", "program": "programs", "file": "configuration"}
LEFT: dict[str, str] = {"thread": "threads", "socket": "sockets", "zmq": "sockets", "child": "programs"}
INSTEAD = {
    "threads": "mark the method with @thread, and it is told to stop",
    "sockets": "close it in teardown",
    "programs": "end it in teardown",
    "configuration": "self.config is what the fleet file says",
}
ENOUGH = ("sockets", "programs")  # what may be opened, if it is closed when the agent is told to stop


class Remark(msgspec.Struct, frozen=True):
    """check: what of the list it belongs to. where: file and line, if it has one."""

    check: str
    verdict: Verdict
    text: str
    where: str = ""


class State(msgspec.Struct, frozen=True):
    """State that left one process, entered another, and left that one: sizes and checksums, or what failed."""

    size: int = 0
    sha256: bytes = b""
    again_size: int = 0
    again_sha256: bytes = b""
    trouble: str = ""


class Seen(msgspec.Struct, kw_only=True):
    """All that a trial found out. `handlers` is None if the agent never answered."""

    watched: Watched | None = None
    healthy: bool = False
    detail: str = ""  # of its health, or why there is none
    handlers: dict[str, HandlerContract] | None = None
    keeps_state: bool = False
    state: State | None = None
    stop_s: float = 0.0
    stop_limit_s: float = 5.0
    hangs: list[str] = []  # where its threads were when it did not stop
    orphans: list[str] = []  # processes that outlived it


def judge(seen: Seen, old: Mapping[str, HandlerContract] | None, old_name: str = "") -> list[Remark]:
    """old: what the revision before it handles; None if there is none to compare with."""
    watched = seen.watched
    if watched is not None and watched.error and not watched.stopped:
        where = f"{watched.file}:{watched.line}" if watched.file else ""
        return [Remark("start", "error", watched.error, where)]
    if not seen.healthy:
        return [Remark("start", "error", seen.detail or "it was never healthy")]
    remarks = [Remark("start", "ok", "it starts, and is healthy")]
    remarks += _lifecycle(watched) if watched is not None else []
    remarks += _health(watched)
    remarks += _handlers(seen, watched)
    remarks += _shutdown(seen, watched)
    remarks += _state(seen)
    remarks += _contract(seen.handlers or {}, old, old_name)
    return remarks


def _lifecycle(watched: Watched) -> list[Remark]:
    """What its own code opened, by kind. What ENOUGH names is fine if nothing of it was left behind."""
    remarks = []
    left = {LEFT.get(each.kind, "") for each in watched.left}
    opened = {use: OPENED[use.kind] for use in watched.uses}
    for check, instead in INSTEAD.items():
        mine = [use for use in opened if opened[use] == check]
        if not mine:
            remarks.append(Remark(check, "ok", "none beside those of the base class"))
        elif check in ENOUGH and check not in left:
            remarks.append(Remark(check, "ok", f"{len(mine)} of its own, closed at its end"))
        else:
            remarks += [
                Remark(check, "warning", f"opens {use.what}: {instead}", f"{use.file}:{use.line}") for use in mine
            ]
    return remarks


def _health(watched: Watched | None) -> list[Remark]:
    if watched is not None and not watched.own_health:
        return [Remark("health", "note", "it has no health() of its own: well for as long as nothing in it crashes")]
    return [Remark("health", "ok", "health() answers")]


def _handlers(seen: Seen, watched: Watched | None) -> list[Remark]:
    if not seen.handlers:
        return [Remark("handlers", "note", "it has no handler: nobody can ask it anything")]
    bare: Sequence[Use] = watched.untyped if watched is not None else []
    remarks = [
        Remark("handlers", "warning", f"{use.kind}: {use.what} has no type", f"{use.file}:{use.line}") for use in bare
    ]
    return remarks or [Remark("handlers", "ok", f"{len(seen.handlers)} handlers, all with types")]


def _shutdown(seen: Seen, watched: Watched | None) -> list[Remark]:
    orphans = [Remark("shutdown", "error", f"outlived it: process {orphan}") for orphan in seen.orphans]
    if watched is None or not watched.stopped:
        text = f"it did not end within {seen.stop_limit_s:g} s of being told to"
        text += f"; it was at {'; '.join(seen.hangs)}" if seen.hangs else ""
        return [Remark("shutdown", "error", text), *orphans]
    remarks = [
        Remark("shutdown", _weight(left), f"left behind: {left.kind} {left.what}", _place(left))
        for left in watched.left
        if left.what not in seen.orphans
    ]
    remarks += orphans
    if watched.code:
        remarks.append(Remark("shutdown", "error", f"it ended with exit code {watched.code}"))
    return remarks or [Remark("shutdown", "ok", f"everything ended within {seen.stop_s:.1f} s")]


def _place(left: Left) -> str:
    return f"{left.file}:{left.line}" if left.file else ""


def _weight(left: Left) -> Verdict:
    """What would keep the process alive, or outlives it, stands in the way of a move."""
    return "error" if left.lasting or left.kind == "child" else "warning"


def _state(seen: Seen) -> list[Remark]:
    if not seen.keeps_state:
        return [Remark("state", "note", "it hands over no state: what it has in memory ends with its process")]
    state = seen.state or State(trouble="it was not tried")
    if state.trouble:
        return [Remark("state", "error", state.trouble)]
    if (state.size, state.sha256) != (state.again_size, state.again_sha256):
        text = f"{state.size} bytes went out; of the process that took them came {state.again_size} bytes, which differ"
        return [Remark("state", "error", f"{text}: restore() and snapshot() do not fit, or the order is not the same")]
    return [Remark("state", "ok", f"{state.size} bytes went out, in, and out again the same")]


def _contract(
    new: Mapping[str, HandlerContract], old: Mapping[str, HandlerContract] | None, name: str
) -> list[Remark]:  # fmt: skip
    if old is None:
        return [Remark("contract", "note", "there is no other revision to compare with: --against names one")]
    gaps = [Remark("contract", "error", f"against {name}: {gap}") for gap in contract_gaps(old, new)]
    more = sorted(set(new) - set(old))
    notes = [Remark("contract", "note", f"against {name}: action {action!r} is new") for action in more]
    return [*gaps, *notes] or [Remark("contract", "ok", f"it answers all that {name} answers")]
