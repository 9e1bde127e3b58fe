"""What a slot's shell does when its agent goes to another host: it has that host write first, and forwards afterwards.

What comes to this host's gateway goes to the gateway of the other one, through the link, and so meets whatever serves
there, also after later migrations.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import msgspec
import trio

from interlock.agents.figures import InstanceView
from interlock.agents.frames import BROKEN, join
from interlock.agents.guest import Guest, listen_at
from interlock.agents.instance import HandlerContract
from interlock.agents.launch import Instance
from interlock.agents.link import Link
from interlock.agents.revisions import Revision
from interlock.agents.slot_base import forwarder
from interlock.agents.slot_io import Arrived, BeginCommit, Forward, State
from interlock.broker.errors import InterlockError

if TYPE_CHECKING:
    from interlock.agents.slot_shell import SlotShell

log = logging.getLogger(__name__)

ARRIVE_S = 10.0  # for the other host to write, and to open the agent's endpoint
TELL_S = 2.0  # for it to hear that the agent is its own; it is told again until it has
AGAIN_S = 0.5
DRAIN_S = 5.0  # for what is on its way to the other host, once the agent is back here
LOOK_S = 10.0  # between questions about what may be asked twice there
WINDOW = 1024  # requests on their way to the other gateway, which has a line of its own


async def give_away(shell: SlotShell, action: BeginCommit) -> None:
    """Have the other host write that the agent is arriving; the slot hears of it either way."""
    command, row = action.command, shell.slot.row
    about = _about(shell, action.candidate)
    try:
        said = await _link(shell, row.place).ask("arrive", about, ARRIVE_S)
    except InterlockError as error:
        shell.give(Arrived(command.migration, False, f"host {row.place} does not take it: {error}"))
        return
    shell.give(Arrived(command.migration, True, endpoint=str(said.get("endpoint", ""))))


async def forward(shell: SlotShell, action: Forward) -> None:
    """Requests go to the other host's gateway from now on. It is written already."""
    around, place = shell.around, action.place
    link = _link(shell, place)
    name = forwarder(shell.agent, place)
    there = _stand_in(shell, name)
    if shell.forwards is not None:
        shell.forwards.cancel()
    shell.forwards = trio.CancelScope()
    there.requests = await around.nursery.start(_serve, shell, link, there, shell.forwards)
    shell.gateway.attach(
        name, there.requests, window=WINDOW, idempotent=there.idempotent, mirrorable=lambda _: False
    )  # fmt: skip
    if action.candidate:  # it listens already, and holds what comes until it hears that the agent is its own
        shell.gateway.route({name: 1.0})
        around.nursery.start_soon(_release, shell, action.candidate)
    shell.first_news.set()
    around.nursery.start_soon(_follow, shell, link, there, action.candidate)


def _link(shell: SlotShell, place: str) -> Link:
    assert shell.around.link_to is not None
    return shell.around.link_to(place)


def _about(shell: SlotShell, instance: str) -> dict[str, Any]:
    row = shell.slot.row
    return {"agent": shell.agent, "migration": row.migration, "epoch": row.epoch, "instance": instance}


def _stand_in(shell: SlotShell, name: str) -> Instance:
    """What the gateway asks whether a request may be asked twice: by the fleet file, or as the other host says."""
    config = shell.config
    revision = config.revisions[config.serve]
    recorded = Revision(shell.agent, config.serve, "", shell.around.place.base, revision)
    return Instance(name, shell.agent, config, recorded, shell.around.place, InstanceView(config.serve, "permanent"))


async def _serve(
    shell: SlotShell, link: Link, there: Instance, scope: trio.CancelScope, *, task_status: trio.TaskStatus[str]
) -> None:
    """The end here of the way there."""
    scheme = shell.config.endpoint.partition("://")[0]
    if scheme in ("tcp", "ipc"):
        path = shell.around.place.run_dir / f"{shell.around.next_number()}.fwd"
        listener, endpoint = await listen_at(path), f"ipc://{path}"
    else:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        endpoint = f"{scheme}://127.0.0.1:{listener.socket.getsockname()[1]}"

    async def serve(client: trio.SocketStream) -> None:
        try:
            await join(client, link.open(shell.agent, "agent"))
        except (*BROKEN, InterlockError):  # whoever connects tries again
            await trio.aclose_forcefully(client)

    with scope:
        task_status.started(endpoint)
        await trio.serve_listeners(serve, [listener])


async def _follow(shell: SlotShell, link: Link, there: Instance, instance: str) -> None:
    """Route there while the other host says that it has the agent; while it does not, requests wait."""
    about = _about(shell, instance)
    scope = shell.forwards
    assert scope is not None
    while not scope.cancel_called:
        known = await _tell(link, there, about)
        if scope.cancel_called:
            return
        if shell.slot.row.state is not State.FORWARDING:
            return  # it comes back
        if known:
            shell.gateway.route({there.name: 1.0})
        with trio.move_on_after(LOOK_S if known else AGAIN_S):
            await link.until_changed()
        if not link.up and not scope.cancel_called and shell.slot.row.state is State.FORWARDING:
            shell.gateway.route({})


async def _tell(link: Link, there: Instance, about: dict[str, Any]) -> bool:
    """The other host hears that the agent is its own, and tells what may be asked twice there. True if it knows."""
    try:
        await link.ask("serve", about, TELL_S)
        said = await link.ask("contract", about, TELL_S)
        there.handlers = msgspec.convert(said.get("handlers", {}), dict[str, HandlerContract])
    except (InterlockError, msgspec.ValidationError) as error:
        log.warning("%s does not serve what was moved there yet: %s", link.there, error)
        return False
    return True


async def end_forwarding(shell: SlotShell, place: str) -> None:
    """It is here again: what is on its way there is answered, then the way is closed."""
    scope, shell.forwards = shell.forwards, None
    name = forwarder(shell.agent, place)
    with trio.move_on_after(DRAIN_S):
        await shell.gateway.drained(name)
    shell.gateway.detach(name)
    if scope is not None:
        scope.cancel()


async def _release(shell: SlotShell, name: str) -> None:
    """What the guest was given is answered; then it is the other host's alone."""
    guest = shell.instances.get(name)
    if not isinstance(guest, Guest):
        return
    with trio.move_on_after(guest.revision.stop_timeout_s):
        await shell.gateway.drained(name)
    guest.release()
    shell.gateway.detach(name)
    shell.instances.pop(name, None)
