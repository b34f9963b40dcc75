"""What tests measure against: an engine without processes, and transformers' own generate."""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from clo.gpu_worker.cache.query_prediction import QuerySource
from clo.gpu_worker.engine import Engine, StepHandle
from clo.gpu_worker.model.decoder import Decoder
from clo.gpu_worker.pinning import device_view
from clo.runtime.config import CacheConfig
from clo.runtime.wire.messages import CacheStats, Sampling

GREEDY = Sampling(temperature=0.0)


def make_engine(
    decoder: Decoder,
    config: CacheConfig,
    slots: int,
    max_tokens: int,
    sources: tuple[QuerySource, ...] | None = None,
) -> Engine:
    """An engine over an arena in this process, with its blocks poisoned."""
    shape = decoder.shape
    pages = -(-max_tokens // shape.block_tokens)
    arena = torch.full(
        (slots * pages + 1, shape.layers, shape.kv_heads, shape.block_tokens, 2, shape.head_dim),
        1e4,  # finite, as stale rows are
        dtype=shape.dtype,
        pin_memory=decoder.device.type == "cuda",
    )
    if decoder.device.type == "cuda":
        arena = device_view(arena)
    return Engine(decoder, arena, config, slots, max_tokens, sources)


def prefill(engine: Engine, slot: int, tokens: list[int], total: int) -> Tensor:
    """Prefill a slot at once and make it decode; returns the logits [1, vocab]."""
    pages = -(-total // engine.decoder.shape.block_tokens)
    work = engine.prefill(slot, tokens, [1 + slot * pages + page for page in range(pages)])
    while (logits := work.advance()) is None:
        pass
    engine.activate(slot, len(tokens), GREEDY, 0)
    return logits


def arrived(engine: Engine, posted: StepHandle) -> list[int]:
    """Wait for the tokens of a step."""
    while (tokens := engine.read(posted)) is None:
        pass
    return tokens


def stats_of(engine: Engine, tokens: int, steps: int) -> CacheStats:
    """What the cache did so far for the sequence in slot 0, ``tokens`` long."""
    return engine.cache.stats(engine.cache.counters(0).tolist(), tokens, steps)


def force(engine: Engine, prompt: list[int], continuation: list[int]) -> Tensor:
    """Teacher-force a continuation through the decode path of slot 0.

    Returns:
        [len(continuation), vocab] float32: the logits that predict each of its tokens.
    """
    total = len(prompt) + len(continuation)
    rows = [prefill(engine, 0, prompt, total)]
    for step, token in enumerate(continuation[:-1], 1):
        engine.feed(0, token)
        rows.append(engine.forward(1, len(prompt) + step))
    return torch.cat(rows)


def divergence(logits: Tensor, reference: Tensor) -> float:
    """Mean KL(reference || logits) in nats over positions; both [N, vocab]."""
    p, q = reference.log_softmax(-1), logits.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def transformers_greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """``count`` greedy tokens of transformers' own generate, without stopping at EOS."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count,
        do_sample=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def load_transformers(folder: str) -> Any:
    """The model in float32, in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
