"""What the verbs share: the bus of the fleet for as long as one runs, and where it tells what it has to tell."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import msgspec
import trio

from interlock.broker.config import FleetConfig, load_fleet
from interlock.broker.errors import Refused
from interlock.broker.role import log_to_stderr

if TYPE_CHECKING:  # a verb imports what it needs when it runs, so that `--version` and `--help` answer at once
    from interlock.broker.bus import Bus
    from interlock.broker.wire import Event
    from interlock.coordinator.verbs import Report

EXIT_INTERRUPTED = 130


def say_json(tree: Any) -> None:
    print(msgspec.json.encode(tree).decode(), flush=True)


def mute() -> None:
    """Standard output leads nowhere from here on; nothing more can fail on it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def note(text: str) -> None:
    print(f"interlock: {text}", file=sys.stderr, flush=True)


def on_bus(
    chosen: argparse.Namespace, verb: Callable[[Bus, FleetConfig], Awaitable[int]], *, on_interrupt: Callable[[], None]
) -> int:
    """Run a verb on the bus of the fleet until it ends or is interrupted (Interrupted)."""
    from interlock.broker.client import open_bus
    from interlock.broker.security import load_operator

    fleet = load_fleet(chosen.fleet)
    _log_quietly()
    security = load_operator(fleet)

    async def run() -> int:
        code = EXIT_INTERRUPTED
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async with trio.open_nursery() as nursery:

                async def stop_on_signal() -> None:
                    nonlocal code
                    async for number in signals:
                        code = 128 + number  # 130 after Ctrl-C, 143 after SIGTERM
                        on_interrupt()
                        nursery.cancel_scope.cancel()

                async def end_without_a_common_version(bus: Bus) -> None:
                    raise Refused(await bus.mismatch(), where=fleet.broker.events)

                nursery.start_soon(stop_on_signal)
                async with open_bus(fleet.broker, f"cli/{os.getpid()}", security=security) as bus:
                    nursery.start_soon(end_without_a_common_version, bus)
                    code = await verb(bus, fleet)
                nursery.cancel_scope.cancel()
        return code

    return trio.run(run)


def _log_quietly() -> None:
    """The verbs say themselves what concerns an operator; the library's log is shown when INTERLOCK_LOG asks for it."""
    if os.environ.get("INTERLOCK_LOG"):
        log_to_stderr()
    elif not logging.getLogger().handlers:
        logging.getLogger().addHandler(logging.NullHandler())


class Output:
    """Where a migration is told. A reader that went away does not end it: the exit code still tells the outcome."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        from interlock.coordinator.screen import Screen

        self.screen = Screen(sys.stdout)
        self._json = chosen.json

    def tell(self, event: Event) -> None:
        if not self._json:
            self._safely(lambda: self.screen.event(event))

    def end(self, report: Report) -> None:
        self._safely(lambda: say_json(report.to_json()) if self._json else self.screen.report(report))

    @staticmethod
    def _safely(say: Callable[[], None]) -> None:
        try:
            say()
            sys.stdout.flush()
        except BrokenPipeError:
            mute()
