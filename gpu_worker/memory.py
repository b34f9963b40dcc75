"""GPU memory planned before any of it is taken."""

import logging

import torch

from clo.gpu_worker.cache.index import TwoBitIndex
from clo.gpu_worker.cache.kv_cache import index_pages
from clo.gpu_worker.drift_check import drift_check_bytes
from clo.gpu_worker.prefill import prefill_bytes
from clo.gpu_worker.prompt_graphs import prompt_graph_bytes
from clo.gpu_worker.prompt_queue import beside_tokens
from clo.runtime.config import CacheConfig, EngineConfig
from clo.runtime.model.kv_shape import KVShape
from clo.runtime.units import format_size
from clo.runtime.wire.errors import ConfigError

logger = logging.getLogger(__name__)

_GRAPH_BYTES = 2**30


def check_gpu_memory(
    shape: KVShape, config: CacheConfig, engine: EngineConfig, blocks: int, max_tokens: int
) -> None:
    """Check, with the weights loaded, that all else fits into the GPU memory that may be used, and log it.

    Args:
        blocks: number of blocks in the arena.
        max_tokens: longest sequence.

    Raises:
        ConfigError: it does not fit.
    """
    free, total = torch.cuda.mem_get_info()
    slots, utilization = engine.max_num_seqs, engine.gpu_memory_utilization
    tokens = index_pages(shape, blocks, slots, max_tokens) * shape.block_tokens
    index = TwoBitIndex.bytes_per_token(shape) * tokens if config.attention == "clo" else 0
    capacity = sum(sizes.resident for sizes in config.sizes(max_tokens, shape.layers))
    rows = 0 if config.attention == "full" else shape.layers * (config.sinks + config.recent) + capacity
    resident = shape.kv_heads * rows * shape.row_bytes
    beside = beside_tokens(max_tokens)
    prefill = prefill_bytes(shape, max_tokens + beside, sparse=config.prefill_attention == "sparse")
    graphs = _GRAPH_BYTES + prompt_graph_bytes(shape)
    drift_check = drift_check_bytes(shape, max_tokens) if config.drift_check is not None else 0
    wanted = index + slots * resident + prefill + drift_check + graphs
    spare = int(utilization * total) - (total - free)
    parts = (
        f"{format_size(total - free)} in use with the weights, {format_size(index)} index of {tokens} "
        f"tokens, {slots} x {format_size(resident)} resident rows, {format_size(prefill)} prefill of "
        f"{max_tokens} tokens and {beside} beside them, {format_size(drift_check)} drift check, "
        f"{format_size(graphs)} graphs"
    )
    if wanted > spare:
        raise ConfigError(
            f"The GPU has {format_size(utilization * total)} for CLO and that is too little ({parts}): lower "
            "--max-num-seqs, --resident, --kv-size or --max-model-len, or raise --gpu-memory-utilization."
        )
    fitting = slots + (spare - wanted) // max(1, resident)
    logger.info(
        "GPU memory: %s; %s stay free. %d sequences at a time would fit; the store holds %d of %d tokens.",
        parts, format_size(spare - wanted), fitting, blocks * shape.block_tokens // max_tokens,
        max_tokens,
    )  # fmt: skip
