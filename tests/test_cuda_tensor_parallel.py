"""Two GPUs compute what one does, by graphs and through a server."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from clo.gpu_worker.group import Group
from clo.gpu_worker.in_process import make_engine, prefill, wait_for
from clo.gpu_worker.model.decoder import load_decoder
from clo.runtime.client import AsyncClient
from clo.runtime.config import CacheConfig, ModelConfig
from clo.runtime.model.files import resolve
from tests.chaos import EXACT
from tests.faults import WAIT_S
from tests.ranks import in_group
from tests.server import Server
from tests.test_tensor_parallel import DROPPING, rank_of

pytestmark = [pytest.mark.gpu, pytest.mark.gpu2]
Launch = Callable[..., AbstractContextManager[Server]]
PROMPTS, STEPS = (300, 40, 7), 24


def greedy_by_graphs(group: Group | None, folder: str, config: CacheConfig) -> list[list[int]]:
    """Greedy continuations of a batch of prompts, the decode steps by graphs."""
    decoder = load_decoder(resolve(ModelConfig(model=folder, device="cuda", dtype="float32")), group)
    engine = make_engine(decoder, config, 4, 400)
    engine.capture()
    generator = torch.Generator().manual_seed(0)
    answers = []
    for slot, count in enumerate(PROMPTS):
        prompt: list[int] = torch.randint(0, decoder.vocab, (count,), generator=generator).tolist()
        answers.append(wait_for(engine, engine.start([slot], prefill(engine, slot, prompt, 400))))
    for step in range(1, STEPS):
        for answer, token in zip(
            answers, wait_for(engine, engine.step([0, 1, 2], PROMPTS[0] + step)), strict=True
        ):
            answer.append(token)
    for slot in range(len(PROMPTS)):
        engine.retire(slot)
    torch.cuda.synchronize()
    return answers


@pytest.mark.parametrize("config", [CacheConfig(resident=400), DROPPING], ids=["exact", "dropping"])
def test_two_gpus_draw_the_tokens_of_one(tiny_model: Path, tmp_path: Path, config: CacheConfig) -> None:
    expected = greedy_by_graphs(None, str(tiny_model), config)
    assert in_group(tmp_path, 2, greedy_by_graphs, str(tiny_model), config, device="cuda") == [expected] * 2


def sums(group: Group) -> tuple[bool, list[list[float]]]:
    """What a captured sum makes of random numbers, of several sizes and types, and whether the ranks read
    each other's memory."""
    found = []
    for dtype, size in ((torch.bfloat16, 4096), (torch.float32, 24 * 64), (torch.bfloat16, 2**20)):
        share = torch.full((2, size), float(1 + group.rank.number), dtype=dtype, device="cuda")
        given = share.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            group.sum(given.clone())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            given.copy_(share)
            summed = group.sum(given)
        for _ in range(3):
            graph.replay()
        found.append(sorted({*summed.float().flatten().tolist()}))
        torch.cuda.synchronize()
        del graph
    return group.shared is not None and group.meetings is not None, found


def taken(group: Group) -> list[bool]:
    """Whether what ranks take from one another within a graph is what they gave: logits, tokens, and what is
    too long for the memory that they share."""
    generator, right = torch.Generator().manual_seed(0), []
    for rows, width in ((24, 64128), (1, 8), (200, 64128)):
        both = torch.randn(2, rows, width, generator=generator).bfloat16().cuda()
        tokens = torch.randint(0, 2**40, (2, rows), generator=generator).cuda()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            group.join(both[group.rank.number])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for _ in range(3):
                joined = group.join(both[group.rank.number])
                first = group.take_from_first(tokens[group.rank.number].clone())
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
        right += [torch.equal(joined, both), torch.equal(first, tokens[0])]
        del graph
    return right


def test_ranks_take_from_one_another_within_graphs(tmp_path: Path) -> None:
    assert in_group(tmp_path, 2, taken, device="cuda") == [[True] * 6] * 2


def test_sums_within_graphs(tmp_path: Path) -> None:
    (symmetric, first), (other, second) = in_group(tmp_path, 2, sums, device="cuda")
    assert first == second == [[3.0]] * 3
    assert symmetric == other
    if torch.cuda.can_device_access_peer(0, 1):
        assert symmetric, "the GPUs can read each other's memory"


async def texts(address: str) -> list[str]:
    """Of twenty requests at once, prompts short and long, some greedy."""
    generator = torch.Generator().manual_seed(1)

    def prompt(number: int) -> list[int]:
        ids: list[int] = torch.randint(4, 300, (5 + 37 * number,), generator=generator).tolist()
        return ids

    async with AsyncClient(address, timeout=WAIT_S) as client:
        requests = [
            client.generate(
                prompt(number), max_tokens=40, ignore_eos=True, seed=number, temperature=0.8 * (number % 2)
            )
            for number in range(20)
        ]
        return [result.text for result in await asyncio.gather(*requests)]


def test_a_server_of_two_gpus_answers_as_one_of_one(launch: Launch, tiny_model: Path) -> None:
    line = ("--model", str(tiny_model), *EXACT, "--device", "cuda", "--dtype", "float32")
    with launch(*line) as server:
        expected = asyncio.run(texts(server.address))
    with launch(*line, "--tensor-parallel-size", "2") as server:
        assert asyncio.run(texts(server.address)) == expected
        rank_of(server, 1).kill()
        assert asyncio.run(texts(server.address)) == expected
        assert "rank 1 of worker 0 was killed by SIGKILL" in server.stderr.read_text()


def test_all_graphs_of_two_gpus_take_requests(launch: Launch, tiny_model: Path) -> None:
    """In bfloat16 short prompts, and those behind cached blocks, are graphs, too."""
    options = ("--select-k", "32", "--resident", "128", "--dtype", "bfloat16", "--drift-check", "20")
    line = ("--model", str(tiny_model), "--kv-size", "64MiB", *options, "--device", "cuda")
    with launch(*line, "--tensor-parallel-size", "2") as server:
        asyncio.run(texts(server.address))
        again = asyncio.run(texts(server.address))
        assert len(again) == 20 and all(again)
        assert server.stderr.read_text().count("error") == 0
