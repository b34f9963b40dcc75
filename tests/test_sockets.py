"""Sockets in an event loop: nothing that arrives is missed, and other tasks have their turn."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import zmq

from clo.runtime.wire import sockets
from clo.runtime.wire.errors import ProtocolError
from clo.runtime.wire.messages import Failed, GetInfo, ToClient, ToRouter
from clo.runtime.wire.sockets import Arrivals, DealerSocket, Delivery, RouterSocket, encode
from tests.faults import WAIT_S
from tests.store import KEY

Router = RouterSocket[Failed, ToRouter]
Dealer = DealerSocket[GetInfo, ToClient]


def answer(request: str, text: str = "") -> Failed:
    return Failed(request, "internal", text)


@asynccontextmanager
async def connected(*names: bytes, queue: int = 0) -> AsyncIterator[tuple[Router, list[Dealer]]]:
    """A router and peers of these names, which it knows."""
    context: zmq.Context = zmq.Context()
    router = Router(context, "tcp://127.0.0.1:0", ToRouter, queue, KEY)
    peers = [Dealer(context, router.endpoint, ToClient, KEY, name) for name in names]
    try:
        for peer in peers:
            peer.send(GetInfo("hello"))
        messages = router.messages()
        assert {(await anext(messages))[0] for _ in peers} == set(names)
        await messages.aclose()  # type: ignore[attr-defined]
        yield router, peers
    finally:
        router.close(0)
        context.destroy(linger=0)


@pytest.mark.parametrize("seed", range(5))
def test_a_message_is_noticed_whatever_is_sent_meanwhile(seed: int) -> None:
    """A peer sends its next message only when the last one was answered, so one that is missed stops it."""
    rng = random.Random(seed)
    rounds, chat = 300, answer("chat")

    async def run() -> None:
        async with connected(b"a", b"b", b"c") as (router, peers):

            async def serve() -> None:
                async for name, message in router.messages():
                    assert isinstance(message, GetInfo)
                    assert router.send(name, answer(message.request)) is Delivery.SENT

            async def talk(peer: Dealer) -> None:
                for number in range(rounds):
                    peer.send(GetInfo(f"{number}"))
                    while (heard := peer.receive()) is None or heard == chat:
                        await asyncio.sleep(0)
                    assert heard == answer(f"{number}")

            async def chatter() -> None:
                while True:
                    for _ in range(rng.randrange(3)):
                        router.send(rng.choice([b"a", b"b", b"c"]), chat)
                    await asyncio.sleep(0.0005 * rng.random())

            others = [asyncio.create_task(serve()), asyncio.create_task(chatter())]
            await asyncio.wait_for(asyncio.gather(*map(talk, peers)), WAIT_S)
            for task in others:
                assert not task.done()
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

    asyncio.run(run())


def test_many_messages_come_in_order_and_other_tasks_have_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn is one message here."""
    monkeypatch.setattr(sockets, "TURN_S", 0.0)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def run() -> None:
        async with connected(b"a") as (router, (peer,)):
            for number in range(500):
                peer.send(GetInfo(f"{number}"))
            counting = asyncio.create_task(count())
            messages = router.messages()
            for number in range(500):
                assert (await asyncio.wait_for(anext(messages), WAIT_S))[1] == GetInfo(f"{number}")
                assert turns >= number
            counting.cancel()

    asyncio.run(run())


def test_messages_that_wait_come_in_one_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that is ready before them runs after them. How soon they are all there nobody can say."""
    monkeypatch.setattr(sockets, "TURN_S", WAIT_S)

    async def run() -> None:
        async with connected(b"a") as (router, (peer,)):
            ran = True
            while ran:
                for number in range(20):
                    peer.send(GetInfo(f"{number}"))
                await asyncio.sleep(0.05)
                task = asyncio.create_task(asyncio.sleep(0))
                messages = router.messages()
                for _ in range(20):
                    await anext(messages)
                ran = task.done()
                await task

    asyncio.run(asyncio.wait_for(run(), WAIT_S))


def test_what_is_not_valid_comes_as_an_error_with_its_sender() -> None:
    async def run() -> None:
        async with connected(b"a") as (router, (peer,)):
            peer.socket.send(b"\xc1")
            peer.socket.send_multipart([b"", encode(GetInfo("x"))])
            peer.send(GetInfo("valid"))
            messages = router.messages()
            found = [await asyncio.wait_for(anext(messages), WAIT_S) for _ in range(3)]
            assert [name for name, _ in found] == [b"a"] * 3
            assert [type(message) for _, message in found] == [ProtocolError, ProtocolError, GetInfo]
            assert "one frame, not 2" in str(found[1][1])

    asyncio.run(run())


def test_a_peer_that_is_full_and_one_that_is_not_there() -> None:
    """What was taken arrives whole, and nothing of what was not."""

    async def run() -> None:
        async with connected(b"a", queue=3) as (router, (peer,)):
            assert router.send(b"nobody", answer("x")) is Delivery.GONE
            sent = 0
            while router.send(b"a", answer(f"{sent}", "x" * 1_000_000)) is Delivery.SENT:
                sent += 1
            assert router.send(b"a", answer("x")) is Delivery.FULL
            for number in range(sent):
                assert peer.receive(1000 * WAIT_S) == answer(f"{number}", "x" * 1_000_000)
            while router.send(b"a", answer("again")) is Delivery.FULL:
                await asyncio.sleep(0.01)
            assert peer.receive(1000 * WAIT_S) == answer("again")

    asyncio.run(run())


def test_nothing_of_a_closed_socket_stays_with_the_event_loop() -> None:
    async def run() -> None:
        context: zmq.Context = zmq.Context()
        socket = context.socket(zmq.DEALER)
        descriptor = socket.get(zmq.FD)
        arrivals = Arrivals(socket)
        listening = asyncio.ensure_future(anext(arrivals.messages()))
        await asyncio.sleep(0)
        arrivals.after_send()
        arrivals.close()
        socket.close()
        listening.cancel()
        await asyncio.sleep(0.01)  # a look that was due
        assert not asyncio.get_running_loop().remove_reader(descriptor)
        context.term()

    asyncio.run(run())
