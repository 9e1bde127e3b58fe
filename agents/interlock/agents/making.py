"""What a slot starts: an instance of this host, or one that another host runs for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from interlock.agents.figures import InstanceView
from interlock.agents.folders import is_empty
from interlock.agents.guest import Guest
from interlock.agents.launch import Instance
from interlock.agents.revisions import Revision
from interlock.agents.slot_io import Start
from interlock.broker.errors import ConfigError

if TYPE_CHECKING:
    from interlock.agents.slot_shell import SlotShell


async def make_instance(shell: SlotShell, start: Start) -> Instance:
    """An instance that is not started yet. InterlockError."""
    around, row = shell.around, shell.slot.row
    view = InstanceView(start.revision, start.role)
    if start.role == "candidate" and row.place:
        return await _make_guest(shell, start, view)
    revision = await trio.to_thread.run_sync(around.store.get, shell.agent, start.revision, start.digest)
    return Instance(
        name=start.instance, agent=shell.agent, config=shell.config, recorded=revision, place=around.place, view=view
    )  # fmt: skip


async def _make_guest(shell: SlotShell, start: Start, view: InstanceView) -> Guest:
    """Its code is on the other host, but for comparison functions, which run here."""
    around, row = shell.around, shell.slot.row
    if around.link_to is None:
        raise ConfigError(f"this host has no way to {row.place}")
    from interlock.agents.comparer import functions_of  # no part of a start

    config = shell.config.revisions[start.revision]
    recorded = Revision(shell.agent, start.revision, start.digest, around.place.base, config)
    if functions_of(shell.config.compare):
        recorded = await trio.to_thread.run_sync(around.store.get, shell.agent, start.revision, start.digest)
    folder = around.place.data_dir / shell.agent
    empty = await trio.to_thread.run_sync(is_empty, folder)
    return Guest(
        name=start.instance, agent=shell.agent, config=shell.config, recorded=recorded, place=around.place, view=view,
        link=around.link_to(row.place), initial=None if empty else folder,
        about={"agent": shell.agent, "migration": row.migration, "epoch": row.epoch},
    )  # fmt: skip
