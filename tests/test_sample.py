"""Sampling on the CPU: the draw itself, and every parameter against transformers' own logits processors."""

import random

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from clo.kernels.sample import LATE, MOST_COUNTED, PROMPT, SamplingState, min_p_steps, sample, uniform
from clo.kernels.take import take
from tests.draws import Row, draw, plain, write


def test_sampling_is_greedy_repeatable_and_follows_the_distribution() -> None:
    logits = torch.randn(4, 50) * 2
    zero, ones = torch.zeros(4), torch.ones(4)
    no_k, seed = torch.zeros(4, dtype=torch.int64), torch.arange(4)
    assert torch.equal(draw(logits, zero, ones, no_k, seed, seed), logits.argmax(-1))

    draws = 20_000
    row = logits[:1].repeat(draws, 1)
    position = torch.arange(draws)
    seeds = torch.full((draws,), 7)
    warm, all_p = torch.ones(draws), torch.ones(draws)
    k0 = torch.zeros(draws, dtype=torch.int64)
    drawn = draw(row, warm, all_p, k0, seeds, position)
    alone = draw(row[:1], warm[:1], all_p[:1], k0[:1], seeds[:1], position[5:6])
    assert alone[0] == drawn[5], "the draw does not depend on the batch"
    share = torch.bincount(drawn, minlength=50) / draws
    assert (share - logits[0].softmax(-1)).abs().max() < 0.015

    top = draw(row, warm, all_p, k0 + 3, seeds, position)
    assert set(top.tolist()) == set(logits[0].topk(3).indices.tolist())
    order = logits[0].softmax(-1).sort(descending=True)
    nucleus = int((order.values.cumsum(0) < 0.5).sum()) + 1
    drawn = draw(row, warm, all_p * 0.5, k0, seeds, position)
    assert set(drawn.tolist()) == set(order.indices[:nucleus].tolist())


def test_sampling_does_what_a_naive_loop_in_float64_does() -> None:
    different = 0
    for vocab in (1, 2, 33, 300):
        rows = 200
        logits = torch.randn(rows, vocab) * 3 * torch.rand(rows, 1)
        temperature = torch.rand(rows) * 2 + 0.1
        top_p = (torch.rand(rows) * 1.3 + 1e-3).clamp_max(1.0)
        top_k = torch.randint(0, vocab + 3, (rows,))
        seed, position = torch.randint(0, 2**63 - 1, (rows,)), torch.randint(0, 10**6, (rows,))
        drawn = draw(logits, temperature, top_p, top_k, seed, position)
        for row, number in enumerate(uniform(seed, position).tolist()):
            weight = (logits[row].double() / temperature[row].double()).softmax(0)
            order = weight.argsort(descending=True)[: int(top_k[row]) or vocab]
            before = weight[order].cumsum(0) - weight[order]
            kept = set(order[before < top_p[row].double() * weight[order].sum()].tolist())
            left = number * sum(float(weight[token]) for token in kept)
            for token in sorted(kept):
                left -= float(weight[token])
                if left < 0:
                    break
            different += token != int(drawn[row])
    assert different <= 1, "a number between two tokens may go either way"


