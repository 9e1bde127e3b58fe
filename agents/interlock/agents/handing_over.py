"""What a slot's shell does to move the state of an agent: a task beside the shell's own.

The gateway holds the requests already. Those that an instance was given before are answered first, then the instance
stops working by itself, and its state is carried over. All of it has one limit, since clients wait.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import trio

from interlock.agents.folders import Moved
from interlock.agents.guest import Guest
from interlock.agents.launch import Instance
from interlock.agents.slot_io import BeginHandBack, BeginHandOver, HandedBack, HandedOver
from interlock.agents.state_ports import StatePort, carry
from interlock.agents.token_gateway import TokenGateway
from interlock.agents.transfer import TransferError
from interlock.broker.config import AgentConfig
from interlock.broker.errors import InterlockError
from interlock.broker.fields import Evidence

if TYPE_CHECKING:
    from interlock.agents.slot_shell import SlotShell

log = logging.getLogger(__name__)

HELD_SHARE = 0.8  # of `hold_s`: whoever waits at the gateway is answered before that is over
RESUME_S = 5.0  # for an instance to say that it works again; requests don't wait for that


def limit_of(config: AgentConfig) -> float:
    """Seconds that a hand-over may take: requests wait for it."""
    return min(config.hand_over_s, config.hold_s * HELD_SHARE) if config.endpoint else config.hand_over_s


async def hand_over(shell: SlotShell, action: BeginHandOver, scope: trio.CancelScope) -> None:
    """The old one's state to the candidate. The slot hears of its end either way."""
    command, limit = action.command, limit_of(shell.config)
    evidence: Evidence = {"limit_s": limit}
    reason = await _moved(shell, (action.old, action.new), limit, scope, evidence)
    took = evidence.get("held_s", 0.0)
    slow = not reason and took > command.promise_s
    evidence["rollback_class"] = "hand-over" if slow else "warm"
    if slow and command.accept != "hand-over":
        reason = (
            f"it took {took:.2f} s, and to hand back as much in a rollback would take as long: {command.promise_s:g} s "
            "are promised; if that will do: --accept hand-over"
        )
    shell.give(HandedOver(command.migration, not reason, reason, evidence, limit))


async def hand_back(shell: SlotShell, action: BeginHandBack, scope: trio.CancelScope) -> None:
    """The candidate's newer state to the old one."""
    evidence: Evidence = {}
    limit = min(action.limit_s, limit_of(shell.config))
    reason = await _moved(shell, (action.candidate, action.permanent), limit, scope, evidence)
    shell.give(HandedBack(action.migration, not reason, reason, evidence))


async def _moved(
    shell: SlotShell, way: tuple[str, str], limit_s: float, scope: trio.CancelScope, evidence: Evidence
) -> str:
    """Why the state could not be moved from the first to the second; empty once the second said that it has it."""
    source, target = way
    began = trio.current_time()
    step = "it was called off"
    reason: str | None = None
    with scope:
        with trio.move_on_after(limit_s):
            try:
                giving, taking = shell.instances.get(source), shell.instances.get(target)
                if giving is None or taking is None:
                    raise TransferError("an instance is gone")
                step = f"{_owed(shell, giving)} were not answered"
                await shell.gateway.drained(source)
                step = f"{giving.view.revision} did not stop working"
                if giving.state_port is not None and not isinstance(shell.gateway, TokenGateway):
                    await giving.state_port.quiesce(limit_s)
                evidence["quiesced_s"] = round(trio.current_time() - began, 4)
                step = "the state was not over"
                await _move(shell, giving, taking, evidence)
                reason = ""
            except (InterlockError, OSError) as error:
                reason = str(error)
        if reason is None:
            reason = f"{step} within {limit_s:g} s"
    evidence["held_s"] = round(trio.current_time() - began, 4)
    return "it was called off" if reason is None else reason


async def _move(shell: SlotShell, giving: Instance, taking: Instance, evidence: Evidence) -> None:
    """The data folder, where they don't share one, and what is in memory."""
    folder = shell.around.place.data_dir / shell.agent
    if isinstance(giving, Guest) and giving.state_port is None:  # before anything is put under a process that runs
        raise TransferError("the old one, which runs, can't be told of another data folder: it has no hooks for state")
    moved: Moved | None = None
    if isinstance(taking, Guest):
        moved = await taking.send_folder(folder)
    elif isinstance(giving, Guest):
        moved = await giving.bring_folder(folder)
    if moved is not None:
        evidence |= {"data_files": moved.files, "data_bytes": moved.bytes}
    if giving.state_port is not None:
        end = await carry(giving.state_port, _port(taking))
        evidence |= {"bytes": end.size, "pieces": end.pieces, "sha256": end.sha256.hex()}
    elif isinstance(taking, Guest):
        await taking.restart()  # it opened what it keeps there when it began
        evidence |= {"bytes": 0, "restarted": True}
    else:
        _port(giving)


def _owed(shell: SlotShell, instance: Instance) -> str:
    count = shell.gateway.in_flight(instance.name)
    return f"{count} requests that {instance.view.revision} had in hand"


def _port(instance: Instance) -> StatePort:
    port = instance.state_port
    if port is None:
        raise TransferError(
            f"revision {instance.view.revision} can't hand state over, or take it: a class needs snapshot() and "
            "restore(), a program the table `state`"
        )
    return port


async def resume(shell: SlotShell, name: str) -> None:
    """This instance works, the others of the slot don't. What can't be told says so in its health check.

    Where there is a token, who has it works: it is not given by two.
    """
    if isinstance(shell.gateway, TokenGateway):
        return
    async with trio.open_nursery() as nursery:
        for other in list(shell.instances.values()):
            nursery.start_soon(_tell, other, other.name == name)


async def _tell(instance: Instance, works: bool) -> None:
    port = instance.state_port
    if port is None or instance.stopping:
        return
    try:
        await (port.resume(RESUME_S) if works else port.quiesce(RESUME_S))
    except InterlockError as error:
        log.warning("%s: %s", instance.name, error)
