"""How much CPU memory each KV store takes."""

import sys
from collections.abc import Sequence
from typing import Any

from clo.runtime.config import AUTO_SEQS, ResolvedModel, ServerConfig
from clo.runtime.machine.host_memory import available_memory, check_memory
from clo.runtime.model.kv_shape import ITEM_BYTES
from clo.runtime.model.model_config import kv_shape, read_config
from clo.runtime.units import format_size

SHARE = 0.8  # of the memory that is free; the rest is for whatever else the machine does


def kv_size(config: ServerConfig, model: ResolvedModel, nodes: Sequence[int]) -> int:
    """Bytes of the KV store on each of ``nodes``: what ``--kv-size`` says, or a share of what is free, though
    no more than all requests together can use. What is chosen here is said on stderr.

    Raises:
        ConfigError: ``--kv-size`` does not fit.
    """
    if config.kv_size is not None:
        check_memory(dict.fromkeys(nodes, config.kv_size))
        return config.kv_size
    model_config = read_config(model.folder)
    shape = kv_shape(model_config, model.dtype, codes=config.cache.prefix_attention == "sparse")
    free, place = available_memory(nodes)
    weights = 0
    if model.device == "cpu":  # the workers hold them in the same memory
        weights = config.workers * weight_bytes(model_config, model.dtype) // len(nodes)
    share = int(SHARE * max(0, free - weights))
    requests = -(-config.workers // len(nodes)) * (config.engine.max_num_seqs or AUTO_SEQS[model.device])
    blocks = -(-model.max_model_len // shape.block_tokens)
    useful = requests * blocks * shape.block_bytes
    if useful <= share:
        size, reason = useful, f"{requests} requests of {model.max_model_len} tokens, the most at a time"
    else:
        size = max(share, shape.block_bytes)
        beside = f" beside {format_size(weights)} of weights" if weights else ""
        reason = f"{SHARE:.0%} of {format_size(free - weights)} free {place}{beside}"
    tokens = size // shape.block_bytes * shape.block_tokens
    print(
        f"--kv-size auto: {format_size(size)} for each KV store ({reason}) hold {tokens} tokens.",
        file=sys.stderr,
        flush=True,
    )
    return size


def weight_bytes(config: Any, dtype: str) -> int:
    """About what a model's weights take, by its configuration."""
    shape = kv_shape(config, dtype)
    heads = 2 * (shape.query_heads + shape.kv_heads) * shape.head_dim
    layer = config.hidden_size * (heads + 3 * config.intermediate_size)
    embeddings = 1 if config.tie_word_embeddings else 2
    return ITEM_BYTES[dtype] * int(shape.layers * layer + embeddings * config.vocab_size * config.hidden_size)
