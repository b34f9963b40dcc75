"""What changes logits and what scores prompts, on a tiny model beside transformers' own generate."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clo.gpu_worker.engine import Engine
from clo.gpu_worker.in_process import blocks_of, make_engine, prefill, wait_for
from clo.gpu_worker.model.decoder import Decoder, load_decoder
from clo.gpu_worker.prompt_scores import PromptScores
from clo.kernels.sample import LATE
from clo.runtime.config import CacheConfig, ModelConfig
from clo.runtime.model.files import resolve
from clo.runtime.wire.messages import Logprob, Sampling
from tests.reference import load_transformers

TOTAL = 700


@pytest.fixture(scope="module")
def decoder(tiny_model: Path) -> Decoder:
    return load_decoder(resolve(ModelConfig(model=str(tiny_model), device="cpu")))


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return load_transformers(str(tiny_model))


@pytest.fixture
def engine(decoder: Decoder) -> Engine:
    return make_engine(decoder, CacheConfig(resident=TOTAL), 3, TOTAL)


def random_tokens(decoder: Decoder, count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = torch.randint(0, decoder.vocab, (count,), generator=generator).tolist()
    return tokens


def begin(engine: Engine, slot: int, prompt: list[int], sampling: Sampling, ends: list[int]) -> int:
    """Prefill a slot and draw its first token."""
    logits = prefill(engine, slot, prompt, TOTAL)
    engine.activate(slot, len(prompt), sampling, seed=7)
    if sampling.adjusts:
        engine.adjust(slot, sampling, prompt, ends)
    return wait_for(engine, engine.start([slot], logits))[0]


def answers(
    engine: Engine, prompts: list[list[int]], samplings: list[Sampling], count: int, ends: list[int]
) -> list[list[int]]:
    """Tokens of all prompts in one batch."""
    found = [
        [begin(engine, slot, prompt, sampling, ends)]
        for slot, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True))
    ]
    longest = max(map(len, prompts))
    for step in range(1, count):
        for tokens, token in zip(
            found, wait_for(engine, engine.step(list(range(len(prompts))), longest + step)), strict=True
        ):
            tokens.append(token)
    return found


def of_transformers(model: Any, prompt: list[int], count: int, **options: Any) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0,
        **options,
    )  # fmt: skip
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def test_greedy_tokens_with_penalties_and_biases_are_those_of_transformers(
    decoder: Decoder, model: Any, engine: Engine
) -> None:
    """Beside each other and beside a sequence without any; a slot keeps nothing of its predecessor."""
    prompts = [random_tokens(decoder, count, count) for count in (5, 300, 64)]
    bias = {token: (-1) ** token * 3.0 for token in range(0, decoder.vocab, 9)}
    ours = [
        Sampling(temperature=0.0, repetition_penalty=1.4),
        Sampling(temperature=0.0),
        Sampling(temperature=0.0, repetition_penalty=0.9, logit_bias=bias),
    ]
    sequence_bias = [[[token], value] for token, value in bias.items()]
    theirs: list[dict[str, Any]] = [
        {"repetition_penalty": 1.4},
        {},
        {"repetition_penalty": 0.9, "sequence_bias": sequence_bias},
    ]
    for turn in range(3):
        order = [(slot + turn) % 3 for slot in range(3)]
        expected = [
            of_transformers(model, prompts[slot], 30, eos_token_id=None, **theirs[choice])
            for slot, choice in enumerate(order)
        ]
        assert answers(engine, prompts, [ours[choice] for choice in order], 30, []) == expected
        for slot in range(3):
            engine.retire(slot)


def test_greedy_tokens_with_frequency_and_presence_penalties_are_those_of_the_formula(
    decoder: Decoder, model: Any, engine: Engine
) -> None:
    prompt, counts = random_tokens(decoder, 40), torch.zeros(decoder.vocab)
    tokens: list[int] = []
    for _ in range(30):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + tokens])).logits[0, -1]
        tokens.append(int((logits - 0.8 * counts - 0.5 * (counts > 0)).argmax()))
        counts[tokens[-1]] += 1
    sampling = Sampling(temperature=0.0, frequency_penalty=0.8, presence_penalty=0.5)
    assert answers(engine, [prompt], [sampling], 30, []) == [tokens]
    assert len(set(tokens)) > 20, "it would repeat itself without them"


def test_no_end_token_comes_before_the_least_number_of_tokens(
    decoder: Decoder, model: Any, engine: Engine
) -> None:
    prompt = random_tokens(decoder, 40)
    ends = of_transformers(model, prompt, 4, eos_token_id=None)
    expected = of_transformers(model, prompt, 12, eos_token_id=ends, min_new_tokens=9)
    found = answers(engine, [prompt], [Sampling(temperature=0.0, min_tokens=9)], 12, ends)[0]
    assert found[: len(expected)] == expected and not set(ends) & set(expected[:9])


def test_a_seed_gives_the_same_tokens_beside_any_others(decoder: Decoder, engine: Engine) -> None:
    prompts = [random_tokens(decoder, count, count) for count in (5, 30, 64)]
    wanted = Sampling(min_p=0.02, repetition_penalty=1.2, presence_penalty=0.3, top_k=40)
    alone = answers(engine, prompts[:1], [wanted], 25, [])
    engine.retire(0)
    others = [Sampling(logit_bias={3: 5.0}), Sampling(temperature=0.0)]
    assert answers(engine, prompts, [wanted, *others], 25, [])[0] == alone[0]


@pytest.mark.parametrize(
    "config", [CacheConfig(resident=TOTAL, recent=16), CacheConfig(resident=8, select_k=8, recent=16)]
)
def test_a_sequence_repeats_the_step_for_which_its_mask_was_late(
    decoder: Decoder, config: CacheConfig
) -> None:
    """It has the tokens that it has without delay while all rows fit into its set; later the repeated step
    may choose other rows. The sequence beside it notices nothing."""
    engine = make_engine(decoder, config, 3, TOTAL)
    prompts = [random_tokens(decoder, count, count) for count in (5, 30)]
    words = -(-decoder.vocab // 32)
    allowed = torch.rand(60, words * 32, generator=torch.Generator().manual_seed(1)) < 0.5
    bits = np.packbits(allowed.numpy(), axis=1, bitorder="little").view(np.int32)
    constrained, free = Sampling(temperature=0.0, grammar="any"), Sampling(temperature=0.0)

    def run(late: set[int]) -> tuple[list[int], list[int]]:
        logits = [prefill(engine, slot, prompt, TOTAL) for slot, prompt in enumerate(prompts)]
        for slot, sampling in enumerate((constrained, free)):
            engine.activate(slot, len(prompts[slot]), sampling, seed=0)
        engine.adjust(0, constrained, prompts[0], [])
        engine.constrain(0, bits[0], len(prompts[0]))
        first, other = wait_for(engine, engine.start([0, 1], torch.cat(logits)))
        mine, its, step = [first], [other], 0
        while len(mine) < 40:
            if step not in late:
                engine.constrain(0, bits[len(mine)], len(prompts[0]) + len(mine))
            token, other = wait_for(engine, engine.step([0, 1], TOTAL))
            its.append(other)
            assert (token == LATE) == (step in late)
            mine += [token] if token != LATE else []
            step += 1
        for slot in range(2):
            engine.retire(slot)
        return mine, its[:40]

    expected = run(set())
    found = run({0, 3, 4, 5, 20, 31})
    assert found[1] == expected[1]
    if config.resident == TOTAL:
        assert found[0] == expected[0]
    for tokens in (expected[0], found[0]):
        assert all(allowed[place, token] for place, token in enumerate(tokens))


# --------------------------------------------------------------------------------------- scores


def scored(engine: Engine, prompt: list[int], top: int, unit: int | None = None) -> list[Logprob]:
    work = engine.prefill(0, prompt, blocks_of(engine, 0, TOTAL), score=top)
    while (
        work.advance(None if unit is None else work.unit(unit * engine.decoder.layer_flops(1, 0))[0]) is None
    ):
        pass
    engine.retire(0)
    assert work.scores is not None
    return work.scores.read()


@pytest.mark.parametrize("length", [1, 2, 70, 690])
def test_a_prompt_is_scored_as_by_transformers(
    decoder: Decoder, model: Any, engine: Engine, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the units in which it is computed, and however many logits are in memory at a time."""
    prompt = random_tokens(decoder, length)
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    for unit, rows in ((None, 10**6), (64, 7)):
        monkeypatch.setattr(PromptScores, "rows", staticmethod(lambda _, rows=rows: rows))
        found = scored(engine, prompt, 3, unit)
        assert [entry.token for entry in found] == prompt[1:]
        for position, entry in enumerate(found):
            assert abs(entry.logprob - float(expected[position, entry.token])) < 1e-3
            values, tokens = expected[position].topk(3)
            assert [token for token, _ in entry.top] == tokens.tolist()
            torch.testing.assert_close(torch.tensor([p for _, p in entry.top]), values, atol=1e-3, rtol=0)


def test_scores_of_more_tokens_than_the_vocabulary_has_are_those_of_all(engine: Engine) -> None:
    assert len(scored(engine, [1, 2], 10**6)[0].top) == engine.decoder.vocab


def test_a_scored_prompt_goes_on_as_any_other(decoder: Decoder, engine: Engine) -> None:
    """Its rows, codes and resident sets are there, and its first logits."""
    prompt = random_tokens(decoder, 300)
    expected = answers(engine, [prompt], [Sampling(temperature=0.0)], 10, [])
    engine.retire(0)
    work = engine.prefill(0, prompt, blocks_of(engine, 0, TOTAL), score=0)
    while (logits := work.advance()) is None:
        pass
    engine.activate(0, len(prompt), Sampling(temperature=0.0), 0)
    tokens = wait_for(engine, engine.start([0], logits))
    tokens += [wait_for(engine, engine.step([0], 300 + step))[0] for step in range(1, 10)]
    assert [tokens] == expected
