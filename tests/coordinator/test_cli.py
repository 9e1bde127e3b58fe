"""The command line without a fleet: what it understands, what it says, and its exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest

from event_parts import logged
from interlock.broker import commands, facts
from interlock.broker.config import load_fleet
from interlock.broker.wire import Body
from interlock.coordinator import cli
from interlock.coordinator.catalogue import example
from interlock.coordinator.fleet import Fleet
from interlock.coordinator.ids import Ids, ids_of, read_ids
from interlock.coordinator.options import STEERING
from interlock.coordinator.screen import Screen, clock, closing
from interlock.coordinator.shell import Shell
from interlock.coordinator.verbs import Report, Status
from interlock.coordinator.watch import planes
from interlock.coordinator.wording import sentence, tone

Captured = pytest.CaptureFixture[str]
PATIENCE_S = 60  # for a process of ours to begin or end on a busy machine


@pytest.fixture
def fleet_file(tmp_path: Path) -> Path:
    """Of a fleet whose broker is nowhere."""
    names = ("events", "feed", "telemetry_in", "telemetry_out")
    lines = [f'{name} = "ipc://{tmp_path}/{number}"' for number, name in enumerate(names)]
    path = tmp_path / "fleet.toml"
    path.write_text(
        "security.mode = 'insecure'\n[broker]\n" + "\n".join(lines) + '\n[hosts.alpha]\ncontrol = "tcp://127.0.0.1:*"\n'
        '[agents.echo]\nhost = "alpha"\nendpoint = "tcp://127.0.0.1:7201"\nserve = "v1"\n'
        '[agents.echo.revisions]\nv1 = { entry = "echo:Echo" }\nv2 = { entry = "echo:Echo" }\n'
    )
    return path


def test_version(capsys: Captured) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("interlock ")


@pytest.mark.parametrize("argv", [["statsu"], ["--json", "statsu"]])
def test_an_unknown_verb_is_answered_with_the_nearest(argv: list[str], capsys: Captured) -> None:
    assert cli.main(argv) == 2
    assert "did you mean 'status'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "VERB"),
        (["migrate", "echo"], "--to"),
        (["migrate", "echo", "--to", "v2", "--strategy", "stage"], "did you mean 'staged'?"),
        (["plan", "echo"], "--to"),
        (["plan", "echo", "--to", "v2", "--strategy", "rapid", "--level", "low"], "not allowed with argument"),
        (["migrate", "echo", "--to", "v2", "--level", "hihg"], "did you mean 'high'?"),
        (["pause"], "AGENT"),
        (["history", "--outcome", "commited"], "did you mean 'committed'?"),
        (["history", "--since", "yesterday"], "is no time"),
        (["report", "--file", "/no/such/record.json"], "can't be read"),
        (["wave"], "ACTION"),
        (["wave", "strat"], "did you mean 'start'?"),
        (["wave", "start"], "--to --plan"),
        (["wave", "start", "--to", "v2", "--budget", "many"], "'many' is no failure budget"),
        (["wave", "start", "--to", "v2", "--budget", "101%"], "'101%' is no failure budget"),
        (["wave", "start", "--to", "v2", "--order", "depend"], "did you mean 'dependency'?"),
        (["wave", "start", "--plan", "/no/such/plan.toml"], "/no/such/plan.toml: can't be read"),
        (["abrot", "echo"], "did you mean 'abort'?"),
        (["status", "--timeout", "0"], "not a time in seconds"),
        (["watch", "--after", "-5"], "'-5' is not a whole number of 0 or more"),
        (["log", "--after", "-5"], "'-5' is not a whole number of 0 or more"),
        (["status", "--frob"], "unrecognized arguments: --frob"),
        (["watch", "facts"], "no topic starts with facts"),
        (["status", "--fleet", "/no/such/fleet.toml"], "/no/such/fleet.toml: there is no such file"),
        (["up", "/no/such/fleet.toml"], "/no/such/fleet.toml: there is no such file"),
    ],
)
def test_wrong_usage_is_told_in_one_line_and_exits_2(
    argv: list[str], said: str, fleet_file: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cli.FLEET, str(fleet_file))
    assert cli.main(argv) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert cli.main([*argv, "--json"]) == 2
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert told["outcome"] == "error"
    assert told["reason"] in err


@pytest.mark.parametrize(
    "argv",
    [
        ["status"],
        ["plan", "echo", "--to", "v2"],
        ["migrate", "echo", "--to", "v2"],
        *([verb, "echo"] for verb in STEERING),
        ["rollback", "echo"],
        ["report"],
        ["report", "echo"],
        ["explain", "echo"],
        ["history"],
        ["wave", "start", "--to", "v2"],
        ["wave", "status"],
        ["wave", "stop"],
        ["wave", "list"],
        ["watch"],
        ["watch", "telemetry/"],
    ],
)
def test_a_silent_broker_exits_3_and_says_which_and_what_to_do(
    argv: list[str], fleet_file: Path, capsys: Captured
) -> None:
    assert cli.main([*argv, "--fleet", str(fleet_file), "--timeout", "0.2", "--json"]) == 3
    out, err = capsys.readouterr()
    assert "the broker has not" in err
    assert "interlock up" in err or "running" in err
    assert json.loads(out)["outcome"] == "unreachable"


def test_roles_of_other_packages_take_the_process_over(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(BaseException):
        pass

    calls: list[list[str]] = []

    def execv(path: str, argv: list[str]) -> None:
        calls.append(argv[1:])
        raise Gone

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setenv(cli.FLEET, "env.toml")
    monkeypatch.setenv("INTERLOCK_INSECURE", "")
    for argv in (
        ["host", "--name", "alpha", "--fleet", "f.toml"],
        ["broker", "--json"],
        ["--fleet", "g.toml", "monitor", "--host", "alpha", "--insecure"],
    ):
        with pytest.raises(Gone):
            cli.main(argv)
    assert calls == [
        ["-P", "-m", "interlock.agents", "--name", "alpha", "--fleet", "f.toml"],
        ["-P", "-m", "interlock.broker", "--fleet", "env.toml"],
        ["-P", "-m", "interlock.monitors", "--host", "alpha", "--fleet", "g.toml"],
    ]
    assert os.environ["INTERLOCK_INSECURE"] == "1"


def test_the_coordinator_package_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "interlock.coordinator", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("interlock ")


@pytest.mark.parametrize(
    ("prefixes", "events", "telemetry", "expected"),
    [
        ([], False, False, ([""], [""])),
        ([], True, False, ([""], [])),
        ([], False, True, ([], [""])),
        (["fact/migration/", "telemetry/alpha/"], False, False, (["fact/migration/"], ["telemetry/alpha/"])),
        (["f"], False, False, (["f"], [])),
        (["t"], False, False, ([], ["t"])),
        (["nothing"], False, False, ([], [])),
    ],
)
def test_a_prefix_goes_to_the_plane_it_belongs_to(
    prefixes: list[str], events: bool, telemetry: bool, expected: tuple[list[str], list[str]]
) -> None:
    assert planes(prefixes, events=events, telemetry=telemetry) == expected


# --- words


@pytest.fixture(scope="module")
def every_body() -> list[Body]:
    """One of each kind."""
    return [example(kind) for kind in (*get_args(commands.Command), *get_args(facts.Fact))]


def test_every_event_has_a_sentence_and_a_tone(every_body: list[Body]) -> None:
    assert len(every_body) > 20
    for body in every_body:
        text = sentence(body)
        assert text
        assert "\n" not in text
        assert tone(body) in ("plain", "good", "warn", "bad", "dim")


def test_every_outcome_has_a_closing_line() -> None:
    for outcome in ("committed", "started", "rolled-back", "held", "refused", "failed"):
        told = Report(
            outcome, "echo", to="v2", previous="v1", decided_by="rule x", reason="too hot", migration="echo-1"
        )
        assert outcome.upper().replace("-", " ") in closing(told)


def test_text_from_the_fleet_is_not_taken_for_markup(tmp_path: Path) -> None:
    with open(tmp_path / "out", "w") as stream:
        Screen(stream).line("[bold]not bold[/bold] [x")
    assert (tmp_path / "out").read_text() == "[bold]not bold[/bold] [x\n"


def test_the_status_screen_shows_what_the_fold_knows(every_body: list[Body], tmp_path: Path) -> None:
    view = Fleet()
    for number, body in enumerate(every_body, start=1):
        view.apply(logged(body, number))
    with open(tmp_path / "out", "w") as stream:
        Screen(stream).status(Status(view, {}, 0.0))
    assert "Hosts" in (tmp_path / "out").read_text()


def test_an_empty_fleet_is_said_to_be_empty(tmp_path: Path) -> None:
    with open(tmp_path / "out", "w") as stream:
        Screen(stream).status(Status(Fleet(), {}, 0.0))
    assert "No host has reported" in (tmp_path / "out").read_text()


def test_a_moment_of_another_day_shows_its_date() -> None:
    assert clock(0.0) == "-"
    assert clock(86400.5).endswith(".500")
    assert clock(86400.5).startswith("19")


# --- shell


def shell_of(fleet_file: Path) -> tuple[Shell, list[list[str]]]:
    """A shell, and the commands that it ran."""
    ran: list[list[str]] = []

    def run(argv: list[str]) -> int:
        ran.append(argv)
        return 3

    ids = Ids(["echo-9", "echo-7"], ["wave-8", "wave-3"], ["wave-8"])
    return Shell(load_fleet(fleet_file), fleet_file, run, lambda path: ids), ran


def feed(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
    left = list(lines)

    def read(prompt: str = "") -> str:
        line = left.pop(0) if left else EOFError
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)


def test_the_shell_runs_verbs_on_its_fleet_and_outlives_their_errors(
    fleet_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    prompt, ran = shell_of(fleet_file)
    feed(monkeypatch, "status", "", "migrat echo", "migrate 'echo", KeyboardInterrupt, "migrate echo --to v2", "exit")
    prompt.cmdloop()
    assert ran == [
        ["status", "--fleet", str(fleet_file)],
        ["migrate", "--fleet", str(fleet_file), "echo", "--to", "v2"],
    ]
    out = capsys.readouterr().out
    assert "did you mean 'migrate'?" in out
    assert "No closing quotation" in out


def test_the_shell_ends_at_the_end_of_its_input(fleet_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, ran = shell_of(fleet_file)
    feed(monkeypatch)
    prompt.cmdloop()
    assert ran == []


def catches(pid: int, number: int) -> bool:
    """Whether the process has a signal handler of its own for it."""
    status = Path(f"/proc/{pid}/status").read_text("ascii")
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (number - 1) & 1)


def test_sigterm_ends_a_shell_also_while_a_verb_runs(fleet_file: Path) -> None:
    command = [sys.executable, "-m", "interlock.coordinator", "shell", "--fleet", str(fleet_file)]
    shell = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert shell.stdin is not None
        shell.stdin.write("watch --timeout 600\nwatch --timeout 600\n")
        shell.stdin.flush()
        deadline = time.monotonic() + PATIENCE_S
        while not catches(shell.pid, signal.SIGTERM):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        shell.terminate()
        assert shell.wait(PATIENCE_S) == 143
    finally:
        shell.kill()
        shell.communicate()


@pytest.mark.parametrize(
    ("line", "text", "expected"),
    [
        ("migrate ec", "ec", ["echo"]),
        ("migrate echo --to v", "v", ["v1", "v2"]),
        ("rollback ", "", ["echo"]),
        ("pause ", "", ["echo"]),
        ("plan echo --to v2 --level ", "", ["low", "medium", "high", "critical"]),
        ("migrate echo --strategy ", "", ["rapid", "staged", "framework", "custom"]),
        ("report ", "", ["echo", "echo-9", "echo-7"]),
        ("explain echo-", "echo-", ["echo-9", "echo-7"]),
        ("history ", "", ["echo"]),
        ("wave status ", "", ["wave-8", "wave-3"]),
        ("wave stop wa", "wa", ["wave-8"]),
    ],
)
def test_the_shell_completes_agents_their_revisions_and_ids(
    fleet_file: Path, line: str, text: str, expected: list[str]
) -> None:
    prompt, _ = shell_of(fleet_file)
    assert prompt.completedefault(text, line, len(line) - len(text), len(line)) == expected
    assert prompt.completenames("mi") == ["migrate"]


def test_ids_are_the_newest_of_the_log_and_none_where_nobody_answers(every_body: list[Body], fleet_file: Path) -> None:
    view = Fleet()
    for number, body in enumerate(every_body, start=1):
        view.apply(logged(body, number))
    found = ids_of(view)
    assert found.migrations[0] == next(reversed(view.migrations))
    assert found.waves == list(reversed(view.waves))
    assert set(found.moving) <= set(found.waves)
    assert read_ids(fleet_file) == Ids()


def test_help_in_the_shell_names_the_verbs(fleet_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    prompt, ran = shell_of(fleet_file)
    feed(monkeypatch, "help", "help status")
    prompt.cmdloop()
    assert "rollback AGENT" in capsys.readouterr().out
    assert ran == [["status", "--help"]]
