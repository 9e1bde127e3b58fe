"""How a service outlives the cancellation of whoever started it, but not one that came before it had started."""

from __future__ import annotations

from typing import TypeVar

import trio

ValueT = TypeVar("ValueT")


async def start_shielded(scope: trio.CancelScope, task_status: trio.TaskStatus[ValueT], value: ValueT) -> None:
    """`task_status.started(value)`, and from then on `scope`, which the task is in, is shielded.

    Cancelled if whoever started the task was: `started` says nothing then, and a shielded task would stay for ever.
    """
    await trio.lowlevel.checkpoint_if_cancelled()
    task_status.started(value)
    scope.shield = True