def test_sampling_treats_equal_tokens_alike_and_never_draws_what_is_impossible() -> None:
    draws = 2000
    seeds, ones, k0 = torch.arange(draws), torch.ones(draws), torch.zeros(draws, dtype=torch.int64)

    def drawn(row: list[float], temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> set[int]:
        logits = torch.tensor(row).repeat(draws, 1)
        found: list[int] = draw(logits, ones * temperature, ones * top_p, k0 + top_k, seeds, k0).tolist()
        return set(found)

    row = [1.0, 2.0, 0.5, 2.0, 1.0, -torch.inf, 2.0, 1.0]
    assert drawn(row, temperature=0) == {1}
    assert drawn(row, temperature=1e-9) == drawn(row, temperature=0.01) == {1, 3, 6}
    assert drawn(row, temperature=100) == {0, 1, 2, 3, 4, 6, 7}
    for k in (1, 2, 3):
        assert drawn(row, top_k=k) == {1, 3, 6}
    for k in (4, 5, 6):
        assert drawn(row, top_k=k) == {0, 1, 3, 4, 6, 7}
    for k in (7, 8, 9, 2**31 - 1):
        assert drawn(row, top_k=k) == {0, 1, 2, 3, 4, 6, 7}
    for p in (1e-30, 0.1, 0.6):  # the three most likely have 0.64, of the six most likely 0.73
        assert drawn(row, top_p=p) == {1, 3, 6}
    assert drawn(row, top_p=0.7) == {0, 1, 3, 4, 6, 7}
    assert drawn(row, top_p=0.7, top_k=4) == {1, 3, 6}
    assert drawn(row, top_p=0.75, top_k=4) == {0, 1, 3, 4, 6, 7}
    assert drawn([0.0, -0.0]) == drawn([-0.0, 0.0], top_k=1) == {0, 1}
    assert drawn([-torch.inf, 5.0, -torch.inf], temperature=100) == {1}
    assert drawn([3e38, -3e38, 3e38], temperature=0.1, top_p=0.4) == {0, 2}


def test_uniform_numbers_are_uniform_for_any_seed() -> None:
    for seed in (0, 1, 2**62):
        numbers = uniform(torch.full((10_000,), seed), torch.arange(10_000))
        assert numbers.min() >= 0 and numbers.max() < 1
        assert abs(numbers.mean() - 0.5) < 0.02
        assert abs(numbers.var() - 1 / 12) < 0.005


VOCAB = 40
DRAWS = 4000


def shares(logits: Tensor, row: Row, temperature: float = 1.0, min_p: float = 0.0) -> Tensor:
    """How often each token is drawn from logits [vocab]."""
    ones = torch.ones(DRAWS)
    drawn = draw(
        logits.repeat(DRAWS, 1), ones * temperature, ones, torch.zeros(DRAWS, dtype=torch.int64),
        torch.arange(DRAWS), torch.full((DRAWS,), 50), ones * min_p, row,
    )  # fmt: skip
    return torch.bincount(drawn, minlength=len(logits)) / DRAWS


def likeliest(logits: Tensor, row: Row) -> int:
    """The token of a greedy row."""
    zero = torch.zeros(1, dtype=torch.int64)
    return int(draw(logits[None], torch.zeros(1), torch.ones(1), zero, zero, zero + 50, rows=row))


def assert_as_processors(logits: Tensor, row: Row, expected: Tensor) -> None:
    """The most likely token and all shares are those of adjusted logits [vocab]."""
    assert likeliest(logits, row) == int(expected.argmax())
    assert (shares(logits, row) - expected.softmax(-1)).abs().max() < 0.03


def history(*tokens: int) -> Tensor:
    return torch.tensor([tokens])


def test_repetition_penalty_is_that_of_transformers() -> None:
    """Over the prompt and what was drawn, whatever the sign of the logit."""
    logits = torch.randn(VOCAB)
    for penalty in (0.5, 1.3, 5.0):
        row = Row(prompt=[1, 2, 2, 7], output=[2, 9, 30, 9], repetition_penalty=penalty)
        processor = RepetitionPenaltyLogitsProcessor(penalty)
        expected = processor(history(1, 2, 2, 7, 2, 9, 30, 9), logits[None].clone())[0]
        assert_as_processors(logits, row, expected)


def test_frequency_and_presence_penalties_are_those_of_openai() -> None:
    """Over what was drawn alone. transformers has neither, so this is the formula of OpenAI's reference."""
    logits = torch.randn(VOCAB)
    row = Row(prompt=[1, 2], output=[2, 9, 30, 9, 9], frequency_penalty=0.7, presence_penalty=-1.1)
    counts = torch.bincount(torch.tensor(row.output), minlength=VOCAB)
    assert_as_processors(logits, row, logits - 0.7 * counts + 1.1 * (counts > 0))


def test_logit_bias_is_the_sequence_bias_of_transformers() -> None:
    logits = torch.randn(VOCAB)
    bias = {3: 2.5, 0: -100.0, VOCAB - 1: 1.0, 17: -0.3, 18: 0.0}
    processor = SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])
    expected = processor(history(1), logits[None].clone())[0]
    assert_as_processors(logits, Row(logit_bias=bias), expected)


@pytest.mark.parametrize(("drawn", "early"), [(0, True), (2, True), (3, False)])
def test_min_tokens_bars_the_tokens_that_end_an_answer(drawn: int, early: bool) -> None:
    logits = torch.randn(VOCAB)
    logits[5] = 9.0
    row = Row(prompt=[1], output=[4, 6, 8][:drawn], ends=[5, 30], min_tokens=3, logit_bias={5: 1.0})
    processor = MinNewTokensLengthLogitsProcessor(1, 3, [5, 30], device="cpu")
    expected = processor(history(1, *row.output), logits[None].clone())[0]
    expected[5] += 1.0
    assert (shares(logits, row)[[5, 30]].sum() == 0) == early
    assert_as_processors(logits, row, expected)


def test_min_p_is_that_of_transformers() -> None:
    """After the temperature, before top-k and top-p."""
    logits = torch.randn(VOCAB) * 2
    for temperature, min_p in ((1.0, 0.1), (0.5, 0.02), (3.0, 0.5), (1.0, 1.0)):
        scores = TemperatureLogitsWarper(temperature)(history(1), logits[None])
        expected = MinPLogitsWarper(min_p)(history(1), scores)[0].softmax(-1)
        found = shares(logits, Row(), temperature, min_p)
        assert torch.equal(found > 0, expected > 0) and (found - expected).abs().max() < 0.03
    assert min_p_steps(0.0) > min_p_steps(1e-9) > min_p_steps(0.5) == 2**20
    assert min_p_steps(1.0) == 0 and min_p_steps(1e-300) == min_p_steps(0.0)


