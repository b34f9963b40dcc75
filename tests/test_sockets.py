"""Sockets in an event loop: nothing that arrives is missed, and other tasks have their turn."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import pytest
import zmq

from clo.runtime.wire.messages import Failed, GetInfo
from clo.runtime.wire.sockets import TURN_S, Arrivals, Decoder, encode
from tests.faults import WAIT_S

Handle = Callable[[bytes, GetInfo], None]


class Router:
    """A ROUTER that is heard through ``Arrivals`` and sends meanwhile."""

    def __init__(self, context: "zmq.Context[Any]") -> None:
        self.socket = context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.socket.bind("tcp://127.0.0.1:0")
        self.endpoint = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._decode: Decoder[GetInfo] = Decoder(GetInfo)
        self._sent: Callable[[], None]

    def hear(self, arrivals: Arrivals, handle: Handle, turn_s: float = TURN_S) -> None:
        self._sent = arrivals.add(
            self.socket, lambda frames: handle(frames[0], self._decode(frames[1])), turn_s
        )

    def send(self, name: bytes, message: Failed) -> None:
        self.socket.send_multipart([name, encode(message)])
        self._sent()


class Dealer:
    def __init__(self, context: "zmq.Context[Any]", endpoint: str, name: bytes) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.IDENTITY, name)
        self.socket.connect(endpoint)
        self._decode: Decoder[Failed] = Decoder(Failed)

    def send(self, message: GetInfo) -> None:
        self.socket.send(encode(message))

    def receive(self) -> Failed | None:
        return self._decode(self.socket.recv()) if self.socket.poll(0) else None


def answer(request: str, text: str = "") -> Failed:
    return Failed(request, "internal", text)


@asynccontextmanager
async def connected(*names: bytes) -> AsyncIterator[tuple[Router, list[Dealer]]]:
    """A router and peers of these names, which it knows."""
    context: zmq.Context = zmq.Context()
    router = Router(context)
    peers = [Dealer(context, router.endpoint, name) for name in names]
    try:
        for peer in peers:
            peer.send(GetInfo("hello"))
        found: set[bytes] = set()
        async with listening(router, lambda name, _: found.add(name)):
            async with asyncio.timeout(WAIT_S):
                while found != set(names):
                    await asyncio.sleep(0.001)
        yield router, peers
    finally:
        context.destroy(linger=0)


@asynccontextmanager
async def listening(
    router: Router, handle: Handle, turn_s: float = TURN_S
) -> AsyncIterator[asyncio.Task[None]]:
    arrivals = Arrivals()
    router.hear(arrivals, handle, turn_s)
    task = asyncio.create_task(arrivals.listen())
    try:
        yield task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@pytest.mark.parametrize("seed", range(5))
def test_a_message_is_noticed_whatever_is_sent_meanwhile(seed: int) -> None:
    """A peer sends its next message only when the last one was answered, so one that is missed stops it."""
    rng = random.Random(seed)
    rounds, chat = 300, answer("chat")

    async def run() -> None:
        async with connected(b"a", b"b", b"c") as (router, peers):

            def serve(name: bytes, message: GetInfo) -> None:
                router.send(name, answer(message.request))

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

            async with listening(router, serve) as serving:
                chatting = asyncio.create_task(chatter())
                await asyncio.wait_for(asyncio.gather(*map(talk, peers)), WAIT_S)
                assert not serving.done()
                assert not chatting.done()
                chatting.cancel()

    asyncio.run(run())


@pytest.mark.parametrize("seed", range(5))
def test_a_message_is_noticed_at_a_socket_on_which_handlers_of_another_one_send(seed: int) -> None:
    """As between workers and clients: what comes at one socket is passed on to the other one's peer, which
    answers with its next message."""
    rng = random.Random(seed)
    rounds = 300

    async def run() -> None:
        async with connected(b"a") as (first, (left,)), connected(b"b") as (second, (right,)):
            arrivals = Arrivals()
            passed = 0

            def forward(message: GetInfo, to: Router, peer: bytes) -> None:
                nonlocal passed
                passed += 1
                to.send(peer, answer(message.request))

            first.hear(arrivals, lambda _, message: forward(message, second, b"b"), turn_s=0.0)
            second.hear(arrivals, lambda _, message: forward(message, first, b"a"))
            task = asyncio.create_task(arrivals.listen())

            async def talk(peer: Dealer) -> None:
                for number in range(rounds):
                    peer.send(GetInfo(f"{number}"))
                    while peer.receive() is None:
                        await asyncio.sleep(0.0002 * rng.random())

            await asyncio.wait_for(asyncio.gather(talk(left), talk(right)), WAIT_S)
            assert passed == 2 * rounds
            task.cancel()

    asyncio.run(run())


def test_many_messages_come_in_order_and_other_tasks_have_turns() -> None:
    """A turn is one message here."""
    turns = 0
    found: list[tuple[GetInfo, int]] = []

    async def count() -> None:
        nonlocal turns
        while len(found) < 500:
            turns += 1
            await asyncio.sleep(0)

    async def run() -> None:
        async with connected(b"a") as (router, (peer,)):
            for number in range(500):
                peer.send(GetInfo(f"{number}"))
            async with listening(router, lambda _, message: found.append((message, turns)), turn_s=0.0):
                await asyncio.wait_for(count(), WAIT_S)

    asyncio.run(run())
    for number, (message, before) in enumerate(found):
        assert message == GetInfo(f"{number}")
        assert before >= number


def test_messages_that_wait_come_in_one_turn() -> None:
    """A task that is ready before them runs after them. How soon they are all there nobody can say."""

    def note(found: list[bytes], name: bytes, _: GetInfo) -> None:
        found.append(name)

    async def run() -> None:
        async with connected(b"a") as (router, (peer,)):
            together = 0
            while together < 20:
                for number in range(20):
                    peer.send(GetInfo(f"{number}"))
                await asyncio.sleep(0.05)
                found: list[bytes] = []
                async with listening(router, partial(note, found), WAIT_S):
                    while not found:
                        await asyncio.sleep(0)
                    together = len(found)
                    while len(found) < 20:
                        await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(run(), WAIT_S))


def test_what_a_handler_raises_ends_listening() -> None:
    async def run() -> None:
        async with connected(b"a") as (router, (peer,)):

            def fail(name: bytes, message: GetInfo) -> None:
                raise ValueError("a fault of the handler")

            arrivals = Arrivals()
            router.hear(arrivals, fail)
            peer.send(GetInfo("x"))
            with pytest.raises(ValueError, match="a fault of the handler"):
                await asyncio.wait_for(arrivals.listen(), WAIT_S)

    asyncio.run(run())


def test_nothing_of_a_closed_socket_stays_with_the_event_loop() -> None:
    async def run() -> None:
        context: zmq.Context = zmq.Context()
        socket = context.socket(zmq.DEALER)
        descriptor = socket.get(zmq.FD)
        arrivals = Arrivals()
        sent = arrivals.add(socket, lambda frames: None)
        listening = asyncio.create_task(arrivals.listen())
        await asyncio.sleep(0)
        sent()
        arrivals.close()
        socket.close()
        listening.cancel()
        await asyncio.sleep(0.01)  # a look that was due
        assert not asyncio.get_running_loop().remove_reader(descriptor)
        context.term()

    asyncio.run(run())
