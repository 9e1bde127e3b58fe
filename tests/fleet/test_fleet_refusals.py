"""What can't be done is refused in one line and changes nothing; garbage on every socket changes nothing either."""

from __future__ import annotations

import contextlib
import random
import socket
import tomllib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq

SEED = 20_250_101
ROUNDS = 60  # messages of each sort to each port

BROKEN = """
[agents.calc.revisions.torn]
source = "torn"
entry = "calc:Calc"
[agents.calc.revisions.lost]
source = "calc"
entry = "calc:Nowhere"
[agents.calc.revisions.needy]
source = "needy"
entry = "calc:Calc"
[agents.calc.revisions.stillborn]
source = "stillborn"
entry = "calc:Stillborn"
start_timeout_s = 5
[agents.calc.revisions.gone]
source = "nowhere"
entry = "calc:Calc"
[agents.rep.revisions.missing]
source = "rep"
command = ["./no-such-program", "{port}"]
probe = { kind = "tcp", port = "request" }
"""


@pytest.fixture(scope="module")
def running(make_module_fleet: Callable[..., Any]) -> Iterator[Any]:
    made = make_module_fleet({"calc": "alpha", "rep": "alpha"}, more=BROKEN)
    calc = (made.folder / "calc" / "calc.py").read_text()
    for name, text in {
        "torn": calc + "\ndef torn(:\n    pass\n",
        "needy": "import no_such_package\n" + calc,
        "stillborn": calc + "\nclass Stillborn(Calc):\n    def setup(self):\n        raise RuntimeError('no heart')\n",
    }.items():
        (made.folder / name).mkdir()
        (made.folder / name / "calc.py").write_text(text)
    made.start()
    yield made
    assert made.stop() == 0, made.log
    made.nothing_left()