def test_everything_together_is_in_the_order_of_vllm() -> None:
    """Of transformers' processors: what may be drawn, biases, penalties, temperature, min-p, top-k, top-p."""
    rng = random.Random(3)
    for _ in range(8):
        logits = torch.randn(VOCAB) * 3
        prompt, output = rng.choices(range(VOCAB), k=9), rng.choices(range(VOCAB), k=9)
        bias = {token: rng.uniform(-3, 3) for token in rng.sample(range(VOCAB), 6)}
        allowed = sorted(rng.sample(range(VOCAB), 30))
        row = Row(prompt, output, 1.2, 0.3, 0.4, bias, [0, 1], 20, allowed)
        counts = torch.bincount(torch.tensor(output), minlength=VOCAB)
        scores = torch.full((1, VOCAB), -torch.inf)
        scores[0, allowed] = logits[allowed]
        scores[0, :2] = -torch.inf
        before = LogitsProcessorList(
            [
                SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()]),
                RepetitionPenaltyLogitsProcessor(1.2),
            ]
        )
        scores = before(history(*prompt, *output), scores) - 0.3 * counts - 0.4 * (counts > 0)
        after = LogitsProcessorList(
            [TemperatureLogitsWarper(0.8), MinPLogitsWarper(0.05), TopKLogitsWarper(7), TopPLogitsWarper(0.9)]
        )
        expected = after(history(1), scores)[0].softmax(-1)
        ones = torch.ones(DRAWS)
        drawn = draw(
            logits.repeat(DRAWS, 1), ones * 0.8, ones * 0.9, torch.full((DRAWS,), 7), torch.arange(DRAWS),
            torch.full((DRAWS,), 50), ones * 0.05, row,
        )  # fmt: skip
        found = torch.bincount(drawn, minlength=VOCAB) / DRAWS
        assert torch.equal(found > 0, expected > 0)
        assert (found - expected).abs().max() < 0.03


def test_a_mask_forbids_and_one_that_is_late_draws_nothing() -> None:
    """Beside rows that are not adjusted, and that draw as if nothing were there."""
    logits = torch.randn(3, 70)
    zeros = torch.zeros(3, dtype=torch.int64)
    state = SamplingState(torch.zeros(3), torch.ones(3), zeros, zeros, zeros)
    adjustments = plain(3, 70)
    best = logits.argmax(-1)
    allowed = [token for token in range(70) if token % 3 and token != int(best[1])]
    write(adjustments, 1, Row(allowed=allowed), length=12)
    slots, lengths = torch.arange(3), torch.tensor([5, 12, 7])
    drawn = sample(logits, slots, lengths, state, adjustments)
    assert (drawn[0], drawn[2]) == (best[0], best[2])
    assert int(drawn[1]) == max(allowed, key=lambda token: float(logits[1, token]))
    adjustments.mask_length[1] = 11
    late = sample(logits, slots, lengths, state, adjustments)
    assert late.tolist() == [int(best[0]), LATE, int(best[2])]
    taken = torch.tensor([100, 200, 300])
    take(late, slots, lengths, taken, adjustments)
    assert lengths.tolist() == [5, 11, 7], "that step is repeated"
    assert taken.tolist() == [int(best[0]), 200, int(best[2])]


def test_taken_tokens_are_counted_up_to_a_bound_and_in_active_slots_alone() -> None:
    adjustments = plain(4, 20)
    before = adjustments.marks.clone()
    write(adjustments, 1, Row(prompt=[3]), length=5)
    write(adjustments, 2, Row(), length=5)
    lengths, tokens = torch.tensor([5, 5, 0, 5]), torch.zeros(4, dtype=torch.int64)
    for _ in range(3):
        take(torch.tensor([4, 3, 9]), torch.tensor([0, 1, 2]), lengths, tokens, adjustments)
    assert tokens.tolist() == [4, 3, 0, 0]
    assert adjustments.marks[1, 3] == PROMPT + 3
    assert not adjustments.marks[2].any(), "a slot that is not in use takes nothing"
    assert torch.equal(adjustments.marks[[0, 3]], before[[0, 3]])
    adjustments.marks[1, 3] = PROMPT + MOST_COUNTED - 1
    for _ in range(3):
        take(torch.tensor([3]), torch.tensor([1]), lengths, tokens, adjustments)
    assert adjustments.marks[1, 3] == PROMPT + MOST_COUNTED
