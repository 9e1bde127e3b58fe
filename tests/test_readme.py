"""README.md is run from top to bottom, in an empty folder, with a real fleet.

Each fenced block says after its language what is done with it; a block that says nothing known fails the test.

python, toml, yaml   file=PATH: written there. append=PATH: added to that file.
console              Each `$ ` line is run, and what stands below it must be its output. A command that fails must be
                     followed by `$ echo $?`.
console background   Started, and left running; what is shown must come before the test goes on. A block with the same
                     command ends the one before first, with Ctrl-C.
console beside       Started when its first line has come; the rest must have come when the next block is done.
console until        Run until what is shown has come, then ended with Ctrl-C.
console eventually   Each command is repeated until it prints what is shown.
console typed        The lines after the shell's prompt are typed.
console listed       Not run: each command is in LISTED, with the reason and what is checked instead.
stopped              With any of these: everything that runs is ended first, with Ctrl-C.
there                With any of these: on another machine, which is another folder here. `scp` copies into it (SCP).
                     For root both machines are network namespaces, with the addresses and ports that stand there.

In what is shown, `...` alone on a line stands for any lines. Times, process numbers and the like differ from run to run
(VARYING). Where there are no namespaces, ports are replaced by free ones and addresses of other machines by 127.0.0.1.
The load of the machine is not looked at (UNWATCHED).
"""

from __future__ import annotations

import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest

from interlock.broker.config import load_fleet
from interlock.coordinator.assess.startup import read_startup
from interlock.coordinator.rules.rulefile import parse_rules
from interlock.coordinator.rules.yamltree import load_yaml
from net_parts import Net, why_not

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
WAIT_S = 90.0  # for anything at all, on a machine that is busy with other tests
STOP_S = 30.0
POLL_S = 0.05
PORTS = range(20_000, 32_000)  # below those that the kernel gives to whoever asks for any
MACHINES = {"here": "10.0.0.1", "there": "10.0.0.2"}  # as the page has them
PROMPT = "interlock night> "
BROKER = """
[broker]
events = "tcp://127.0.0.1:7171"
feed = "tcp://127.0.0.1:7172"
telemetry_in = "tcp://127.0.0.1:7173"
telemetry_out = "tcp://127.0.0.1:7174"
"""  # the defaults, written out so that their ports can be replaced

# The default rules rightly refuse to move anything on a machine whose load is high, such as one that runs tests. The
# monitors run where the page starts them by themselves.
UNWATCHED = "[hosts.alpha]\nmonitor = false\n"

SCP = """#!/bin/sh
# scp [-r] FILE... HOST:[FOLDER]: the other machine's home is a folder
for target; do :; done
until [ $# = 1 ]; do [ "$1" = -r ] || cp -r "$1" "$OTHER_MACHINE/${target#*:}" || exit; shift; done
"""

VARYING = [
    (r"(/[\w.-]+)+/\.interlock", "STATE"),
    (r"\d{4}-\d\d-\d\d \d\d:\d\d [0-9a-f]{16}", "ISSUED KEY"),
    (r"\d+ events: ", "N events: "),
    (r"\d{8}T\d{6}\.\d{6}Z", "BACKUP"),
    (r"\([0-9a-f]{12}\)", "(DIGEST)"),
    (r" +\d+\.\d{3} s", " SOME s"),
    (r"head \d+:[0-9a-f]{64}", "HEAD"),
    (r"^\d+ (?=\d\d:)", "N "),
    (r"(\d{4}-\d\d-\d\d )?\d\d:\d\d:\d\d\.\d{3}", "TIME"),
    (r"after \d+\.\d s", "after SOME s"),
    (r"has it \d+\.\d ms", "has it SOME ms"),
    (r"migration (\w+)-\d+", r"migration \1-N"),
    (r"\b(greeter|wave)-\d+", r"\1-N"),
    (r"\(event \d+\)", "(event N)"),
    (r"no rule fired \(.*\)", "no rule fired (CHECKS)"),
    (r"observation \d+\.\d s after it had", "observation SOME s after it had"),
    (r", \d+ ms after the first sample", ", SOME ms after the first sample"),
    (r"with \d+, first in", "with MANY, first in"),
    (r"TIME +\d+ s +", "TIME SOME s "),
    (r"(up TIME) \d+", r"\1 PROCESS"),
    (r"keeps \d+ things( \[\d+\])?", "keeps MANY things"),
]


