"""What a slot's shell does at levels 3 and 4 of a rollback, and in a drill: each is a task beside the shell's own."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

import trio

from interlock.agents.drill import Stage, drill
from interlock.agents.levels import Restoration, bring_back
from interlock.agents.slot_io import AskHostLevel, DrillEnded, HostRestored, Restore, Restored, RestoreHost, State
from interlock.broker.commands import Drill
from interlock.broker.errors import InterlockError

if TYPE_CHECKING:
    from interlock.agents.slot_shell import SlotShell

HOST_S = 5.0  # for the other slots to route back to their permanent revisions; their own levels take care of the rest
LOOK_S = 0.02


async def restore_host(shell: SlotShell, action: RestoreHost) -> None:
    """Level 3: slots with a migration roll it back. Who serves is not touched, who is down restarts by itself."""
    moved: list[SlotShell] = []
    for other in shell.around.neighbours():
        if other is shell:
            continue
        before = other.slot.row.state
        other.give(AskHostLevel(shell.agent, action.reason))
        if other.slot.row.state is State.ROLLING_BACK and before is not State.ROLLING_BACK:
            moved.append(other)
    with trio.move_on_after(HOST_S):
        for other in moved:
            await _serves(other)
    shell.give(HostRestored(action.migration, tuple(sorted(other.agent for other in moved))))


async def _serves(shell: SlotShell) -> None:
    while True:
        if shell.slot.row.state is State.SERVING:
            return
        await trio.sleep(LOOK_S)


async def restore_backup(shell: SlotShell, action: Restore) -> None:
    """Level 4: nothing of the agent runs while its files are replaced."""
    around, row = shell.around, shell.slot.row
    async with trio.open_nursery() as nursery:
        for name in list(shell.instances):
            nursery.start_soon(shell.stop, name)
    await shell.gone(tuple(shell.instances))
    work = partial(
        bring_back, row, around.backups, around.store, around.place.data_dir / row.agent, now=time.time()
    )  # fmt: skip
    try:
        done: Restoration = await trio.to_thread.run_sync(work)
    except InterlockError as error:
        shell.give(Restored(action.migration, False, str(error)))
        return
    lost = done.lost
    evidence = {"backup": str(done.backup), "levels": done.levels, "lost": "" if lost is None else lost.words()}
    shell.give(Restored(action.migration, True, evidence=evidence))


def stage(shell: SlotShell, command: Drill) -> Stage | None:
    """What a drill of this slot plays with; None while its permanent instance is not up."""
    around, slot = shell.around, shell.slot
    permanent = shell.instances.get(slot.permanent or "")
    if permanent is None or not slot.permanent_up:
        return None

    def neighbours() -> list[Stage]:
        others = [stage(other, command) for other in around.neighbours() if other is not shell]
        return [other for other in others if other is not None]

    return Stage(
        host=around.host, command=command, row=slot.row, config=shell.config, permanent=permanent,
        gateway=shell.gateway, store=around.store, backups=around.backups, place=around.place, nursery=around.nursery,
        spare_number=around.next_number, back=lambda: shell.gateway.route(dict(slot.shares())), cards=around.cards,
        neighbours=neighbours,
    )  # fmt: skip


async def rehearse(shell: SlotShell, command: Drill, scope: trio.CancelScope) -> None:
    """A drill, unless it is called off or comes to its deadline; the slot hears of its end either way."""
    played = stage(shell, command)
    if played is None:
        reason = f"revision {shell.slot.row.permanent} is not up"
        shell.give(DrillEnded(False, reason, problems=(reason,)))
        return
    ended: DrillEnded | None = None
    called_off = "it was called off: the slot had to do something else"
    with scope:
        with trio.move_on_after(max(0.0, command.deadline - time.time())) as limited:
            ended = await drill(played)
        if limited.cancelled_caught:
            called_off = "it was not done by its deadline"
    if ended is None:
        ended = DrillEnded(False, called_off, problems=(called_off,))
    shell.give(ended)