@pytest.fixture
def fleet(running: Any, clients: Any) -> Iterator[Any]:
    """Around each test the agents answer without a failure, and at its end by the same instances as before."""
    running.calm()
    before = running.instances("calc") | running.instances("rep")
    with clients(running.endpoint("calc"), 1) as calc, clients(running.endpoint("rep"), 1) as rep:
        yield running
        calc.more()
        rep.more()
    assert calc.failures == rep.failures == []
    running.calm()
    assert running.instances("calc") | running.instances("rep") == before


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("calk", "--to", "r2"), ["no agent 'calk'", "'calc'"]),
        (("calc", "--to", "r3"), ["no revision 'r3'", "r2"]),
        (("calc", "--to", "r1"), ["serves revision r1 already"]),
        (("calc", "--to", "torn"), ["calc.py:", "invalid syntax"]),
        (("calc", "--to", "lost"), ["Nowhere"]),
        (("calc", "--to", "needy"), ["calc.py:1", "no_such_package"]),
        (("calc", "--to", "gone"), ["nowhere", "no such folder"]),
        (("rep", "--to", "missing"), ["no-such-program"]),
        (("../etc", "--to", "r2"), ["no agent '../etc'"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_done_is_refused_in_one_line(argv: tuple[str, ...], words: list[str], fleet: Any) -> None:
    done = fleet.cli("migrate", *argv, "--strategy", "rapid")
    assert done.code == 12, done
    last = done.out.splitlines()[-1]
    assert last.startswith("REFUSED, nothing was changed: "), done
    for word in words:
        assert word in last, done
    assert "Traceback" not in done.out + done.err


def test_a_revision_that_does_not_come_to_life_is_rolled_back_with_its_last_words(fleet: Any) -> None:
    done = fleet.migrate("calc", "stillborn").done()
    assert done.code == 10, done
    assert "no heart" in done.json["reason"]


def test_a_second_migration_of_the_same_agent_is_refused_and_the_first_goes_on(running: Any, clients: Any) -> None:
    running.calm()
    old, since = running.serving("calc"), len(running.events.events)
    with clients(running.endpoint("calc"), 1) as load:
        first = running.migrate("calc", running.other("calc"), "staged")
        migration = running.observed("calc", since)
        second = running.cli("migrate", "calc", "--to", "odd")
        assert second.code == 12, second
        assert f"migration {migration} of calc is in flight" in second.out
        assert running.cli("rollback", "calc").code == 0
        assert first.done().code == 10
    assert load.failures == []
    running.alone("calc", old)


def test_without_a_migration_there_is_nothing_to_roll_back(fleet: Any) -> None:
    done = fleet.cli("rollback", "calc")
    assert done.code == 12, done
    assert "no migration of calc is in flight" in done.out
    unknown = fleet.cli("rollback", "calk")
    assert unknown.code == 12, unknown
    assert "'calc'" in unknown.out


def test_a_fleet_file_that_is_broken_while_the_fleet_runs_is_named_and_harmless(fleet: Any) -> None:
    good = fleet.path.read_text()
    try:
        fleet.path.write_text(good.replace('serve = "r1"', 'serv = "r1"', 1))
        elsewhere = fleet.folder / "copy.toml"
        elsewhere.write_text(good)
        done = fleet.cli("migrate", "calc", "--to", "r2", "--fleet", str(elsewhere))  # only the roles read the bad one
        assert done.code == 12, done
        assert "unknown key 'serv'" in done.out
        assert "fleet.toml" in done.out
        done = fleet.cli("migrate", "calc", "--to", "r2")
        assert done.code == 2, done
        assert "unknown key 'serv'" in done.err
    finally:
        fleet.path.write_text(good)
    tomllib.loads(good)


def _ports(fleet: Any) -> list[int]:
    return sorted(fleet.ports.values())


def _frames(dice: random.Random) -> list[bytes]:
    """One message: random bytes, or something that looks a little like ours."""
    sorts = [
        lambda: dice.randbytes(dice.randrange(200)),
        lambda: b"",
        lambda: b"\x01fact/",
        lambda: b"command/alpha/",
        lambda: b"rollback/alpha/",
        lambda: b"\x81\xa4type\xa9roll-back",
        lambda: b'{"action": "double"}',
        lambda: b'{"action": ' + b"[" * 50,
        lambda: b"\xdd\xff\xff\xff\xff",
        lambda: b"\x91" * 3000,
    ]
    return [dice.choice(sorts)() for _ in range(dice.randrange(1, 6))]


def _send_frames(ports: list[int], dice: random.Random) -> None:
    with zmq.Context() as context:
        for kind in (zmq.DEALER, zmq.REQ, zmq.SUB, zmq.PUSH, zmq.XSUB):
            for port in ports:
                with context.socket(kind) as sock:
                    sock.linger = 200
                    sock.sndtimeo = 200
                    sock.connect(f"tcp://127.0.0.1:{port}")
                    try:
                        if kind == zmq.SUB:
                            for _ in range(ROUNDS):
                                sock.subscribe(dice.randbytes(20))
                        else:
                            for _ in range(1 if kind == zmq.REQ else ROUNDS):
                                sock.send_multipart(_frames(dice))
                    except zmq.Again:  # a kind that the other side doesn't speak to
                        pass


def _send_bytes(ports: list[int], dice: random.Random) -> None:
    greeting = b"\xff" + b"\0" * 8 + b"\x7f\x03\x00NULL" + b"\0" * 48
    for port in ports:
        for start in (b"", b"GET / HTTP/1.1\r\n\r\n", greeting):
            with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
                with contextlib.suppress(OSError):
                    sock.sendall(start + dice.randbytes(dice.randrange(3000)))


def test_garbage_on_every_socket_is_dropped(running: Any, clients: Any) -> None:
    running.calm()
    dice = random.Random(SEED)
    roles = {role: running.role(*role).pid for role in (("broker",), ("agents", "alpha"), ("coordinator", "rules"))}
    with clients(running.endpoint("calc")) as calc, clients(running.endpoint("rep")) as rep:
        with socket.socket() as silent:  # connected, and says nothing
            silent.connect(("127.0.0.1", running.ports["calc"]))
            _send_frames(_ports(running), dice)
            _send_bytes(_ports(running), dice)
            to = running.other("calc")
            done = running.migrate("calc", to).done()
            assert done.code == 0, done
            calc.served_by(to)
            rep.more()
    assert calc.failures == rep.failures == []
    assert roles == {role: running.role(*role).pid for role in roles}
    assert running.cli("status", "--json").json["hosts"]["alpha"]["condition"] == "up"
