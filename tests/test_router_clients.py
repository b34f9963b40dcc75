"""The router and its clients: none is served at the cost of others, and where they reach it."""

import asyncio
import contextlib
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from clo.runtime import accounts
from clo.runtime import router as router_module
from clo.runtime import tokenizer as tokenizer_module
from clo.runtime.client import AsyncClient
from clo.runtime.config import ResolvedModel
from clo.runtime.tokenizer import Tokenizer
from clo.runtime.wire.errors import ConfigError
from clo.runtime.wire.messages import (
    NO_STATS,
    Abort,
    Cancel,
    Chat,
    Chunk,
    Done,
    Failed,
    Finished,
    Function,
    Generate,
    GetInfo,
    Info,
    Logprob,
    Prefilled,
    Progress,
    Refused,
    Run,
    SamplingParams,
    Step,
    Stepped,
    Text,
    TextPart,
    Tokens,
    ToolCall,
    Turn,
    Usage,
)
from clo.runtime.wire.sockets import encode
from tests import routers
from tests.faults import WAIT_S
from tests.peers import SLOTS, running
from tests.routers import SEVEN, STATS, ask, ids_of, in_loop, router_of

model, quiet, tokenizer = routers.model, routers.quiet, routers.tokenizer


# ----------------------------------------------------------- names, and clients that are slow or gone


@in_loop
async def test_two_clients_may_use_the_same_name(model: ResolvedModel) -> None:
    async with running(model) as wire:
        (worker,) = wire.workers
        clients = [wire.client(), wire.client()]
        for number, client in enumerate(clients, 1):
            client.send(ask("r", tokens=number))
            run = await worker.order()
            assert len(run.tokens) == number
            worker.step(run.sequence, 64 + number)
        clients[0].send(Cancel("r"))
        assert await worker.order() == Abort(0)
        worker.send(Done(1, "length", STATS))
        assert [type(message) for message in await clients[1].to_end("r")] == [Chunk, Finished]
        worker.send(Done(0, "cancelled", STATS))
        *_, finished = await clients[0].to_end("r")
        assert finished == Finished("r", "cancelled", Usage(1, 1), STATS)


@in_loop
async def test_tokens_of_one_step_go_to_their_clients_in_one_message_each(model: ResolvedModel) -> None:
    async with running(model) as wire:
        client, other, (worker,) = wire.client(), wire.client(), wire.workers
        for peer in (client, other):
            for name in ("a", "b"):
                peer.send(ask(name))
                await peer.info()
        runs = [await worker.order() for _ in range(4)]
        for _ in range(2):
            worker.send(Stepped([Step(run.sequence, 65 + run.sequence, None) for run in runs]))
        for peer, first in ((client, 65), (other, 67)):
            for _ in range(2):
                (a, b) = (await peer.message()).chunks
                assert (a.request, a.tokens, b.request, b.tokens) == ("a", [first], "b", [first + 1])


@in_loop
async def test_a_client_that_vanishes_before_its_request_has_a_worker(model: ResolvedModel) -> None:
    """It cannot be seen yet that it is gone; its request runs until the router says something."""
    async with running(model, ready=False) as wire:
        client, other, (worker,) = wire.client(), wire.client(), wire.workers
        client.send(ask("r"))
        await client.info()
        client.socket.close(linger=0)
        await other.info()
        worker.ready()
        run = await worker.order()
        while Abort(run.sequence) not in worker.heard:
            worker.step(run.sequence, 66)
            await other.info()
        worker.send(Done(run.sequence, "cancelled", STATS))
        other.send(ask("r"))
        assert await worker.order() == Abort(run.sequence)
        assert isinstance(await worker.order(), Run)


