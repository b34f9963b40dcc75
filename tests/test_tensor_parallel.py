"""A model that is divided among the ranks of a worker: its answers are those of a model that is not."""

import asyncio
import json
import random
import shutil
import signal
import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from clo.gpu_worker.commands import Follower, Leader
from clo.gpu_worker.group import Group, shared_bytes
from clo.gpu_worker.in_process import make_engine, stats_of, teacher_force
from clo.gpu_worker.model.decoder import load_decoder
from clo.gpu_worker.prefill import prefill_bytes
from clo.gpu_worker.prompt_graphs import SIZES as PROMPT_SIZES
from clo.gpu_worker.prompt_graphs import prompt_graph_bytes
from clo.runtime.client import AsyncClient
from clo.runtime.config import CacheConfig, ModelConfig
from clo.runtime.machine.process import GroupEnded
from clo.runtime.model.files import resolve
from clo.runtime.model.kv_shape import KVShape, LayerSpec
from clo.runtime.model.ranks import Rank, check_ranks, fitting_counts
from clo.runtime.wire.errors import ConfigError, WorkerDied
from clo.runtime.wire.messages import TakeStep
from tests.chaos import EXACT as EXACT_SERVER
from tests.chaos import answers
from tests.conftest import VOCABULARY
from tests.faults import WAIT_S
from tests.ranks import in_group
from tests.server import Server
from tests.test_recovery import SILENT, same
from tests.test_system import assert_all_free

Launch = Callable[..., AbstractContextManager[Server]]

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "head_dim": 16, "vocab_size": 515,
    "max_position_embeddings": 2048, "initializer_range": 0.2,
}  # fmt: skip
MODELS: dict[str, PreTrainedConfig] = {
    "4 query heads of 2": LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **SIZES),
    "8 heads": LlamaConfig(num_attention_heads=8, num_key_value_heads=8, **SIZES),
    "biases": Qwen2Config(num_attention_heads=8, num_key_value_heads=4, **SIZES),
    "biases everywhere": LlamaConfig(
        num_attention_heads=4, num_key_value_heads=4, attention_bias=True, mlp_bias=True, **SIZES
    ),
    "q/k norm, tied": Qwen3Config(
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, **SIZES
    ),
    "one KV head": LlamaConfig(num_attention_heads=4, num_key_value_heads=1, **SIZES),
}
MODELS["one KV head, of the tokenizer"] = LlamaConfig(
    num_attention_heads=4, num_key_value_heads=1, **SIZES | {"vocab_size": VOCABULARY}
)
"""515 tokens are no multiple of the ranks."""
EXACT = CacheConfig(resident=400)
DROPPING = CacheConfig(select_k=16, resident=48, recent=16, tail=64)
TOLERANCE: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-3}
"""Of log-probabilities in float32: the ranks add the same numbers up in another order."""


class Forced(NamedTuple):
    """What a model makes of a text that is forced upon it."""

    logprobs: np.ndarray  # [tokens, vocab]
    fetched: int  # by the heads of this rank
    kv_bytes: int  # of the whole model


def forced(group: Group | None, folder: str, config: CacheConfig) -> Forced:
    decoder = load_decoder(resolve(ModelConfig(model=folder, device="cpu")), group)
    engine = make_engine(decoder, config, 1, 400)
    generator = torch.Generator().manual_seed(0)
    tokens: list[int] = torch.randint(0, decoder.vocab, (320,), generator=generator).tolist()
    logits = teacher_force(engine, tokens[:300], tokens[300:])
    stats = stats_of(engine, 319, 19)
    return Forced(logits.log_softmax(-1).numpy(), stats.fetched_rows, stats.kv_bytes)


