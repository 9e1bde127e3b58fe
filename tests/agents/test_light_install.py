"""The distribution `interlock-agent`: built, installed in an environment of its own, and run there."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from collections.abc import Awaitable, Callable
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from interlock.broker import __version__

PROJECT = Path(__file__).resolve().parents[2] / "agents"
NOT_NEEDED = [
    "psutil",
    "promql_parser",
    "rich",
    "h11",
    "yaml",
    "pynvml",
    "interlock.agents.probes",
    "interlock.monitors",
]
HELD = {
    "interlock/agents": {
        "__init__.py",
        "py.typed",
        "activity.py",
        "answers.py",
        "agent.py",
        "contract.py",
        "fixed_ports.py",
        "gpu_lease.py",
        "sandbox.py",
        "serving.py",
        "state_door.py",
        "transfer.py",
        "run.py",
        "judging.py",
        "values.py",
    },
    "interlock/broker": {
        "__init__.py",
        "py.typed",
        "connections.py",
        "errors.py",
        "lines.py",
        "simgpu.py",
        "sockets.py",
        "streams.py",
        "tuning.py",
    },
}


def run(*command: str | Path) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the folder as it is, without the network: the build backend is this environment's own."""
    pytest.importorskip("hatchling", reason="the build backend isn't installed here")
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, PROJECT)
    [built] = folder.glob("*.whl")
    return built


def with_dependencies(names: list[str]) -> set[str]:
    """The distributions and all they depend on here."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        for line in distribution(name).requires or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return found


@pytest.fixture(scope="module")
def light_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment that holds the wheel and links to its three dependencies."""
    home = tmp_path_factory.mktemp("light")
    venv.create(home, with_pip=False, symlinks=True)
    [site] = home.glob("lib/python*/site-packages")
    for name in with_dependencies(["pyzmq", "msgspec", "trio"]):
        for file in distribution(name).files or []:
            top = file.parts[0]
            target = site / top
            source = Path(str(distribution(name).locate_file(top)))
            if top != ".." and source.exists() and not target.exists():
                target.symlink_to(source)
    run(sys.executable, "-m", "pip", "--python", home / "bin/python", "install", "--no-deps", "--no-index", wheel)
    return home / "bin" / "python"


def test_the_wheel_holds_what_an_agent_needs_and_nothing_else(wheel: Path) -> None:
    held: dict[str, set[str]] = {}
    for name in zipfile.ZipFile(wheel).namelist():
        folder, _, file = name.rpartition("/")
        if ".dist-info" not in folder:
            held.setdefault(folder, set()).add(file)
    assert held == HELD
    assert wheel.name.startswith(f"interlock_agent-{__version__}-")


FIND = """
import importlib.util, sys
def found(name):
    return all(importlib.util.find_spec(name.rsplit(".", n)[0]) for n in range(name.count("."), -1, -1))
print([name for name in sys.argv[1:] if found(name)])
"""


def test_what_the_host_needs_is_not_there(light_python: Path) -> None:
    assert run(light_python, "-c", FIND, "trio", "interlock.agents.run").strip() == "['trio', 'interlock.agents.run']"
    assert run(light_python, "-c", FIND, *NOT_NEEDED).strip() == "[]"
    where = run(light_python, "-c", "import interlock.agents.run as run; print(run.__file__)")
    assert Path(where).is_relative_to(light_python.parents[1])


async def test_an_agent_runs_and_answers_there(light_python: Path, launch_agent: Callable[..., Awaitable[Any]]) -> None:
    source = """
        import sys
        from interlock.agents.agent import Agent, handler
        from interlock.broker.simgpu import GpuOutOfMemory

        class Subject(Agent):
            @handler("who")
            def who(self, suffix: str = "") -> dict:
                return {"prefix": sys.prefix + suffix}
    """
    agent = await launch_agent(source, python=str(light_python))
    assert await agent.ask("who", suffix="!") == {"status": "ok", "prefix": f"{light_python.parents[1]}!"}
    assert (await agent.ask("who", suffix=1))["error"]["code"] == "bad-request"
    assert (await agent.control.describe()).version == __version__
    assert await agent.terminated() == 0
