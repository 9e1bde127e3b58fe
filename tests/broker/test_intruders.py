"""Whoever doesn't belong: refused, logged with who and why, and nobody else notices."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import Any

import pytest
import trio

from interlock.broker import client, crypto, keys, topics, wire
from interlock.broker.bus import new_event
from interlock.broker.commands import Breach, Migrate, RenewLease, RollBack, Steer
from interlock.broker.direct import serve_direct
from interlock.broker.errors import InterlockError, Refused, Unreachable
from interlock.broker.facts import AlertResolved, HostDown, Steered
from interlock.broker.gate import Allowance, Gate
from interlock.broker.protocol import BEAT_TOPIC, Publish, Replay
from interlock.broker.questions import Question, ask, serve_questions
from interlock.broker.security import Security
from interlock.broker.sockets import Socket, open_sockets
from interlock.broker.tuning import Curve
from interlock.broker.wire import Body, Event

MIGRATE = Migrate(agent="chat", to="v2", deadline=2e9)
STEER = Steer(agent="chat", action="approve", deadline=2e9)
STEERED = Steered(request="r", migration="m", agent="chat", action="approve", by="operator/local")
ROLL_BACK = RollBack(migration="m", agent="chat", epoch=1, breach=Breach(by="operator", reason="r"), issued=1.0)


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(25):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.01)


async def answered(socket: Socket) -> bool:
    """Whether anything comes within the time that takes an honest one."""
    with trio.move_on_after(0.4):
        await socket.receive()
        return True
    return False


def publication(event: Event) -> list[bytes]:
    return [wire.encode(Publish()), *wire.encode_event(event)]


async def test_without_a_key_or_with_an_unknown_one_nobody_gets_in(
    fleet: Any, caplog: pytest.LogCaptureFixture
) -> None:
    plain = publication(new_event(topics.COORDINATOR, MIGRATE, source="operator/local", time=1.0))
    for curve in (None, fleet.stranger()):
        async with open_sockets(curve) as sockets:
            dealer = sockets.open("dealer", connect=fleet.config.events)
            dealer.send_nowait(plain)
            sub = sockets.open("sub", connect=fleet.config.feed, subscribe=[""])
            telemetry = sockets.open("sub", connect=fleet.config.telemetry_out, subscribe=[""])
            for socket in (dealer, sub, telemetry):
                assert not await answered(socket)
    await fleet.works()
    assert "refused a stranger at 127.0.0.1: its key is unknown" in caplog.text
    async with fleet.bus("operator/local") as bus, bus.events([""], after=0) as feed:
        assert (await anext(feed)).header.source == "host/alpha"  # it is the first


async def test_a_wrong_server_key_gets_no_connection(fleet: Any) -> None:
    own = fleet.security("rules").curve()
    public, _ = crypto.new_curve_pair()
    async with open_sockets(Curve(own.public, own.secret, public)) as sockets:
        sub = sockets.open("sub", connect=fleet.config.feed, subscribe=[""])
        assert not await answered(sub)


FORBIDDEN: list[tuple[str, str, Body]] = [
    ("host/alpha", topics.COORDINATOR, MIGRATE),
    ("rules", topics.COORDINATOR, MIGRATE),
    ("monitor/alpha", topics.COORDINATOR, MIGRATE),
    ("operator/local", topics.command("alpha"), MIGRATE),
    ("host/alpha", topics.COORDINATOR, STEER),
    ("rules", topics.COORDINATOR, STEER),
    ("operator/local", topics.command("alpha"), STEER),
    ("operator/local", topics.migration_fact("chat"), STEERED),
    ("host/alpha", topics.host_fact("alpha"), STEERED),
    ("host/alpha", topics.rollback("beta"), ROLL_BACK),
    ("monitor/alpha", topics.rollback("alpha"), ROLL_BACK),
    ("host/alpha", topics.host_fact("beta"), HostDown(host="beta")),
    ("host/alpha", topics.host_fact("alpha"), HostDown(host="beta")),
    ("host/alpha", topics.host_fact("alpha"), MIGRATE),  # smuggled under a topic of its own
    ("rules", topics.host_fact("alpha"), HostDown(host="alpha")),
    ("host/alpha", topics.alert_fact("r"), AlertResolved(rule="r", labels={})),
    ("coordinator", "elsewhere/x/", MIGRATE),
]


@pytest.mark.parametrize(("who", "topic", "body"), FORBIDDEN)
async def test_the_right_key_with_the_wrong_role_or_topic_is_refused(
    fleet: Any, who: str, topic: str, body: Body, caplog: pytest.LogCaptureFixture
) -> None:
    async with fleet.bus(who) as bus:
        with pytest.raises(Refused):
            await bus.publish(topic, body, timeout=20)
    assert f"refused {who}" in caplog.text
    async with fleet.bus("operator/local") as bus:
        assert await bus.publish(topics.COORDINATOR, MIGRATE, timeout=20) == 1


async def test_someone_else_s_name_in_the_header_is_refused(fleet: Any, caplog: pytest.LogCaptureFixture) -> None:
    async with fleet.sockets("operator/local") as sockets:
        dealer = sockets.open("dealer", connect=fleet.config.events)
        with trio.fail_after(20):
            await dealer.send(publication(new_event(topics.COORDINATOR, MIGRATE, source="coordinator", time=1.0)))
            assert b"refused" in (await dealer.receive())[0]
    assert "refused operator/local: operator/local: claims to be 'coordinator'" in caplog.text


async def test_telemetry_only_under_one_s_own_host_and_name(fleet: Any, caplog: pytest.LogCaptureFixture) -> None:
    async with (
        fleet.bus("host/alpha") as alpha,
        fleet.bus("monitor/alpha") as monitor,
        fleet.bus("operator/local") as operator,
        operator.samples(["telemetry/"]) as feed,
    ):
        forged = [alpha.telemetry("beta", "host"), alpha.telemetry("alpha", "monitor"), operator.telemetry("a", "b")]
        seen: set[str] = set()
        with trio.fail_after(25):
            while not {"alpha/host", "alpha/monitor"} <= seen:
                for publisher in (*forged, alpha.telemetry("alpha", "host"), monitor.telemetry("alpha", "monitor")):
                    publisher.send({}, time=time.time())
                with trio.move_on_after(0.05):
                    seen |= {batch.source for batch in await anext(feed)}
        assert not {"beta/host", "a/b"} & seen
    for who in ("host/alpha", "operator/local"):
        assert f"refused {who}: {who} on telemetry/" in caplog.text


async def test_a_subscriber_hears_what_its_key_allows_and_says_nothing(
    fleet: Any, caplog: pytest.LogCaptureFixture
) -> None:
    fleet.ring.issue("subscriber/grafana", now=1.0, topics=["fact/host/"])
    async with fleet.sockets("subscriber/grafana") as sockets, fleet.bus("host/alpha") as host:
        await trio.sleep(0.3)  # until the broker has read the authority again
        sub = sockets.open("sub", connect=fleet.config.feed, subscribe=["fact/", "", "command/", BEAT_TOPIC])
        allowed = sockets.open("sub", connect=fleet.config.feed, subscribe=["fact/host/"])
        dealer = sockets.open("dealer", connect=fleet.config.events)
        with trio.fail_after(25):
            await sub.receive()  # a beat: its subscriptions are taken
            got = trio.Event()

            async def hear() -> None:
                await allowed.receive()
                got.set()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(hear)
                while not got.is_set():
                    await host.publish(topics.host_fact("alpha"), HostDown(host="alpha"))
                    await trio.sleep(0.02)
            while (frames := sub.receive_nowait()) is not None:
                assert frames[0] == BEAT_TOPIC.encode()
            await dealer.send([wire.encode(Replay(1, 0, [""]))])
            assert b"may not hear" in (await dealer.receive())[0]
            event = new_event(topics.host_fact("alpha"), HostDown(host="alpha"), source="subscriber/grafana", time=1.0)
            await dealer.send(publication(event))
            assert b"may not publish" in (await dealer.receive())[0]
    assert "refused subscriber/grafana: subscriber/grafana: may not hear 'command/'" in caplog.text


async def test_a_revoked_key_is_cut_off_from_everything_at_once_and_others_notice_nothing(
    fleet: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with fleet.bus("host/alpha") as honest, fleet.sockets("monitor/alpha") as sockets:
        sub = sockets.open("sub", connect=fleet.config.feed, subscribe=["fact/", BEAT_TOPIC])
        second = sockets.open("sub", connect=fleet.config.feed, subscribe=["fact/", BEAT_TOPIC])
        dealer = sockets.open("dealer", connect=fleet.config.events)
        async with honest.events(["fact/"], after=0) as feed:
            with trio.fail_after(25):
                await sub.receive()
                await second.receive()
                await dealer.send([wire.encode(Replay(1, 0, ["fact/"]))])
                await dealer.receive()
                fleet.ring.revoke("monitor/alpha")
                await until(lambda: "the key of monitor/alpha is no longer valid" in caplog.text)
                await until(lambda: "refused monitor/alpha: its key was revoked" in caplog.text)  # it comes back
                while sub.receive_nowait() or second.receive_nowait():
                    pass
                await honest.publish(topics.host_fact("alpha"), HostDown(host="alpha"))
                await anext(feed)
                dealer.send_nowait([wire.encode(Replay(1, 0, ["fact/"]))])
                for socket in (sub, second, dealer):
                    assert not await answered(socket)
            assert not feed.lost
    await fleet.works()


async def test_a_key_that_was_just_issued_works_without_a_restart(fleet: Any) -> None:
    fleet.ring.issue("host/gamma", now=1.0)
    async with fleet.bus("host/gamma") as bus:
        assert await bus.publish(topics.host_fact("gamma"), HostDown(host="gamma"), timeout=20) == 1


async def test_an_older_or_damaged_authority_changes_nothing(fleet: Any, caplog: pytest.LogCaptureFixture) -> None:
    before = keys.read_authority(fleet.folder)
    fleet.ring.revoke("monitor/alpha")
    await until(lambda: "the key of monitor/alpha is no longer valid" in caplog.text)
    keys.write_authority(fleet.folder, before)
    await until(lambda: "is older than" in caplog.text)
    (fleet.folder / keys.AUTHORITY).write_text("{")
    await until(lambda: "is damaged" in caplog.text)
    await works_for(fleet, "rules", before)


async def works_for(fleet: Any, identity: str, authority: keys.Authority) -> None:
    security = Security(keys.read_private(fleet.folder, identity), keys.Roll(authority), fleet.folder)
    async with client.open_bus(fleet.config, "", security=security) as bus:
        await bus.publish(topics.alert_fact("r"), AlertResolved(rule="r", labels={}), timeout=20)


async def test_a_host_s_own_endpoint_takes_only_whom_it_may(fleet: Any, nursery: trio.Nursery) -> None:
    taken: list[Event] = []
    security = fleet.security("host/alpha")
    lease = RenewLease(migration="m", agent="chat", epoch=1, lease_s=1.0)
    async with fleet.bus("host/alpha") as host:
        gate = Gate(security, "host alpha")
        await nursery.start(gate.serve, host.sockets)
        control = await nursery.start(partial(serve_direct, gate=gate), host.sockets, "tcp://127.0.0.1:*", taken.append)
        for who, body, may in (
            ("rules", ROLL_BACK, True),
            ("operator/local", ROLL_BACK, True),
            ("coordinator", lease, True),
            ("rules", lease, False),
            ("host/beta", ROLL_BACK, False),
            ("monitor/alpha", ROLL_BACK, False),
        ):
            async with fleet.bus(who) as bus:
                try:
                    await bus.direct(control, topics.rollback("alpha"), body, timeout=20)
                    assert may, who
                except Refused:
                    assert not may, who
        assert [event.header.source for event in taken] == ["rules", "operator/local", "coordinator"]
        async with open_sockets(fleet.stranger()) as sockets:
            dealer = sockets.open("dealer", connect=control, server=security.key_of("host/alpha"))
            dealer.send_nowait(wire.encode_event(new_event("rollback/alpha/", ROLL_BACK, source="rules", time=1.0)))
            assert not await answered(dealer)
        nursery.cancel_scope.cancel()
    assert len(taken) == 3


async def test_the_rule_engine_answers_only_who_hears_all_that_is_measured(fleet: Any, nursery: trio.Nursery) -> None:
    server = fleet.security("rules").key_of("rules")
    asked: list[str] = []

    def respond(question: Question) -> str:
        asked.append(question.expr)
        return "answer"

    async with fleet.bus("rules") as rules:
        gate = Gate(fleet.security("rules"), "rules")
        await nursery.start(gate.serve, rules.sockets)
        serve = partial(serve_questions, rules.sockets, "tcp://127.0.0.1:*", respond, gate=gate)
        endpoint = await nursery.start(serve)
        for who, may in (
            ("operator/local", True),
            ("coordinator", True),
            ("host/alpha", False),
            ("monitor/alpha", False),
        ):
            async with fleet.bus(who) as bus:
                question = Question(id=who, expr=who)
                try:
                    assert await ask(bus.sockets, endpoint, server, question, timeout=20) == "answer"
                    assert may, who
                except Refused:
                    assert not may, who
        async with open_sockets(fleet.stranger()) as sockets:
            with pytest.raises(Unreachable):
                await ask(sockets, endpoint, server, Question(id="x", expr="stranger"), timeout=0.6)
        nursery.cancel_scope.cancel()
    assert asked == ["operator/local", "coordinator"]


async def test_oversized_frames_cut_off_their_sender_only(fleet: Any, caplog: pytest.LogCaptureFixture) -> None:
    async with fleet.unnoticed(), fleet.sockets("host/beta") as sockets:
        dealer = sockets.open("dealer", connect=fleet.config.events)
        for size in (wire.MAX_FRAME + 1, 5 << 20):
            dealer.send_nowait([b"x" * size])
        await until(lambda: "refused host/beta: host/beta: sends what is no message" in caplog.text)
    await fleet.works()


async def test_altered_bytes_end_the_connection_and_reach_nobody(fleet: Any, nursery: trio.Nursery) -> None:
    """Somebody in between changes one byte of what passes once the connection is up."""
    host, port = fleet.config.events.removeprefix("tcp://").split(":")
    alters, ended = trio.Event(), trio.Event()

    async def pass_on(source: trio.SocketStream, target: trio.SocketStream, *, upwards: bool) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for data in source:
                if upwards and alters.is_set() and len(data) > 60:
                    middle = len(data) // 2
                    await target.send_all(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
                else:
                    await target.send_all(data)
            if alters.is_set():
                ended.set()
            await target.send_eof()

    async def proxy(client_side: trio.SocketStream) -> None:
        async with await trio.open_tcp_stream(host, int(port)) as server_side, trio.open_nursery() as both:
            both.start_soon(partial(pass_on, client_side, server_side, upwards=True))
            both.start_soon(partial(pass_on, server_side, client_side, upwards=False))

    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    nursery.start_soon(trio.serve_listeners, proxy, [listener])
    between = f"tcp://127.0.0.1:{listener.socket.getsockname()[1]}"
    async with fleet.unnoticed(), fleet.sockets("operator/local") as sockets:
        dealer = sockets.open("dealer", connect=between)
        event = new_event(topics.COORDINATOR, MIGRATE, source="operator/local", time=1.0, id="altered")
        with trio.fail_after(25):
            await dealer.send([wire.encode(Replay(1, 0, ["fact/none/"]))])
            await dealer.receive()
            alters.set()
            dealer.send_nowait(publication(event))
            await ended.wait()
    async with fleet.bus("operator/local") as bus, bus.events(["command/"], after=0) as feed:
        await bus.publish(topics.COORDINATOR, MIGRATE, timeout=20)
        assert (await anext(feed)).header.id != "altered"
    nursery.cancel_scope.cancel()


async def test_hundreds_of_strangers_and_half_open_connections_disturb_nobody(
    fleet: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The full number, 10,000, is measured by tests/benchmarks/bench_intruders.py."""
    address = fleet.config.events.removeprefix("tcp://").split(":")
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00CURVE" + bytes(47)
    async with fleet.unnoticed() as took, AsyncExitStack() as stack:
        for n in range(300):  # silent, in the middle of a greeting, after it, and no ZeroMQ at all
            stream = await trio.open_tcp_stream(address[0], int(address[1]))
            stack.push_async_callback(trio.aclose_forcefully, stream)
            with suppress(trio.BrokenResourceError):
                await stream.send_all((b"", greeting[: n % 64], greeting, b"GET / HTTP/1.1\r\n\r\n")[n % 4])
        sockets = await stack.enter_async_context(open_sockets(fleet.stranger()))
        strangers = [sockets.open("dealer", connect=fleet.config.events) for _ in range(100)]
        for stranger in strangers:
            stranger.send_nowait([wire.encode(Publish())])
        await until(lambda: "refused a stranger at 127.0.0.1: its key is unknown" in caplog.text)
        before = len(took)
        await until(lambda: len(took) > before + 20)
        assert not any(stranger.receive_nowait() for stranger in strangers)
    assert max(took) < 15  # one that waited until the half-open ones ended would take longer than publishing may
    lines = [line for line in caplog.messages if "a stranger at 127.0.0.1" in line]
    assert len(lines) == 1  # said once a minute, however many come