def all_forced(group: Group | None, folders: list[str], config: CacheConfig) -> list[Forced]:
    return [forced(group, folder, config) for folder in folders]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of ``MODELS``, whose biases and norms are not those of a new model, which do nothing."""
    made = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, config in MODELS.items():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.data += 0.3 * torch.randn_like(parameter)
            made[name] = str(tmp_path_factory.mktemp("models"))
            model.save_pretrained(made[name])
    return made


def assert_same(
    folders: dict[str, str], names: list[str], ranks: int, config: CacheConfig, empty: Path
) -> None:
    chosen = [folders[name] for name in names]
    expected = all_forced(None, chosen, config)
    by_rank = in_group(empty, ranks, all_forced, chosen, config)
    for name, one, *parts in zip(names, expected, *by_rank, strict=True):
        for part in parts:
            found, wanted = map(torch.from_numpy, (part.logprobs, one.logprobs))
            assert_close(found, wanted, **TOLERANCE, msg=partial("{1}: {0}".format, name))
        assert sum(part.fetched for part in parts) == one.fetched, name
        assert {part.kv_bytes for part in parts} == {one.kv_bytes}, name


def test_two_ranks_compute_what_one_process_does(folders: dict[str, str], tmp_path: Path) -> None:
    assert_same(folders, [name for name in MODELS if "tokenizer" not in name], 2, EXACT, tmp_path)


def test_two_ranks_drop_the_rows_that_one_process_drops(folders: dict[str, str], tmp_path: Path) -> None:
    assert_same(folders, [name for name in MODELS if "one KV head" not in name], 2, DROPPING, tmp_path)


def test_ranks_that_share_a_kv_head_drop_rows_as_if_each_had_its_own(
    folders: dict[str, str], tmp_path: Path
) -> None:
    """Each chooses for its own query heads, as one process does of a model that has the head twice."""
    one = folders["one KV head"]
    model = AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32)
    weights = {
        name: torch.cat((weight, weight)) if "k_proj" in name or "v_proj" in name else weight
        for name, weight in model.state_dict().items()
    }
    model.config.num_key_value_heads = 2
    copied = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    copied.load_state_dict(weights)
    copied.save_pretrained(str(tmp_path / "copied"))
    expected = forced(None, str(tmp_path / "copied"), DROPPING)
    parts = in_group(tmp_path, 2, forced, one, DROPPING)
    for part in parts:
        assert_close(torch.from_numpy(part.logprobs), torch.from_numpy(expected.logprobs), **TOLERANCE)
    assert sum(part.fetched for part in parts) == expected.fetched
    assert forced(None, one, DROPPING).fetched < expected.fetched


@pytest.mark.slow
@pytest.mark.parametrize("config", [EXACT, DROPPING], ids=["exact", "dropping"])
def test_four_ranks_compute_what_one_process_does(
    folders: dict[str, str], tmp_path: Path, config: CacheConfig
) -> None:
    names = ["8 heads", "biases", "biases everywhere"]
    assert_same(folders, names + ["one KV head"] * (config is EXACT), 4, config, tmp_path)


def test_what_cannot_be_divided_is_refused_and_what_can_is_named() -> None:
    three = LlamaConfig(hidden_size=144, num_attention_heads=9, num_key_value_heads=3, intermediate_size=36)
    with pytest.raises(
        ConfigError,
        match="--tensor-parallel-size 2 cannot divide a model of 9 query heads, 3 KV heads and an "
        "intermediate size of 36; 1, 3 or 9 divide it",
    ):
        check_ranks(three, 2)
    assert fitting_counts(MODELS["one KV head"]) == [1, 2, 4]
    assert fitting_counts(MODELS["8 heads"]) == [1, 2, 4, 8]


@pytest.mark.parametrize(("query_heads", "kv_heads", "ranks"), [(8, 4, 2), (8, 8, 8), (8, 2, 4), (6, 1, 3)])
def test_each_query_head_is_with_its_kv_head(query_heads: int, kv_heads: int, ranks: int) -> None:
    whole = KVShape((LayerSpec(),), query_heads, kv_heads, 16, "float32")
    seen = list[int]()
    for number in range(ranks):
        rank = Rank(number, ranks)
        queries, pairs, shape = rank.part(query_heads), rank.kv_heads(kv_heads), rank.shape(whole)
        seen += range(query_heads)[queries]
        own = range(kv_heads)[pairs]
        assert (shape.query_heads, shape.kv_heads) == (len(range(query_heads)[queries]), len(own))
        assert shape.block_tokens == whole.block_tokens
        for place, query in enumerate(range(query_heads)[queries]):
            assert own[place // shape.group] == query // whole.group
    assert seen == list(range(query_heads))


def test_memory_is_planned_for_hidden_states_that_each_rank_has_whole() -> None:
    """At the Llama-3-70B shape, and 8 ranks."""
    whole = KVShape((LayerSpec(),) * 80, query_heads=64, kv_heads=8, head_dim=128, dtype_name="bfloat16")
    share, hidden, tokens = Rank(0, 8).shape(whole), 8192 * 2, 100_000
    short, long = (prefill_bytes(share, count, sparse=False, codes=False) for count in (tokens, 2 * tokens))
    assert long - short > tokens * hidden
    assert prompt_graph_bytes(share) > 4 * PROMPT_SIZES[-1] * hidden


def test_memory_that_ranks_share_is_planned() -> None:
    """Two of them add up chunks of prompts there, twice in a layer; more of them only what is short."""
    chunk = 8192 * 4096 * 2
    assert shared_bytes(1, chunk) == 0
    assert 2 * chunk < shared_bytes(2, chunk) < 2 * chunk + 32 * 2**20
    assert shared_bytes(4, chunk) < 32 * 2**20


class Tape:
    """In the place of an engine: what it was asked for, and the checksum of its pages."""

    def __init__(self) -> None:
        self.pages_checksum, self.steps = 0, list[tuple[list[int], int]]()

    def step(self, slots: list[int], longest: int) -> None:
        self.steps.append((slots, longest))


def test_a_rank_that_strays_ends_before_it_computes_anything_wrong() -> None:
    near, far = socket.socketpair()
    first, second = Tape(), Tape()
    lead = Leader(first, [near])  # type: ignore[arg-type]
    follower = Follower("Rank 1 of worker 0", second, None, far)  # type: ignore[arg-type]
    for longest in (5, 6):
        first.pages_checksum = second.pages_checksum = longest  # as if slots had got pages
        lead(TakeStep([0, 2], longest))
        follower.follow()
    second.pages_checksum = 1
    lead(TakeStep([0, 2], 7))
    with pytest.raises(WorkerDied, match="Rank 1 of worker 0 has strayed from the first rank at command 3"):
        follower.follow()
    assert second.steps == [([0, 2], 5), ([0, 2], 6)]
    near.close()
    with pytest.raises(GroupEnded, match="first rank has ended"):
        follower.follow()
    with pytest.raises(GroupEnded):
        lead(TakeStep([0], 1))
    far.close()


def test_a_killed_rank_takes_its_worker_along_and_requests_go_on(launch: Launch, tiny_model: Path) -> None:
    """The answers of two ranks are those of one process, also where a rank is killed on the way."""
    with launch("--model", str(tiny_model), *EXACT_SERVER) as server:
        expected = asyncio.run(answers(server.address))
    with launch("--model", str(tiny_model), *EXACT_SERVER, "--tensor-parallel-size", "2") as server:
        same(asyncio.run(answers(server.address)), expected)
        before = server.children("gpu_worker")

        def kill(count: int) -> None:
            if count == 100:
                rank_of(server, 1).kill()

        same(asyncio.run(answers(server.address, kill)), expected)
        after = server.children("gpu_worker")
        assert len(before) == len(after) == 2 and not {*before} & {*after}
        (line,) = server.stderr.read_text().splitlines()
        assert line.partition("] ")[2] == (
            "rank 1 of worker 0 was killed by SIGKILL (the kernel does so when memory runs out, see dmesg); "
            "it is started again."
        )


def test_an_error_of_all_ranks_is_said_once(launch: Launch, tiny_model: Path) -> None:
    line = ("--model", str(tiny_model), *EXACT_SERVER, "--tensor-parallel-size", "2")
    with launch(*line, "--prefill-attention", "sparse", ready=False) as server:
        assert server.wait() == 1
        assert server.stderr.read_text() == (
            "error: --prefill-attention sparse needs a 16-bit --dtype on a GPU from Hopper (H100) on; use "
            "--prefill-attention dense.\n"
        )


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_does_not_answer_takes_its_worker_along(
    launch: Launch, tiny_model: Path, rank: int
) -> None:
    """Under load, where the others wait for it, and idle, where it alone does not answer."""
    line = ("--model", str(tiny_model), *EXACT_SERVER, "--tensor-parallel-size", "2")
    with launch(*line, program=("-c", SILENT)) as server:
        expected = asyncio.run(answers(server.address))

        def stop(count: int) -> None:
            if count == 100:
                rank_of(server, rank).send_signal(signal.SIGSTOP)

        same(asyncio.run(answers(server.address, stop)), expected)
        idle = server.children("gpu_worker")
        rank_of(server, rank).send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + WAIT_S
        while {*idle} & {*server.children("gpu_worker")}:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        same(asyncio.run(answers(server.address)), expected)
        lines = [line.partition("] ")[2] for line in server.stderr.read_text().splitlines()]
        name = f"rank {rank} of worker 0" if rank else "worker 0"
        assert lines[2:] == [
            f"{name} has not answered for 3 s; it is killed.",
            f"{name} has not answered for 3 s; it is started again.",
        ]


LATE = """\
import sys
import clo.runtime.children, clo.launch
clo.runtime.children.STARTING_S = 10.0
sys.exit(clo.launch.main(sys.argv[1:], worker="tests.late_rank"))
"""


@pytest.mark.slow
def test_a_rank_may_connect_after_its_worker_is_ready(launch: Launch, tiny_model: Path) -> None:
    """Also where it was started again: what does not connect is killed after a while."""
    line = ("--model", str(tiny_model), *EXACT_SERVER, "--tensor-parallel-size", "2")
    with launch(*line, program=("-c", LATE)) as server:
        server.children("tests.late_rank")[0].kill()
        asyncio.run(answers(server.address))
        serving = server.children("tests.late_rank")
        time.sleep(12)
        assert server.children("tests.late_rank") == serving
        assert len(server.stderr.read_text().splitlines()) == 1


@pytest.mark.slow
def test_a_server_stops_at_a_lost_rank_where_it_shall_not_recover(launch: Launch, tiny_model: Path) -> None:
    line = ("--model", str(tiny_model), *EXACT_SERVER, "--tensor-parallel-size", "2", "--recovery", "off")
    with launch(*line) as server:
        rank_of(server, 0).kill()
        assert server.wait() == 1
        assert server.stderr.read_text() == (
            "error: rank 0 of worker 0 was killed by SIGKILL (the kernel does so when memory runs out, see "
            "dmesg); the server has stopped, start it again.\n"
        )


CROWDED = (  # 6 blocks of 512 tokens, and all rows resident
    *("--kv-size", "1.125MiB", "--max-num-seqs", "6", "--select-k", "32", "--resident", "2048"),
    *("--tail", "0", "--max-model-len", "1600"),
)


async def crowd(address: str) -> tuple[dict[int, str], int, int]:
    """A hundred requests of several clients, some of which are given up; three texts begin most of them.
    Returns the texts of the others, how many tokens were cached, and how often a request was preempted."""
    rng = random.Random(0)
    beginnings = [[rng.randrange(4, 300) for _ in range(520)] for _ in range(3)]
    texts: dict[int, str] = {}
    cached = 0
    room = asyncio.Semaphore(12)

    async def one(client: AsyncClient, number: int, prompt: list[int], count: int, given_up: bool) -> None:
        nonlocal cached
        sampling: dict[str, Any] = (
            {"temperature": 0.0} if number % 2 else {"temperature": 0.8, "seed": number}
        )
        async with room:
            stream = client.stream(prompt, max_tokens=count, ignore_eos=True, **sampling)
            async for _ in stream:
                if given_up:
                    await stream.cancel()
                    return
            texts[number] = stream.result.text
            cached += stream.result.usage.cached_tokens

    async with AsyncClient(address, timeout=WAIT_S) as client, AsyncClient(address, timeout=WAIT_S) as other:
        work = []
        for number in range(100):
            prompt = rng.choice(beginnings) if number % 4 else []
            prompt = prompt + [rng.randrange(4, 300) for _ in range(rng.choice([3, 60, 420]))]
            count = rng.choice([1, 10, 40, 120])
            work.append(one((client, other)[number % 2], number, prompt, count, number % 9 == 5))
        await asyncio.gather(*work)
        await assert_all_free(client)
        preemptions = sum(worker.preemptions for worker in (await client.info()).workers)
    return texts, cached, preemptions


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["2", "4"])
def test_a_hundred_requests_get_what_they_get_from_one_process(
    launch: Launch, folders: dict[str, str], tiny_model: Path, tmp_path: Path, ranks: str
) -> None:
    """They join and leave, are given up and preempted, and share blocks; the KV head is one for all ranks."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    for file in ("config.json", "model.safetensors"):
        shutil.copy(Path(folders["one KV head, of the tokenizer"]) / file, model / file)
    line = ("--model", str(model), *CROWDED)
    with launch(*line) as server:
        expected, _, _ = asyncio.run(crowd(server.address))
    with launch(*line, "--tensor-parallel-size", ranks, "--prefetch", "verified") as server:
        texts, cached, preemptions = asyncio.run(crowd(server.address))
        assert server.stderr.read_text() == ""
    assert texts == expected
    assert cached > 0 and preemptions > 0


def rank_of(server: Server, rank: int) -> psutil.Process:
    (process,) = (
        process
        for process in server.children("gpu_worker")
        if json.loads(process.cmdline()[3])["group"]["rank"] == rank
    )
    return process