@in_loop
async def test_a_client_that_does_not_read_loses_its_requests(
    model: ResolvedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them, and it is told so once it reads; others go on."""
    monkeypatch.setattr(router_module, "UNREAD_BYTES", 1_000_000)
    monkeypatch.setattr(router_module, "TICK_S", 0.01)
    async with running(model) as wire:
        (worker,) = wire.workers
        deaf, other = wire.client(RCVHWM=1, RCVBUF=4096), wire.client()
        for name in ("a", "b"):
            deaf.send(ask(name))
        sequences = [(await worker.order()).sequence for _ in range(2)]
        other.send(ask("r"))
        kept = await worker.order()
        big = Logprob(1, -1.0, [(1, -1.0)] * 20_000)
        while not worker.heard[3:]:
            worker.step(sequences[0], 65, logprob=big)
            worker.step(kept.sequence, 66)
            assert (await other.next()).tokens == [66]
        assert {await worker.order(), await worker.order()} == {Abort(sequence) for sequence in sequences}
        for sequence in sequences:
            worker.step(sequence, 65)
            worker.send(Done(sequence, "cancelled", STATS))
        ends: list[Any] = []
        while len(ends) < 2:
            message = await deaf.next()
            ends += [message] if isinstance(message, Failed | Finished) else []
        assert {end.request for end in ends} == {"a", "b"}
        assert all(end.code == "overloaded" and "did not read its stream" in end.text for end in ends)
        worker.send(Done(kept.sequence, "length", STATS))
        assert isinstance((await other.to_end("r"))[-1], Finished)
        deaf.send(ask("a", tokens=9))
        assert len((await worker.order()).tokens) == 9, "it may try again"
        assert len(worker.heard) == 6


@in_loop
async def test_a_quiet_client_hears_how_far_its_request_is(
    model: ResolvedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_module, "QUIET_S", 0.02)
    monkeypatch.setattr(router_module, "TICK_S", 0.01)
    async with running(model, ready=False) as wire:
        client, (worker,) = wire.client(), wire.workers
        client.send(ask())
        assert await client.next() == Progress("r", "queued", 0, 5)
        worker.ready()
        run = await worker.order()
        assert await client.next() == Progress("r", "queued", 0, 5)
        worker.send(Prefilled(run.sequence, 2, 5))
        while await client.next() == Progress("r", "queued", 0, 5):
            pass
        for _ in range(3):
            assert await client.next() == Progress("r", "prefill", 2, 5)
        worker.send(Done(run.sequence, "length", STATS))
        while isinstance(message := await client.next(), Progress):
            pass
        assert isinstance(message, Finished)


# ------------------------------------------------------------------------ many requests of one client


@in_loop
async def test_a_client_with_many_requests_leaves_room_for_others(model: ResolvedModel) -> None:
    """Its own wait in the router, in their order, where those that it cancels reach no worker."""
    async with running(model) as wire:
        greedy, other, (worker,) = wire.client(), wire.client(), wire.workers
        most = router_module.SPARE + 2 * SLOTS
        for number in range(most + 50):
            greedy.send(ask(f"{number}"))
        runs = [await worker.order() for _ in range(most)]
        for number in range(most, most + 47):
            greedy.send(Cancel(f"{number}"))
            assert isinstance(await greedy.next(), Finished)
        info, _ = await greedy.info()
        assert isinstance(info, Info) and info.waiting == 3
        assert len(worker.heard) == most
        other.send(ask("late"))
        assert (await worker.order()).client != runs[0].client
        for number in range(most, most + 3):
            worker.send(Done(runs.pop(0).sequence, "length", STATS))
            assert (await greedy.next()).request == f"{number - most}"
            runs.append(await worker.order())
            assert runs[-1].client == runs[0].client and len(worker.heard) == number + 2
        worker.send(Refused(runs[0].sequence, "internal", "x"))
        await greedy.next()
        info, _ = await greedy.info()
        assert isinstance(info, Info) and info.waiting == 0
        assert len(worker.heard) == most + 4


@in_loop
async def test_what_is_cancelled_while_it_is_tokenised_counts_as_open_until_then(
    model: ResolvedModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or else a client could have the router keep any number of prompts."""
    go_on = threading.Event()

    def slow(*_: Any, **__: Any) -> list[int]:
        go_on.wait(WAIT_S)
        return [1]

    monkeypatch.setattr(tokenizer, "encode", slow)
    monkeypatch.setattr(accounts, "OPEN_REQUESTS", 3)
    async with running(model) as wire:
        client, (worker,) = wire.client(), wire.workers
        for number in range(3):
            client.send(Generate(f"{number}", Text("x" * 20_000), SEVEN))
            client.send(Cancel(f"{number}"))
            assert isinstance(await client.next(), Finished)
        client.send(ask("more"))
        assert (await client.next()).code == "overloaded"
        go_on.set()
        while wire.router._accounts:
            await asyncio.sleep(0)
        client.send(ask("again"))
        assert (await worker.order()).sequence == 0


@in_loop
async def test_open_requests_of_a_client_have_a_bound_in_bytes(
    model: ResolvedModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would exceed it is refused until another one has ended; other clients are served meanwhile."""
    prompt = Text("x" * 20_000)
    monkeypatch.setattr(tokenizer, "encode", lambda *_, **__: [1])
    monkeypatch.setattr(accounts, "OPEN_BYTES", 2 * len(encode(Generate("a", prompt, SEVEN))))
    async with running(model) as wire:
        greedy, other, (worker,) = wire.client(), wire.client(), wire.workers
        for name in "ab":
            greedy.send(Generate(name, prompt, SEVEN))
        runs = [await worker.order() for _ in "ab"]
        for message in (Generate("c", prompt, SEVEN), ask("c"), GetInfo("c")):
            greedy.send(message)
            (failed,) = await greedy.to_end("c")
            assert isinstance(failed, Failed) and failed.code == "overloaded"
        other.send(Generate("a", prompt, SEVEN))
        assert (await worker.order()).client != runs[0].client
        worker.send(Done(runs[0].sequence, "length", STATS))
        await greedy.to_end("a")
        greedy.send(Generate("c", prompt, SEVEN))
        assert (await worker.order()).client == runs[0].client
        assert len(worker.heard) == 4


@in_loop
async def test_a_worker_hears_whose_a_request_is(model: ResolvedModel) -> None:
    async with running(model) as wire:
        one, other, (worker,) = wire.client(), wire.client(), wire.workers
        for client in (one, other, one):
            client.send(ask(f"{id(client)}-{len(worker.heard)}"))
            await worker.order()
        first, second, third = (run.client for run in worker.heard if isinstance(run, Run))
        assert first == third != second


# --------------------------------------------------------------------------------------- long prompts


@pytest.mark.parametrize(
    ("chat", "apart"),
    [
        (Chat([Turn("user", "a")]), False),
        (Chat([Turn("user", "a" * 20_000)]), True),
        (Chat([Turn("user", [TextPart("a" * 20)] * 1000)]), True),
        (Chat([Turn("user", "")] * 100), False),
        (Chat([Turn("user", "")] * 1000), True),
        (Chat([Turn("u" * 20_000, "a")]), True),
        (Chat([Turn("user", "a", "b" * 20_000)]), True),
        (Chat([Turn("tool", "a", tool_call_id="1" * 20_000)]), True),
        (Chat([Turn("assistant", "a", reasoning_content="b" * 20_000)]), True),
        (Chat([Turn("user", "a")], '{"enable_thinking": false}'), True),
        (Chat([Turn("assistant", None, tool_calls=[ToolCall(Function("f", "{}"))])]), True),
    ],
)
@in_loop
async def test_chats_that_may_become_long_are_rendered_in_a_thread(
    model: ResolvedModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, chat: Chat, apart: bool
) -> None:
    threads: list[threading.Thread] = []

    def encode(*_: Any, **__: Any) -> list[int]:
        threads.append(threading.current_thread())
        return [1]

    async with running(model) as wire:
        client, (worker,) = wire.client(), wire.workers
        with monkeypatch.context() as patch:
            patch.setattr(tokenizer, "encode", encode)
            client.send(Generate("r", chat, SEVEN))
            await worker.order()
    assert (threads[0] is not threading.main_thread()) is apart


@in_loop
async def test_a_prompt_of_ids_is_made_into_text_in_a_thread(
    model: ResolvedModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, decode, threads = ids_of(tokenizer, "xyz"), tokenizer.decode, []

    def record(tokens: list[int], **options: Any) -> str:
        if tokens == ids:
            threads.append(threading.current_thread())
        return decode(tokens, **options)

    async with running(model) as wire:
        client, (worker,) = wire.client(), wire.workers
        with monkeypatch.context() as patch:
            patch.setattr(tokenizer, "decode", record)
            client.send(Generate("r", Tokens(ids), SamplingParams(max_tokens=7, echo=True)))
            await worker.order()
    assert threads[0] is not threading.main_thread()


@in_loop
async def test_a_long_prompt_is_tokenised_while_others_are_served(
    model: ResolvedModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is cancelled meanwhile, and its name given to another request; what comes of it is dropped."""
    monkeypatch.setattr(tokenizer_module, "LONG_CHARACTERS", 10)
    begun, go_on = threading.Event(), threading.Event()
    encode_prompt = tokenizer.encode

    def slow(prompt: Any, *arguments: Any, **options: Any) -> list[int]:
        if isinstance(prompt, Text):
            begun.set()
            go_on.wait(WAIT_S)
        return encode_prompt(prompt, *arguments, **options)

    monkeypatch.setattr(tokenizer, "encode", slow)
    async with running(model) as wire:
        client, (worker,) = wire.client(), wire.workers
        client.send(Generate("r", Text("x" * 20)))
        await asyncio.to_thread(begun.wait, WAIT_S)
        client.send(ask("other"))
        assert (await worker.order()).tokens == [1, 2, 3, 4, 5]
        client.send(Cancel("r"))
        assert await client.next() == Finished("r", "cancelled", Usage(0, 0), NO_STATS)
        client.send(ask("r", tokens=3))
        run = await worker.order()
        assert run.tokens == [1, 2, 3]
        go_on.set()
        worker.step(run.sequence, 1)
        worker.send(Done(run.sequence, "length", STATS))
        assert len(await client.to_end("r")) == 2
        _, before = await client.info()
        assert before == [] and len(worker.heard) == 2


@in_loop
async def test_long_prompts_of_a_client_are_tokenised_one_after_another(
    model: ResolvedModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In their order, so that the threads are there for other clients too."""
    begun: list[str] = []
    go_on = threading.Event()

    def slow(prompt: Text, *_: Any, **__: Any) -> list[int]:
        begun.append(prompt.text[0])
        go_on.wait(WAIT_S)
        return [1]

    monkeypatch.setattr(tokenizer, "encode", slow)
    async with running(model) as wire:
        greedy, other, (worker,) = wire.client(), wire.client(), wire.workers
        try:
            names = "012345"
            assert len(names) > router_module.THREADS
            for name in names:
                greedy.send(Generate(name, Text(name * 20_000), SEVEN))
            await greedy.info()  # all have arrived
            other.send(Generate("r", Text("r" * 20_000), SEVEN))
            while len(begun) < 2:
                await asyncio.sleep(0.001)
            assert set(begun) == {"0", "r"}
        finally:
            go_on.set()
        for _ in (*names, "r"):
            await worker.order()
        assert [name for name in begun if name != "r"] == list(names)


# ------------------------------------------------------------------------------------------ addresses


def test_what_a_router_cannot_start_with(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A port in use, and a folder without a tokenizer, which leaves the port free."""
    monkeypatch.setattr(router_module, "Tokenizer", Tokenizer)

    async def run() -> None:
        first = router_of(0, tiny_model)
        port = int(first.address.rpartition(":")[2])
        with pytest.raises(ConfigError, match=f"Port {port} of 127.0.0.1 cannot be used"):
            router_of(port, tiny_model)
        await first.close()
        with pytest.raises(ConfigError, match="tokenizer"):
            router_of(port, tmp_path)
        await router_of(port, tiny_model).close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("host", "sentence"),
    [
        ("256.1.1.1", "neither an address nor a name of this machine"),
        ("no-such-name.invalid", "neither an address nor a name of this machine"),
        ("", "neither an address nor a name of this machine"),
        ("*", "neither an address nor a name of this machine"),
        ("a b", "neither an address nor a name of this machine"),
        ("x" * 300, "neither an address nor a name of this machine"),
        ("[::1", "neither an address nor a name of this machine"),
        ("192.0.2.1", "is not an address of this machine"),
        ("2001:db8::1", "is not an address of this machine"),
    ],
)
def test_hosts_that_cannot_be_listened_on(tiny_model: Path, host: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        router_of(0, tiny_model, host)


def _has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    ("host", "numeric"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("localhost", "127.0.0.1"),
        ("0.0.0.0", "0.0.0.0"),
        ("::1", "[::1]"),
        ("[::1]", "[::1]"),
    ],
)
def test_hosts_by_number_by_name_and_of_ipv6(tiny_model: Path, host: str, numeric: str) -> None:
    """The address of the ready line is one that a client can use."""
    if ":" in host and not _has_ipv6():
        pytest.skip("this machine has no IPv6")

    async def run() -> None:
        router = router_of(0, tiny_model, host)
        assert router.address.startswith(f"tcp://{numeric}:")
        serving = asyncio.create_task(router.serve())
        async with AsyncClient(router.address) as client:
            assert (await asyncio.wait_for(client.info(), WAIT_S)).model == "tiny"
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving
        await router.close()

    asyncio.run(run())