async def test_a_context_that_nobody_guards_can_t_be_a_server(fleet: Any) -> None:
    async with fleet.sockets("broker") as sockets:
        with pytest.raises(InterlockError, match="guard"):
            sockets.open("router", bind="tcp://127.0.0.1:*")


async def test_a_revoked_publisher_learns_that_nobody_answers(fleet: Any, caplog: pytest.LogCaptureFixture) -> None:
    fleet.ring.rotate("rules", now=2.0)
    old = fleet.security("coordinator")
    fleet.ring.revoke("coordinator")
    await until(lambda: "the key of coordinator is no longer valid" in caplog.text)
    async with client.open_bus(fleet.config, "", security=old) as bus:
        with pytest.raises(Unreachable):
            await bus.publish(topics.COORDINATOR, MIGRATE, timeout=0.4)
    async with fleet.bus("rules") as bus:
        await bus.publish(topics.alert_fact("r"), AlertResolved(rule="r", labels={}), timeout=20)


async def test_many_connections_of_one_key_are_refused_and_the_others_are_served(
    fleet: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("interlock.broker.gate.MAX_LINES", 8)
    async with fleet.sockets("host/beta") as sockets:
        heard = 0
        for _ in range(12):
            sub = sockets.open("sub", connect=fleet.config.feed, subscribe=[BEAT_TOPIC])
            heard += await answered(sub) or await answered(sub)
        assert heard == 8
        await fleet.works()
    assert "refused host/beta: has 8 connections already" in caplog.text


async def test_connections_that_never_say_who_they_are_disturb_nobody(fleet: Any) -> None:
    address = fleet.config.events.removeprefix("tcp://").split(":")
    async with AsyncExitStack() as stack:
        for _ in range(200):
            stream = await trio.open_tcp_stream(address[0], int(address[1]))
            stack.push_async_callback(trio.aclose_forcefully, stream)
            await stream.send_all(b"\xff\x00\x00")
        await fleet.works()


async def test_too_many_subscriptions_of_one_key_are_refused(
    fleet: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("interlock.broker.gate.MAX_SUBSCRIPTIONS", 5)
    async with fleet.sockets("host/beta") as sockets:
        sockets.open("sub", connect=fleet.config.feed, subscribe=[f"fact/{n}/" for n in range(6)], send_limit=0)
        await until(lambda: "refused host/beta: host/beta: more than 5 subscriptions" in caplog.text)
        await fleet.works()


async def test_who_is_refused_too_often_is_told_and_then_cut_off(
    fleet: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("interlock.broker.gate.MAX_REFUSED", 5.0)
    monkeypatch.setattr("interlock.broker.gate.CUT_OFF_S", 1.0)
    async with fleet.sockets("host/beta") as sockets, fleet.bus("host/alpha") as honest:
        dealer = sockets.open("dealer", connect=fleet.config.events)
        event = publication(new_event(topics.COORDINATOR, MIGRATE, source="host/beta", time=1.0))
        with trio.fail_after(25):
            await dealer.send(event)
            assert b"may not publish there" in (await dealer.receive())[0]
            while "refused host/beta: cut off" not in caplog.text:
                dealer.send_nowait(event)
                await trio.sleep(0.01)
            await honest.publish(topics.host_fact("alpha"), HostDown(host="alpha"), timeout=20)
            await until(lambda: "refused host/beta: it is cut off for now" in caplog.text)
            dealer.close()
        async with fleet.bus("host/beta") as bus:  # and it may come back
            await bus.publish(topics.host_fact("beta"), HostDown(host="beta"), timeout=20)


def test_an_allowance_fills_up_again() -> None:
    allowance = Allowance(10.0, 3.0, 0.0)
    assert [allowance.take(0.0) for _ in range(4)] == [True, True, True, False]
    assert [allowance.take(0.1) for _ in range(2)] == [True, False]
    assert [allowance.take(100.0) for _ in range(4)] == [True, True, True, False]
