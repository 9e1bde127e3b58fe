"""The trio adapter: nothing is lost under cancellation, nobody sleeps while a message waits."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
import zmq

from interlock.broker.errors import ConfigError, InUse
from interlock.broker.sockets import Socket, open_sockets
from interlock.broker.tuning import HEARTBEAT_S, HEARTBEAT_TTL


@pytest.fixture
def short() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="il-") as name:
        yield Path(name)


async def test_messages_arrive_in_order_while_both_sides_are_busy() -> None:
    count = 3000
    with trio.fail_after(60):
        async with open_sockets() as sockets, trio.open_nursery() as nursery:
            router = sockets.open("router", bind="tcp://127.0.0.1:*", send_limit=0)
            dealer = sockets.open("dealer", connect=router.endpoint)

            async def echo() -> None:
                while True:
                    for frames in await router.receive_batch():
                        await router.send(frames)

            async def send() -> None:
                for number in range(count):
                    await dealer.send([b"%d" % number])

            nursery.start_soon(echo)
            nursery.start_soon(send)
            got: list[bytes] = []
            while len(got) < count:
                got += [frames[0] for frames in await dealer.receive_batch()]
            assert got == [b"%d" % number for number in range(count)]
            nursery.cancel_scope.cancel()


async def test_whoever_uses_a_closed_socket_is_told_so_whatever_it_was_doing() -> None:
    with trio.fail_after(60):
        async with open_sockets() as sockets:
            router = sockets.open("router", bind="tcp://127.0.0.1:*")
            dealer = sockets.open("dealer", connect=router.endpoint)
            await dealer.send([b"x"])
            await router.receive()
            dealer.close()
            for use in (
                partial(dealer.send, [b"x"]),
                dealer.receive,
                dealer.receive_known,
                dealer.until_writable,
            ):
                with pytest.raises(trio.ClosedResourceError):
                    await use()
            for do in (
                dealer.receive_nowait,
                partial(dealer.send_nowait, [b"x"]),
                partial(dealer.send_tracked, [b"x"]),
            ):
                with pytest.raises(trio.ClosedResourceError):
                    do()


async def test_one_who_reads_batch_by_batch_is_told_when_the_socket_was_closed_between() -> None:
    with trio.fail_after(60):
        async with open_sockets() as sockets:
            pull = sockets.open("pull", bind="tcp://127.0.0.1:*")
            push = sockets.open("push", connect=pull.endpoint)
            for _ in range(2):
                await push.send([b"x"])
            assert await pull.receive_batch(1) == [[b"x"]]
            pull.close()  # as another task may, while this one looks at its message
            with pytest.raises(trio.ClosedResourceError):
                await pull.receive_batch(1)


async def test_a_cancelled_receive_swallows_no_message() -> None:
    count = 500
    with trio.fail_after(60):
        async with open_sockets() as sockets, trio.open_nursery() as nursery:
            pull = sockets.open("pull", bind="tcp://127.0.0.1:*")
            push = sockets.open("push", connect=pull.endpoint)

            async def send() -> None:
                for number in range(count):
                    await push.send([b"%d" % number])
                    await trio.sleep(0.0005)

            nursery.start_soon(send)
            got: list[bytes] = []
            while len(got) < count:
                with trio.move_on_after(0.0003):
                    got.append((await pull.receive())[0])
            assert got == [b"%d" % number for number in range(count)]


async def test_two_tasks_that_receive_are_an_error_and_not_a_race() -> None:
    async with open_sockets() as sockets, trio.open_nursery() as nursery:
        pull = sockets.open("pull", bind="tcp://127.0.0.1:*")
        nursery.start_soon(pull.receive)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await pull.receive()
        nursery.cancel_scope.cancel()


async def test_who_waits_on_a_socket_that_is_closed_learns_it() -> None:
    with trio.fail_after(20):
        async with open_sockets() as sockets:
            pull = sockets.open("pull", bind="tcp://127.0.0.1:*")
            raised: list[str] = []

            async def wait(socket: Socket) -> None:
                try:
                    await socket.receive()
                except trio.ClosedResourceError as error:
                    raised.append(str(error))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait, pull)
                await trio.testing.wait_all_tasks_blocked()
                pull.close()
            assert raised == ["pull tcp://127.0.0.1:*"]


async def test_an_address_in_use_and_one_that_is_none_are_said_so() -> None:
    async with open_sockets() as sockets:
        first = sockets.open("router", bind="tcp://127.0.0.1:*")
        with pytest.raises(InUse, match="in use"):
            sockets.open("router", bind=first.endpoint)
        with pytest.raises(ConfigError, match="can't bind"):
            sockets.open("router", bind="tcp://256.0.0.1:1")
        with pytest.raises(ConfigError, match="can't connect"):
            sockets.open("dealer", connect="nonsense")


async def test_a_subscription_outlives_a_restart_of_the_publisher_though_nobody_touches_the_socket(short: Path) -> None:
    endpoint = f"ipc://{short}/feed"
    with trio.fail_after(30):
        async with open_sockets() as sockets:
            subscriber = sockets.open("sub", connect=endpoint, subscribe=["t/"])
            async with open_sockets() as first:
                await _publish_until_heard(first.open("xpub", bind=endpoint), subscriber, b"one")
            async with open_sockets() as second:
                publisher = second.open("xpub", bind=endpoint)
                assert (await publisher.receive())[0] == b"\x01t/"  # renewed without anybody receiving
                await publisher.send([b"t/", b"two"])
                while (await subscriber.receive())[1] != b"two":
                    pass


async def _publish_until_heard(publisher: Socket, subscriber: Socket, text: bytes) -> None:
    async with trio.open_nursery() as nursery:

        async def publish() -> None:
            while True:
                await publisher.send([b"t/", text])
                await trio.sleep(0.01)

        nursery.start_soon(publish)
        while (await subscriber.receive())[1] != text:
            pass
        nursery.cancel_scope.cancel()


async def test_a_mandatory_router_says_when_nobody_is_there() -> None:
    async with open_sockets() as sockets:
        router = sockets.open("router", bind="tcp://127.0.0.1:*", mandatory=True)
        assert not router.send_nowait([b"nobody", b"x"])
        with pytest.raises(ConfigError, match="mandatory"):
            await router.send([b"nobody", b"x"])


async def test_who_connects_pings_and_says_so() -> None:
    async with open_sockets() as sockets:
        server = sockets.open("router", bind="tcp://127.0.0.1:*")
        client = sockets.open("dealer", connect=server.endpoint)
        careless = sockets.open("dealer", connect=server.endpoint, heartbeat=False)
        pings = [one._raw.getsockopt(zmq.HEARTBEAT_IVL) for one in (client, careless, server)]
        assert pings == [HEARTBEAT_S * 1000, 0, 0]
        assert client._raw.getsockopt(zmq.HEARTBEAT_TTL) == HEARTBEAT_TTL * 1000


async def test_in_a_large_fleet_the_kernels_watch_the_links_and_ask_twice() -> None:
    for heartbeat_s, idle_s in ((5.0, 1), (25.0, 5)):
        async with open_sockets(heartbeat_s=heartbeat_s) as sockets:
            server = sockets.open("router", bind="tcp://127.0.0.1:*")
            client = sockets.open("dealer", connect=server.endpoint)
            await client.send([b"x"])
            await server.receive()
            assert client._raw.getsockopt(zmq.HEARTBEAT_TTL) == 0
            for one in (client, server):
                assert one._raw.getsockopt(zmq.TCP_KEEPALIVE_IDLE) == idle_s
                assert one._raw.getsockopt(zmq.TCP_MAXRT) > 1000 * (idle_s + 1)


async def test_who_waits_for_a_program_that_is_starting_finds_it_before_who_does_not(short: Path) -> None:
    """The pauses between attempts grow up to a second, unless a rollback may wait for the one that starts."""
    endpoint = f"ipc://{short}/late"
    with trio.fail_after(60):
        async with open_sockets() as sockets:
            patient = sockets.open("dealer", connect=endpoint)
            waiting = sockets.open("dealer", connect=endpoint, starting=True)
            await patient.send([b"patient"])
            await waiting.send([b"waiting"])
            await trio.sleep(2.0)  # by now the other tries once a second
            router = sockets.open("router", bind=endpoint)
            assert [(await router.receive())[-1] for _ in range(2)] == [b"waiting", b"patient"]


SLOW = """
import trio
from interlock.broker.sockets import open_sockets

async def speak(out):
    while True:
        await trio.sleep(1.0)
        out.send_nowait([b"news"])

async def main():
    async with open_sockets(heartbeat_s=0.2) as sockets, trio.open_nursery() as nursery:
        out = sockets.open("xpub", bind="tcp://127.0.0.1:*", send_limit=0)
        slow = sockets.open("sub", connect=out.endpoint, subscribe=[""], receive_limit=10)
        assert await out.receive() == [b"\\1"]
        for _ in range(20_000):
            out.send_nowait([bytes(1000)])
        while await out.receive() != [b"\\1"]:
            pass  # until it connects anew: its queue was full, and no answer to its pings was read
        nursery.start_soon(speak, out)
        while await slow.receive() != [b"news"]:
            pass
        nursery.cancel_scope.cancel()

trio.run(main)
"""


def test_a_subscriber_whose_queue_was_full_is_read_from_again_and_lives() -> None:
    """libzmq ends the whole process otherwise: hence one of its own."""
    ended = subprocess.run([sys.executable, "-c", SLOW], capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