def makes(target: str, command: str) -> Callable[[], None]:
    def check() -> None:
        planned = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True)
        assert command in planned.stdout

    return check


def makes_the_environment() -> None:
    assert re.search(r"^VENV := \.venv$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)


# Commands that aren't run here -> why not, and what is checked instead.
LISTED: dict[str, tuple[str, Callable[[], None]]] = {
    "make demo": ("installs from the network, and takes a minute", makes("demo", "interlock demo")),
    "make test": ("would run this test in this test", makes("test", "pytest")),
    ". .venv/bin/activate": ("the test has the same environment already", makes_the_environment),
}


@dataclass(frozen=True)
class Block:
    line: int
    language: str
    words: dict[str, str]  # what stands after the language: {"file": "fleet.toml"}, {"background": ""}
    text: str

    @property
    def commands(self) -> list[tuple[str, list[str]]]:
        """(command, what is shown below it)."""
        found: list[tuple[str, list[str]]] = []
        for line in self.text.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            else:
                found[-1][1].append(line)
        return found

    def __str__(self) -> str:
        return f"README.md:{self.line}"


def blocks() -> list[Block]:
    text = README.read_text("utf-8")
    found = []
    for match in re.finditer(r"^```(.*)\n((?:.*\n)*?)^```$", text, flags=re.MULTILINE):
        language, *words = match[1].split() or [""]
        pairs = dict((*word.split("=", 1), "")[:2] for word in words)
        found.append(Block(text.count("\n", 0, match.start()) + 1, language, pairs, match[2]))
    return found


KINDS = {"background", "beside", "until", "eventually", "typed", "listed"}


def test_every_block_says_what_is_done_with_it() -> None:
    fences = re.findall(r"^```", README.read_text("utf-8"), flags=re.MULTILINE)
    assert len(fences) == 2 * len(blocks())
    for block in blocks():
        if block.language == "console":
            assert set(block.words) <= KINDS | {"stopped", "there"}, block
            assert len(set(block.words) & KINDS) <= 1, block
            assert block.text.startswith("$ "), block
        else:
            assert block.language in ("python", "toml", "yaml"), block
            assert len(block.words) == 1, block
            assert set(block.words) <= {"file", "append"}, block


def test_what_is_not_run_is_on_the_list_and_checked_otherwise() -> None:
    listed = [command for block in blocks() if "listed" in block.words for command, _ in block.commands]
    assert sorted(listed) == sorted(LISTED)
    for _, check in LISTED.values():
        check()


# --- running it


def plain(text: str) -> list[str]:
    """The lines, without what differs from run to run, and without what is only there for the eye."""
    lines = []
    for line in text.splitlines():
        known = " ".join(line.split())
        for pattern, name in VARYING:
            known = re.sub(pattern, name, known)
        if known:
            lines.append(known)
    return lines


def shown_as_pattern(shown: list[str]) -> str:
    return "".join(r"(?:.*\n)*?" if line == "..." else re.escape(line) + r"\n" for line in shown)


def is_shown(shown: list[str], output: str, *, whole: bool) -> bool:
    match = re.fullmatch if whole else re.match
    return match(shown_as_pattern(shown), "".join(f"{line}\n" for line in plain(output))) is not None


class Running:
    """A program that was left running."""

    def __init__(self, command: str, folder: Path, env: dict[str, str], number: int, within: list[str]) -> None:
        self.command = command
        self.out, self.log = folder / f".out-{number}", folder / f".log-{number}"
        with self.out.open("wb") as out, self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*within, "bash", "-c", f"exec {command}"], cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=out,
                stderr=log, start_new_session=True,
            )  # fmt: skip

    def wait_for(self, shown: list[str], block: Block) -> None:
        deadline = time.monotonic() + WAIT_S
        while not is_shown(shown, self.out.read_text(), whole=False):
            assert self.process.poll() is None, f"{block}: {self.command} ended:\n{self.said()}"
            assert time.monotonic() < deadline, f"{block}: {self.command} did not print {shown}:\n{self.said()}"
            time.sleep(POLL_S)

    def said(self) -> str:
        return self.out.read_text() + self.log.read_text()[-4000:]

    def interrupt(self) -> int:
        """Ctrl-C; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"{self.command} did not end after Ctrl-C:\n{self.said()}") from None


class Reader:
    """Does what README.md says, block by block."""

    def __init__(self, folder: Path, net: Net | None) -> None:
        self.folder = folder
        self.net = net
        self.ports = dict(
            zip(re.findall(r"\d+", "7171 7172 7173 7174 7180 7181 7201 7202 7203 7204"), free_ports(), strict=False)
        )
        self.other = folder / ".other-machine"
        tools = folder / ".tools"
        for made in (self.other, tools):
            made.mkdir()
        (tools / "scp").write_text(SCP)
        (tools / "scp").chmod(0o755)
        path = os.pathsep.join([str(tools), str(Path(sys.executable).parent), os.environ["PATH"]])
        kept = {name: value for name, value in os.environ.items() if not name.startswith("INTERLOCK_")}
        self.env = {**kept, "PATH": path, "PYTHONUNBUFFERED": "1", "OTHER_MACHINE": str(self.other)}
        self.running: list[Running] = []
        self.beside: tuple[Running, list[str], Block] | None = None
        self.started = 0

    def here(self, text: str) -> str:
        """The text with ports that are free, and addresses of this machine; as it stands, on machines of their own."""
        if self.net is not None:
            return text
        text = re.sub(r"\b10\.0\.0\.\d\b", "127.0.0.1", text)
        return re.sub(r"\b7\d\d\d\b", lambda found: str(self.ports[found[0]]), text)

    def do(self, block: Block) -> None:
        waiting, self.beside = self.beside, None
        if "stopped" in block.words:
            self.stop_all()
        if block.language != "console":
            self.write(block)
        else:
            kind = next(iter(set(block.words) & KINDS), "run")
            {
                "run": self.run, "background": self.leave_running, "beside": self.run_beside, "until": self.run_until,
                "eventually": self.repeat, "typed": self.type, "listed": lambda block: None,
            }[kind](block)  # fmt: skip
        if waiting is not None:
            program, shown, of = waiting
            program.wait_for(shown, of)
            program.interrupt()

    def write(self, block: Block) -> None:
        ((how, name),) = block.words.items()
        path = self.folder / name
        text = block.text
        if name == "fleet.toml" and how == "file":
            text = text.replace("[hosts.alpha]\n", UNWATCHED) + BROKER
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a" if how == "append" else "x") as file:
            file.write(("\n" if how == "append" else "") + self.here(text))
        if block.language == "toml":
            load_fleet(path)
        elif path.name == "startup.yaml":
            assert read_startup(load_yaml(path.read_text(), file=str(path)), {}).entries
        elif block.language == "yaml":
            parse_rules(path.read_text(), file=str(path))
        else:
            compile(path.read_text(), str(path), "exec")

    def within(self, block: Block) -> list[str]:
        return [] if self.net is None else self.net.within("there" if "there" in block.words else "here")

    def place(self, block: Block) -> Path:
        return self.other if "there" in block.words else self.folder

    def call(self, block: Block, command: str, before: int, typed: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.within(block), "bash", "-c", f"(exit {before}); {self.here(command)}"], cwd=self.place(block),
            env=self.env, input=typed, capture_output=True, text=True, timeout=WAIT_S, check=False,
        )  # fmt: skip

    def run(self, block: Block) -> None:
        code = 0
        commands = block.commands
        for number, (command, shown) in enumerate(commands):
            done = self.call(block, command, code)
            code = done.returncode
            told = number + 1 < len(commands) and commands[number + 1][0] == "echo $?"
            assert code == 0 or told, f"{block}: {command}: exit code {code}:\n{done.stdout}{done.stderr}{self.logs()}"
            self.compare(block, command, shown, done.stdout + done.stderr)

    def repeat(self, block: Block) -> None:
        for command, shown in block.commands:
            deadline = time.monotonic() + WAIT_S
            while True:
                done = self.call(block, command, 0)
                if done.returncode == 0 and is_shown(self.expected(shown), done.stdout, whole=True):
                    break
                assert time.monotonic() < deadline, f"{block}: {command}:\n{done.stdout}{done.stderr}{self.logs()}"
                time.sleep(POLL_S)

    def type(self, block: Block) -> None:
        ((command, shown),) = block.commands
        typed = [line.removeprefix(PROMPT) for line in shown if line.startswith(PROMPT)]
        assert typed, block
        done = self.call(block, command, 0, "".join(f"{line}\n" for line in typed))
        rest = [line for line in shown if not line.startswith(PROMPT)]
        self.compare(block, command, rest, done.stdout.replace(PROMPT, "") + done.stderr)

    def compare(self, block: Block, command: str, shown: list[str], output: str) -> None:
        if shown:
            fits = is_shown(self.expected(shown), output, whole=True)
            assert fits, f"{block}: {command} printed:\n{output}\nnot:\n" + "\n".join(shown) + self.logs()

    def expected(self, shown: list[str]) -> list[str]:
        return plain(self.here("\n".join(shown)))

    def start(self, block: Block) -> tuple[Running, list[str]]:
        ((command, shown),) = block.commands
        for earlier in [one for one in self.running if one.command == self.here(command)]:
            self.stop(earlier)
        self.started += 1
        program = Running(self.here(command), self.place(block), self.env, self.started, self.within(block))
        self.running.append(program)
        return program, self.expected(shown)

    def leave_running(self, block: Block) -> None:
        program, shown = self.start(block)
        program.wait_for(shown, block)

    def run_until(self, block: Block) -> None:
        program, shown = self.start(block)
        program.wait_for(shown, block)
        self.running.remove(program)
        program.interrupt()

    def run_beside(self, block: Block) -> None:
        program, shown = self.start(block)
        program.wait_for(shown[:1], block)
        self.running.remove(program)
        self.beside = program, shown, block

    def stop(self, program: Running) -> None:
        self.running.remove(program)
        code = program.interrupt()
        assert code == 0, f"{program.command}: exit code {code} after Ctrl-C:\n{program.said()}"

    def stop_all(self) -> None:
        for program in reversed(self.running[:]):
            self.stop(program)

    def logs(self) -> str:
        return "".join(f"\n--- {shlex.quote(each.command)}\n{each.said()}" for each in self.running)

    def end(self) -> None:
        """Whatever happened, nothing stays behind."""
        last = [self.beside[0]] if self.beside is not None else []
        for program in [*self.running, *last]:
            if program.process.poll() is None:
                program.process.send_signal(signal.SIGINT)
        for program in [*self.running, *last]:
            try:
                program.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                os.killpg(program.process.pid, signal.SIGKILL)
                program.process.wait()


def free_ports() -> Iterator[int]:
    while True:
        port = random.choice(PORTS)
        with socket.socket() as one:
            try:
                one.bind(("127.0.0.1", port))
            except OSError:
                continue
        yield port


@pytest.mark.serial
@pytest.mark.timeout(600)
def test_the_readme_is_true_from_top_to_bottom(tmp_path: Path) -> None:
    with nullcontext() if why_not() else Net(MACHINES) as net:
        reader = Reader(tmp_path, net)
        try:
            for block in blocks():
                reader.do(block)
            reader.stop_all()
        finally:
            reader.end()
