"""The CUDA kernels of sampling against their references on the CPU, token by token."""

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from clo.kernels.sample import LATE, Adjustments, SamplingState, sample
from clo.kernels.take import take
from tests.draws import BIASES, Row, draw, plain, write

pytestmark = pytest.mark.gpu


def compare(
    logits: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor, rows: list[Row] | None = None
) -> None:
    count = len(logits)
    seed, position = torch.randint(0, 2**63 - 1, (count,)), torch.randint(10**3, 10**6, (count,))
    min_p = torch.rand(count) ** 8
    min_p[::2] = 0
    inputs = logits, temperature, top_p, top_k, seed, position, min_p, rows
    assert torch.equal(draw(*inputs), draw(*inputs, device="cuda"))


def some_row(rng: random.Random, vocab: int) -> Row:
    """Adjustments of any kind; every second row has a mask."""
    tokens = range(vocab)
    few = rng.sample(tokens, min(vocab, BIASES))
    return Row(
        prompt=rng.choices(tokens, k=50),
        output=rng.choices(tokens, k=20) + few[:1] * 20,
        repetition_penalty=rng.choice([1.0, rng.uniform(0.3, 3)]),
        frequency_penalty=rng.choice([0.0, rng.uniform(-2, 2)]),
        presence_penalty=rng.choice([0.0, rng.uniform(-2, 2)]),
        logit_bias={token: rng.uniform(-100, 100) for token in few[: rng.randrange(BIASES + 1)]},
        ends=rng.choices(tokens, k=3),
        min_tokens=rng.choice([0, 100]),
        allowed=rng.sample(tokens, -(-vocab // 2)) if rng.random() < 0.5 else None,
    )


@pytest.mark.parametrize("vocab", [1, 3, 50, 512, 1000, 1001, 49152, 128256, 128257, 262144])
def test_sample(vocab: int) -> None:
    rows = 24
    for spread in (1e-6, 0.3, 3.0, 10.0, 1e30):
        logits = torch.randn(rows, vocab) * spread
        logits[1] = 1.25
        logits[2:6] = logits[2:6].round()
        logits[7, ::3] = -torch.inf
        logits[8] = -0.0
        logits[8, ::2] = 0.0
        temperature = torch.rand(rows) * 2
        temperature[::5] = 0
        temperature[11:14] = torch.tensor([1e-9, 0.01, 100.0])
        top_p = torch.rand(rows)
        top_p[::3] = 1
        top_p[4] = 1e-30
        top_k = torch.randint(0, vocab + 2, (rows,))
        top_k[::4] = 0
        top_k[9:12] = torch.tensor([vocab, 2**31 - 1, 1])
        top_k[14:20] = torch.randint(1, 50, (6,))
        compare(logits, temperature, top_p, top_k)
        compare(logits, torch.zeros(rows), top_p, top_k)
        compare(logits, temperature + 0.1, torch.ones(rows), torch.zeros(rows, dtype=torch.int64))


def test_a_row_of_rubbish_gives_some_token_and_leaves_the_others_alone() -> None:
    rows, vocab = 24, 1000
    logits = torch.randn(rows, vocab)
    temperature, top_p = torch.arange(rows) % 2 * 0.7, torch.full((rows,), 0.9)
    numbers = torch.arange(rows)
    top_k = numbers % 3 * 20
    expected = draw(logits, temperature, top_p, top_k, numbers, numbers)
    logits[:4] = torch.nan
    logits[4:8, ::2] = torch.nan
    logits[8:10] = -torch.inf
    logits[10:12, 5] = torch.inf
    found = draw(logits, temperature, top_p, top_k, numbers, numbers, device="cuda")
    assert ((found >= 0) & (found < vocab)).all()
    assert torch.equal(found[12:], expected[12:])


@pytest.mark.parametrize("vocab", [1, 33, 1001, 49152, 151936, 262144])
def test_adjusted_rows_beside_others(vocab: int) -> None:
    rng, count = random.Random(vocab), 24
    for spread in (0.3, 3.0, 10.0):
        logits = torch.randn(count, vocab) * spread
        temperature, top_p = torch.rand(count) * 2, torch.rand(count)
        temperature[::4] = 0
        top_p[::3] = 1
        top_k = torch.randint(0, 60, (count,))
        compare(logits, temperature, top_p, top_k, [some_row(rng, vocab) for _ in range(count - 6)])


def test_masks_in_the_memory_of_the_host_and_tokens_that_are_taken() -> None:
    """Masks that are there, and others that are for another length; three steps."""
    count, vocab, rng = 24, 49153, random.Random(1)
    zeros = torch.zeros(count, dtype=torch.int64)
    state = SamplingState(
        torch.rand(count) * 2 * (zeros + torch.arange(count) % 2), *[zeros + 1.0], *[zeros] * 3
    )
    adjustments = plain(count, vocab)
    slots = torch.cat((torch.zeros(1, dtype=torch.int64), torch.randperm(count - 1)[:15] + 1))
    lengths, tokens = torch.randint(60, 99, (count,)), zeros.clone()
    lengths[slots[3]] = 0
    for slot in range(0, count, 2):
        row = some_row(rng, vocab)
        if slot == 0:  # its mask will be late
            row = replace(row, allowed=[1, 2, 3])
        write(adjustments, slot, row, int(lengths[slot]))
    pinned = {name: getattr(adjustments, name).pin_memory() for name in ("mask", "mask_length")}
    theirs = Adjustments(*(part.cuda() for part in adjustments))._replace(**pinned)
    their_lengths, their_tokens = lengths.cuda(), tokens.cuda()
    for step in range(3):
        for part in (adjustments, theirs):
            part.mask_length[::4] += step
        logits = torch.randn(16, vocab) * 3
        mine = sample(logits, slots, lengths, state, adjustments)
        its = sample(
            logits.cuda(),
            slots.cuda(),
            their_lengths,
            SamplingState(*(part.cuda() for part in state)),
            theirs,
        )
        assert torch.equal(mine, its.cpu())
        assert (mine == LATE).any() == (step > 0)
        take(mine, slots, lengths, tokens, adjustments)
        take(its, slots.cuda(), their_lengths, their_tokens, theirs)
        assert torch.equal(lengths, their_lengths.cpu()) and torch.equal(tokens, their_tokens.cpu())
        assert torch.equal(adjustments.marks, theirs.marks.cpu())
        torch.cuda.synchronize()
