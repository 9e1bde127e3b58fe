"""`interlock shell`: a prompt with the verbs of the command line.

An error or Ctrl-C ends a verb, not the shell; SIGTERM ends both.
"""

from __future__ import annotations

import cmd
import difflib
import os
import shlex
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from interlock.broker.config import FleetConfig, load_fleet
from interlock.broker.errors import ConfigError
from interlock.broker.strategies import BUILT_IN, STRATEGY_OF
from interlock.coordinator.ids import Ids
from interlock.coordinator.options import CATEGORIES, ORDERS, OUTCOMES, REPORTS, SORTS, STEERING

OFFERED = (
    "plan",
    "migrate",
    *STEERING,
    "rollback",
    "wave",
    "drill",
    "backup",
    *REPORTS,
    "ping",
    "status",
    "top",
    "watch",
    "log",
)
CHOICES: dict[str, list[str]] = {
    "--strategy": list(BUILT_IN), "--level": list(STRATEGY_OF), "--outcome": list(OUTCOMES),
    "--order": list(ORDERS), "--sort": list(SORTS), "--category": list(CATEGORIES),
    "wave": ["start", "status", "stop", "list"],
}  # fmt: skip
LEAVING = ("exit", "quit", "EOF")
IDS_S = 5.0  # that ids read from the log are good for: Tab is pressed twice, and some letters later again
TERMINATED = 143  # the code of a verb that SIGTERM ended


class Shell(cmd.Cmd):
    """Each line runs as its own command: what one leaves behind, no other meets."""

    def __init__(
        self, fleet: FleetConfig, path: Path, run: Callable[[list[str]], int], read_ids: Callable[[Path], Ids]
    ) -> None:
        super().__init__()
        self.prompt = f"interlock {fleet.name}> "
        self.intro = f"{fleet.name}: {', '.join(OFFERED)}; help, exit. Ctrl-C ends a verb."
        self.code = 0  # of the last verb
        self.exit_code = 0  # of the shell itself
        self._path = path
        self._fleet = fleet
        self._run = run
        self._read_ids = read_ids
        self._ids: tuple[float, Ids] | None = None

    def onecmd(self, line: str) -> bool:
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            self.stdout.write(f"{error}\n")
            return False
        if not words and line != "EOF":
            return False
        if words[0] in LEAVING:
            return True
        if words[0] in ("help", "?"):
            self._help(words[1:])
        elif words[0] in OFFERED:
            self.code = self._run([words[0], "--fleet", os.fspath(self._path), *words[1:]])
            if self.code == TERMINATED:
                self.exit_code = self.code
                return True
        else:
            near = difflib.get_close_matches(words[0], [*OFFERED, "help", "exit"], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "; try: help"
            self.stdout.write(f"there is no verb {words[0]!r} here{hint}\n")
        return False

    def cmdloop(self, intro: str | None = None) -> None:
        """Until exit or Ctrl-D. Ctrl-C at the prompt clears the line."""
        while True:
            try:
                super().cmdloop(intro)
                return
            except KeyboardInterrupt:
                self.stdout.write("\n")
                intro = ""

    def emptyline(self) -> bool:
        return False

    def completenames(self, text: str, *ignored: object) -> list[str]:
        return [name for name in (*OFFERED, "help", "exit") if name.startswith(text)]

    def completedefault(self, text: str, line: str, begidx: int, endidx: int) -> list[str]:
        """What may stand after an option: a revision of the agent in the line, say; else an agent's name."""
        with suppress(ConfigError):  # completion goes on with what was read last; the verb will say what is wrong
            self._fleet = load_fleet(self._path)  # a revision may have been added meanwhile
        before = line[:begidx].split()
        if before[-1] == "--to":
            named = [self._fleet.agents[word] for word in before if word in self._fleet.agents]
            agents = named or (list(self._fleet.agents.values()) if before[0] == "wave" else [])
            names = list(dict.fromkeys(name for agent in agents for name in agent.revisions))
        elif before[-1] in CHOICES:
            names = CHOICES[before[-1]]
        elif before[0] == "wave" and before[-1] in ("status", "stop"):
            names = self._known().waves if before[-1] == "status" else self._known().moving
        elif before in (["report"], ["explain"]):
            names = [*self._fleet.agents, *self._known().migrations]
        else:
            names = list(self._fleet.agents)
        return [name for name in names if name.startswith(text)]

    def _known(self) -> Ids:
        now = time.monotonic()
        if self._ids is None or now - self._ids[0] > IDS_S:
            self._ids = now, self._read_ids(self._path)
        return self._ids[1]

    def _help(self, words: list[str]) -> None:
        if words and words[0] in OFFERED:
            self._run([words[0], "--help"])
        else:
            self.stdout.write(
                "plan AGENT --to REVISION      what that move would do, and promise\n"
                "migrate AGENT --to REVISION   move an agent, and follow it to its outcome\n"
                "approve, pause, resume, hold, abort, commit AGENT    lead its migration in flight\n"
                "rollback AGENT                undo its migration in flight\n"
                "wave start --to REVISION      move many agents; wave status, stop, list\n"
                "report, explain [AGENT]       what became of a migration, and why\n"
                "history [AGENT]               the migrations that were\n"
                "drill AGENT                   rehearse its rollback, and measure it\n"
                "backup list|verify|restore    the backups of this machine's hosts\n"
                "status                        hosts, agents, migrations, alerts\n"
                "top                           hosts, GPUs and agents as they are now\n"
                "watch [PREFIX]                what happens, until Ctrl-C\n"
                "log [verify]                  what is in the event log; its hash chain\n"
                "help VERB                     its options\n"
                "exit                          or Ctrl-D\n"
            )
