"""How much CPU memory each KV store takes."""

import math
import sys
from collections.abc import Sequence

from clo.runtime.config import AUTO_SEQS, Architecture, ResolvedModel, ServerConfig
from clo.runtime.machine.host_memory import available_memory, check_memory, node_shares
from clo.runtime.model.kv_shape import ITEM_BYTES, kv_shape
from clo.runtime.units import format_size

SHARE = 0.8  # of the memory that is free; the rest is for whatever else the machine does


def kv_size(config: ServerConfig, model: ResolvedModel, stores: Sequence[Sequence[int]]) -> int:
    """Bytes of each KV store: what ``--kv-size`` says, or a share of what is free, though
    no more than all requests together can use. What is chosen here is said on stderr.

    Args:
        stores: of each one the NUMA nodes of its KV heads (``clo.runtime.model.placement.head_nodes``).

    Raises:
        ConfigError: ``--kv-size`` does not fit.
    """
    if config.kv_size is not None:
        shares = node_shares(stores)
        check_memory({node: math.ceil(share * config.kv_size) for node, share in shares.items()})
        return config.kv_size
    shape = kv_shape(model.architecture, model.dtype, codes=config.cache.prefix_attention == "sparse")
    free, place = available_memory(stores)
    weights = 0
    if model.device == "cpu":  # the workers hold them in the same memory
        weights = config.workers * weight_bytes(model.architecture, model.dtype) // len(stores)
    share = int(SHARE * max(0, free - weights))
    requests = -(-config.workers // len(stores)) * (config.engine.max_num_seqs or AUTO_SEQS[model.device])
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


def weight_bytes(config: Architecture, dtype: str) -> int:
    """About what a model's weights take."""
    shape = kv_shape(config, dtype)
    heads = 2 * (shape.query_heads + shape.kv_heads) * shape.head_dim
    layer = config.hidden_size * (heads + 3 * config.intermediate_size)
    embeddings = 1 if config.tie_word_embeddings else 2
    return ITEM_BYTES[dtype] * int(shape.layers * layer + embeddings * config.vocab_size * config.hidden_size)
