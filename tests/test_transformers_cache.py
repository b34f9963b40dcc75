"""The cache in transformers' own ``generate``: the tokens of full attention, and those of CLO's engine."""

from inspect import signature
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from clo.gpu_worker.in_process import make_engine, prefill, wait_for
from clo.gpu_worker.model.decoder import load_decoder
from clo.runtime.config import CacheConfig, ModelConfig
from clo.runtime.model.files import resolve
from clo.transformers import OffloadedSparseCache
from tests.conftest import VOCABULARY

COUNT = 40
# transformers before 5.24 has another name for it.
CACHE = "cache" if "cache" in signature(LlamaForCausalLM.forward).parameters else "past_key_values"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def model(tiny_model: Path, request: pytest.FixtureRequest) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).to(request.param)


def prompts_of(*lengths: int) -> list[list[int]]:
    return [torch.randint(3, VOCABULARY, (length,)).tolist() for length in lengths]


def generate(
    model: PreTrainedModel, tokens: list[list[int]], cache: OffloadedSparseCache | None
) -> list[list[int]]:
    """Greedy continuations of prompts that are padded on the left."""
    longest = max(map(len, tokens))
    device = model.device
    padded = torch.tensor([[0] * (longest - len(line)) + line for line in tokens])
    mask = torch.tensor([[0] * (longest - len(line)) + [1] * len(line) for line in tokens])
    output = model.generate(
        padded.to(device), attention_mask=mask.to(device), max_new_tokens=COUNT, do_sample=False,
        eos_token_id=None, pad_token_id=0, **{CACHE: cache},
    )  # fmt: skip
    continuations: list[list[int]] = output[:, longest:].tolist()
    return continuations


def test_where_all_rows_are_resident_it_is_full_attention(model: PreTrainedModel) -> None:
    """Prompts of one length and of several; one longer than a block; again after a reset."""
    for lengths in ((70,), (12, 12), (600, 30, 5)):
        tokens = prompts_of(*lengths)
        model.set_attn_implementation("sdpa")
        expected = generate(model, tokens, None)
        cache = OffloadedSparseCache(model, 700, len(lengths), select_k=64, resident=700)
        for _ in range(2):
            assert generate(model, tokens, cache) == expected
            cache.reset()


def test_what_it_drops_is_what_the_engine_drops(model: PreTrainedModel, tiny_model: Path) -> None:
    (prompt,) = prompts_of(500)
    config = CacheConfig(prefetch="off", select_k=16, resident=64)
    cache = OffloadedSparseCache(model, 600, select_k=16, resident=64)
    (found,) = generate(model, [prompt], cache)
    decoder = load_decoder(resolve(ModelConfig(model=str(tiny_model), device="cpu", dtype="float32")))
    engine = make_engine(decoder, config, 1, 600)
    expected = wait_for(engine, engine.start([0], prefill(engine, 0, prompt, 600)))
    for step in range(1, COUNT):
        expected += wait_for(engine, engine.step([0], 500 + step))
    assert found == expected
    (stats,) = cache.stats
    assert stats.steps == COUNT - 1 and 0 < stats.fetched_rows < stats.selected_rows
    assert stats.resident_bytes < stats.kv_bytes


def test_a_conversation_goes_on_with_the_same_cache(model: PreTrainedModel) -> None:
    """The second turn brings several tokens at once."""
    first, second = prompts_of(90, 20)
    cache = OffloadedSparseCache(model, 300, select_k=64, resident=300)
    (answer,) = generate(model, [first], cache)
    whole = [*first, *answer, *second]
    (found,) = generate(model, [whole], cache)
    model.set_attn_implementation("sdpa")
    assert [found] == generate(model, [whole], None)


def test_what_it_cannot_do_is_said(model: PreTrainedModel) -> None:
    (prompt,) = prompts_of(50)
    tokens = torch.tensor([prompt], device=model.device)
    with pytest.raises(ValueError, match="51 tokens are more than the cache's 50"):
        generate(model, [prompt], OffloadedSparseCache(model, 50))
    cache = OffloadedSparseCache(model, 200)
    with pytest.raises(ValueError, match="made for a batch of 1, and this is one of 2"):
        generate(model, [prompt, prompt], cache)
    with pytest.raises(ValueError, match="generate without beams"):
        model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),  # or the random tokens may hold the one of padding
            num_beams=2,
            max_new_tokens=5,
            **{CACHE: OffloadedSparseCache(model, 200, 2)},
        )
    with pytest.raises(ValueError, match="padded on the left"):
        model(
            tokens, attention_mask=torch.tensor([[1] * 40 + [0] * 10], device=model.device),
            **{CACHE: OffloadedSparseCache(model, 200)},
        )  # fmt: skip
    with pytest.raises(ValueError, match="pass one to it, or call"):
        model(tokens)
