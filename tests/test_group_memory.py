"""Ranks that exchange values through memory that all of them read, as on GPUs, with threads as ranks."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from clo.gpu_worker.group import Group
from clo.gpu_worker.in_process import make_engine, prefill, wait_for
from clo.gpu_worker.model.decoder import load_decoder
from clo.kernels.meeting import Meeting
from clo.runtime.config import CacheConfig, ModelConfig
from clo.runtime.model.files import resolve
from clo.runtime.model.ranks import Rank

Found = TypeVar("Found")
TAKEN, BLOCKS = 2**21, 5
PROMPTS, STEPS, TOKENS = (600, 40, 7), 10, 700
MODEL = LlamaConfig(
    num_attention_heads=4, num_key_value_heads=4, attention_bias=True, mlp_bias=True, hidden_size=64,
    intermediate_size=96, num_hidden_layers=3, head_dim=16, vocab_size=512, max_position_embeddings=2048,
    initializer_range=0.2,
)  # fmt: skip


class GroupOfThreads(Group):
    """A rank in a thread; what a GPU would leave to torch.distributed is added up in float64.

    Args:
        rank: which one it is.
        memory: of each rank, what it leaves to be taken, and its shares of both sums.
        flags: of each rank.
    """

    def __init__(self, rank: Rank, memory: list[tuple[Tensor, ...]], flags: list[Tensor]) -> None:
        self.rank, self.shared = rank, None
        met = torch.zeros(BLOCKS, dtype=torch.int32)
        self.exchange, *self.meetings = (
            (places[rank.number], Meeting(addresses(places), addresses(flags), met))
            for places in zip(*memory, strict=True)
        )

    def sum(self, share: Tensor) -> Tensor:
        return self.join(share.double()).sum(0).to(share.dtype)

    def mean(self, number: float) -> float:
        return float(self.sum(torch.tensor([number], dtype=torch.float64))) / self.rank.count


def addresses(tensors: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    return torch.tensor([tensor.data_ptr() for tensor in tensors])


def together(ranks: int, place: int, work: Callable[[Group], Found]) -> list[Found]:
    """What each rank finds, where shares of a sum have ``place`` bytes."""
    memory = [
        tuple(torch.full((size,), 255, dtype=torch.uint8) for size in (TAKEN, place, place))
        for _ in range(ranks)
    ]
    flags = [torch.zeros(BLOCKS, ranks, dtype=torch.int32) for _ in range(ranks)]
    groups = [GroupOfThreads(Rank(number, ranks), memory, flags) for number in range(ranks)]
    with ThreadPoolExecutor(ranks) as threads:
        return list(threads.map(work, groups))


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(
    ("size", "dtype"),
    [((1, 64), torch.bfloat16), ((4, 2, 6), torch.int64), ((24, 516), torch.float32), ((1,), torch.int64)],
)
def test_ranks_get_what_all_and_the_first_have(ranks: int, size: tuple[int, ...], dtype: torch.dtype) -> None:
    given = [(1000 * torch.randn(size)).to(dtype) for _ in range(ranks)]

    def work(group: Group) -> tuple[Tensor, Tensor, Tensor]:
        mine = given[group.rank.number]
        return (
            group.join(mine),
            group.join(mine.mT if mine.dim() > 1 else mine),
            group.take_from_first(mine.clone()),
        )

    for joined, transposed, first in together(ranks, 64, work):
        assert torch.equal(joined, torch.stack(given))
        assert torch.equal(transposed, torch.stack([mine.mT if mine.dim() > 1 else mine for mine in given]))
        assert torch.equal(first, given[0])


@pytest.mark.parametrize("place", [2**18, 4096], ids=["all sums", "short sums"])
def test_a_model_answers_as_one_rank_does(tmp_path: Path, place: int) -> None:
    """Prompts, several in one step, and what their heads did; long sums of prompts may go another way."""
    AutoModelForCausalLM.from_config(MODEL).save_pretrained(tmp_path)
    model = resolve(ModelConfig(model=str(tmp_path), device="cpu", dtype="float32"))

    def work(group: Group | None) -> tuple[list[list[int]], Tensor, list[int]]:
        decoder = load_decoder(model, group)
        engine = make_engine(decoder, CacheConfig(resident=TOKENS), len(PROMPTS), TOKENS)
        generator, answers, logits = torch.Generator().manual_seed(0), [], []
        for slot, count in enumerate(PROMPTS):
            prompt: list[int] = torch.randint(0, decoder.vocab, (count,), generator=generator).tolist()
            logits.append(prefill(engine, slot, prompt, TOKENS).clone())
            answers.append(wait_for(engine, engine.start([slot], logits[-1])))
        slots = list(range(len(PROMPTS)))
        for step in range(1, STEPS):
            tokens = wait_for(engine, engine.step(slots, max(PROMPTS) + step))
            for answer, token in zip(answers, tokens, strict=True):
                answer.append(token)
        ended = [engine.retire(slot).finish(count + STEPS, STEPS) for slot, count in enumerate(PROMPTS)]
        return answers, torch.cat(logits), [stats.head_steps for stats in ended]

    expected, likely, steps_of_heads = work(None)
    for answers, logits, ended in together(2, place, work):
        assert answers == expected and ended == steps_of_heads
        torch.testing.assert_close(logits, likely, rtol=1e-3, atol=1e-3)
