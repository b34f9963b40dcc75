"""An engine over an arena of its own, in this process: for tests, benchmarks and studies of the cache."""

from dataclasses import replace

import torch
from torch import Tensor

from clo.gpu_worker.cache.layer import LayerCache
from clo.gpu_worker.cache.query_prediction import QuerySource
from clo.gpu_worker.engine import Engine
from clo.gpu_worker.model.decoder import Decoder
from clo.gpu_worker.outputs import StepHandle
from clo.gpu_worker.pinning import device_view
from clo.runtime.config import CacheConfig
from clo.runtime.wire.messages import CacheStats, Sampling

GREEDY = Sampling(temperature=0.0)


def make_arena(decoder: Decoder, slots: int, max_tokens: int) -> Tensor:
    """An arena for ``slots`` sequences of ``max_tokens``; rows not yet written are large.

    Returns:
        [blocks, layers, kv_heads, block_tokens, 2, head_dim], readable by the decoder's device.
    """
    shape = decoder.shape
    blocks = -(-max_tokens // shape.block_tokens)
    arena = torch.full(
        (slots * blocks + 1, shape.layers, shape.kv_heads, shape.block_tokens, 2, shape.head_dim),
        1e4,  # finite, as stale rows are
        dtype=shape.dtype,
        pin_memory=decoder.device.type == "cuda",
    )
    return device_view(arena) if decoder.device.type == "cuda" else arena


def make_codes(decoder: Decoder, config: CacheConfig, arena: Tensor) -> Tensor | None:
    """Codes of the blocks of such an arena, where a configuration wants them; those not yet written are no
    numbers.

    Returns:
        [blocks, layers, kv_heads, code_bytes] uint8, readable by the decoder's device.
    """
    if config.prefix_attention != "sparse":
        return None
    size = *arena.shape[:3], replace(decoder.shape, codes=True).code_bytes
    cuda = decoder.device.type == "cuda"
    codes = torch.full(size, 255, dtype=torch.uint8, pin_memory=cuda)
    return device_view(codes) if cuda else codes


def make_engine(
    decoder: Decoder,
    config: CacheConfig,
    slots: int,
    max_tokens: int,
    sources: tuple[QuerySource, ...] | None = None,
    layer_type: type[LayerCache] = LayerCache,
) -> Engine:
    """An engine with an arena for all its slots, see ``make_arena``."""
    arena = make_arena(decoder, slots, max_tokens)
    codes = make_codes(decoder, config, arena)
    return Engine(decoder, arena, config, slots, max_tokens, sources, layer_type, codes)


def blocks_of(engine: Engine, slot: int, tokens: int) -> list[int]:
    """The blocks of a slot for a sequence that may come to ``tokens`` tokens; block 0 belongs to no slot."""
    count = -(-tokens // engine.decoder.shape.block_tokens)
    return [1 + slot * count + block for block in range(count)]


def prefill(engine: Engine, slot: int, tokens: list[int], total: int) -> Tensor:
    """Prefill a slot at once and make it decode greedily; returns the logits [1, vocab].

    Args:
        total: tokens that any of the engine's sequences may come to.
    """
    work = engine.prefill(slot, tokens, blocks_of(engine, slot, total))
    while (logits := work.advance()) is None:
        pass
    engine.activate(slot, len(tokens), GREEDY, 0)
    return logits


def wait_for(engine: Engine, handle: StepHandle) -> list[int]:
    """The tokens of a step, once they have arrived."""
    while (tokens := engine.read(handle)) is None:
        pass
    return tokens


def stats_of(engine: Engine, tokens: int, steps: int) -> CacheStats:
    """What the cache did so far for the sequence in slot 0, ``tokens`` long."""
    return engine.cache.stats(engine.cache.counters(0).tolist(), tokens, steps)


def teacher_force(engine: Engine, prompt: list[int], continuation: list[int]) -> Tensor:
    """Feed a continuation through the decode path of slot 0.

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
