"""`interlock backup`: on the state folder of a host that is stopped, and refused on one that runs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from interlock.agents.backup_verb import main
from interlock.agents.journal import Journal
from interlock.agents.levels import LEVELS, Whole, back_up
from interlock.agents.revisions import RevisionStore
from interlock.agents.slot_io import Row
from interlock.broker.config import RevisionConfig
from interlock.broker.role import held

FLEET = """
[hosts.alpha]
control = "tcp://127.0.0.1:7180"
[hosts.beta]
control = "tcp://127.0.0.1:7181"
"""


class Machine:
    """A state folder with a host and an agent's backup, and the verb on it."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys
        self.fleet = folder / "fleet.toml"
        self.fleet.write_text(FLEET)
        self.state = folder / ".interlock" / "host-alpha"
        self.source = folder / "source"
        self.source.mkdir()
        (self.source / "agent.py").write_text("good = True")
        self.store = RevisionStore(self.state / "revisions")
        recorded = self.store.record("tutor", "r1", RevisionConfig(entry="agent:A", source="source"), self.source)
        self.row = Row("tutor", "r1", recorded.digest)
        self.code = recorded.folder / "agent.py"
        self.data = self.state / "data" / "tutor"
        self.data.mkdir(parents=True)
        (self.data / "memory").write_text("ten years")
        journal = Journal.open(self.state / "host.sqlite")
        journal.save_slot(self.row, "first")
        whole = Whole("alpha", self.row, recorded, None, self.data, journal)
        self.made = back_up(whole, self.state / "backups", LEVELS, now=time.time(), keep=5).path
        journal.close()

    def __call__(self, *argv: str) -> tuple[int, str, str]:
        code = main([*argv, "--fleet", str(self.fleet)])
        told = self.capsys.readouterr()
        return code, told.out, told.err

    def json(self, *argv: str) -> tuple[int, Any]:
        code, out, _ = self(*argv, "--json")
        return code, json.loads(out)

    def ruin(self) -> None:
        self.code.parent.chmod(0o700)
        self.code.chmod(0o600)
        self.code.write_text("nonsense(")


@pytest.fixture
def machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Machine:
    return Machine(tmp_path, capsys)


def test_list_names_every_backup_with_its_levels(machine: Machine) -> None:
    code, out, _ = machine("list")
    assert code == 0
    assert machine.made.name in out
    assert "tutor r1 on alpha: configuration, code, state, host;" in out
    code, told = machine.json("list", "tutor", "--host", "alpha")
    assert [one["levels"] for one in told["backups"]] == [list(LEVELS)]
    assert machine.json("list", "--host", "beta") == (0, {"backups": []})
    assert machine("list", "--host", "gamma")[0] == 2


def test_verify_reads_everything_back(machine: Machine) -> None:
    assert machine("verify")[:2] == (0, f"{machine.made.name}  tutor on alpha: as it was made\n1 backups, 0 damaged\n")
    (machine.made / "state" / "memory").write_text("tampered")
    code, out, _ = machine("verify")
    assert code == 13
    assert "DAMAGED: state/memory was changed" in out


def test_restore_puts_a_damaged_revision_back(machine: Machine) -> None:
    machine.ruin()
    assert machine.store.verify(machine.row.permanent_digest)
    code, out, _ = machine("restore", "tutor")
    assert code == 0
    assert "code: revision r1" in out
    assert machine.store.verify(machine.row.permanent_digest) == []
    assert (machine.data / "memory").read_text() == "ten years"


def test_restore_of_state_says_what_is_lost_and_keeps_it(machine: Machine) -> None:
    (machine.data / "memory").write_text("last night")
    code, told = machine.json("restore", "tutor", "--level", "state")
    assert code == 0
    assert told["levels"] == ["state"]
    assert told["lost"]["state"]["changed"] == 1
    assert (machine.data / "memory").read_text() == "ten years"
    assert (Path(told["lost"]["state"]["kept"]) / "memory").read_text() == "last night"


def test_restore_of_the_host_brings_a_damaged_journal_back(machine: Machine) -> None:
    (machine.state / "host.sqlite").write_bytes(b"rubbish")
    assert machine("restore", "tutor")[0] == 2  # which revision is permanent is not known
    assert machine("restore", "tutor", "--level", "host")[0] == 0
    journal = Journal.open(machine.state / "host.sqlite")
    assert journal.slot("tutor") == machine.row
    journal.close()


def test_a_host_that_runs_is_not_restored_under(machine: Machine) -> None:
    machine.ruin()
    with held(machine.state / "lock", "host alpha"):
        code, _, err = machine("restore", "tutor", "--level", "state")
        assert code == 12
        assert "host alpha runs" in err
        assert "stop the host" in err
        assert machine("list")[0] == machine("verify")[0] == 0
        assert machine("restore", "tutor", "--into", str(machine.fleet.parent / "copy"))[0] == 0
    assert (machine.fleet.parent / "copy" / "state" / "memory").read_text() == "ten years"
    assert machine.store.verify(machine.row.permanent_digest)  # nothing in place was changed
    assert machine("restore", "tutor", "--into", str(machine.fleet.parent / "copy"))[0] == 2  # it is there already


def test_what_there_is_not_is_told(machine: Machine) -> None:
    code, told = machine.json("restore", "pilot")
    assert (code, told["outcome"]) == (2, "error")
    assert "no backup of 'pilot'" in told["reason"]
    assert "no backup '20200101T000000.000000Z'" in machine("restore", "tutor", "--from", "20200101T000000.000000Z")[2]
    (machine.made / "code" / "agent.py").write_text("tampered")
    code, told = machine.json("restore", "tutor")
    assert code == 2
    assert "damaged" in told["reason"]
    assert machine("restore")[0] == 2
    assert machine("mend")[0] == 2
