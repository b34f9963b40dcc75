"""A worker's memory, planned before any of it is taken, and how many sequences it holds at a time."""

import logging
import sys
from collections.abc import Callable
from typing import NamedTuple

from clo.gpu_worker.cache.index import TwoBitIndex
from clo.gpu_worker.cache.kv_cache import index_pages
from clo.gpu_worker.drift_check import drift_check_bytes
from clo.gpu_worker.prefill import prefill_bytes
from clo.gpu_worker.prompt_graphs import prompt_graph_bytes
from clo.gpu_worker.prompt_queue import beside_tokens
from clo.gpu_worker.sampler import sampler_bytes
from clo.kernels.limits import RUN
from clo.runtime.config import AUTO_SEQS, CacheConfig, EngineConfig
from clo.runtime.model.kv_shape import KVShape
from clo.runtime.units import format_size
from clo.runtime.wire.errors import ConfigError

logger = logging.getLogger(__name__)

_GRAPH_BYTES = 2**30


class MemoryPlan(NamedTuple):
    """What fits into a worker's memory."""

    slots: int  # sequences at a time
    spare: int  # bytes that nothing needs


def plan_gpu_memory(
    shape: KVShape,
    config: CacheConfig,
    engine: EngineConfig,
    blocks: int,
    max_tokens: int,
    vocab: int,
    memory: tuple[int, int],
) -> MemoryPlan:
    """Plan, with the weights loaded, what else fits into the GPU memory that may be used, and log it.

    Args:
        blocks: number of blocks in the arena.
        max_tokens: longest sequence.
        vocab: tokens of the model.
        memory: bytes of the GPU's memory that are free, and all of them.

    Raises:
        ConfigError: it does not fit.
    """
    free, total = memory
    utilization = engine.gpu_memory_utilization
    slot = _slot_bytes(shape, config, max_tokens) + sampler_bytes(vocab)
    beside = beside_tokens(max_tokens)
    codes = config.prefix_attention == "sparse"
    prefill = prefill_bytes(
        shape, max_tokens + beside, sparse=config.prefill_attention == "sparse", codes=codes
    )
    graphs = _GRAPH_BYTES + prompt_graph_bytes(shape)
    drift_check = drift_check_bytes(shape, max_tokens) if config.drift_check is not None else 0

    def wanted(slots: int) -> int:
        index = _index_bytes(shape, config, blocks, slots, max_tokens)
        return index + slots * slot + prefill + drift_check + graphs

    spare = int(utilization * total) - (total - free)
    slots = engine.max_num_seqs or _most_slots(wanted, spare, min(blocks, AUTO_SEQS["cuda"]))
    tokens = index_pages(shape, blocks, slots, max_tokens) * shape.block_tokens
    parts = (
        f"{format_size(total - free)} in use with the weights, "
        f"{format_size(_index_bytes(shape, config, blocks, slots, max_tokens))} index of {tokens} "
        f"tokens, {slots} x {format_size(slot)} resident rows, {format_size(prefill)} prefill of "
        f"{max_tokens} tokens and {beside} beside them, {format_size(drift_check)} drift check, "
        f"{format_size(graphs)} graphs"
    )
    if wanted(slots) > spare:
        raise ConfigError(
            f"The GPU has {format_size(utilization * total)} for CLO and that is too little ({parts}): lower "
            "--max-num-seqs, --resident, --kv-size or --max-model-len, or raise --gpu-memory-utilization."
        )
    if engine.max_num_seqs is None:
        _say(slots, f"of {format_size(utilization * total)} of GPU memory: {parts}")
    logger.info(
        "GPU memory: %s; %s stay free. The store holds %d of %d tokens.",
        parts, format_size(spare - wanted(slots)), blocks * shape.block_tokens // max_tokens, max_tokens,
    )  # fmt: skip
    return MemoryPlan(slots, spare - wanted(slots))


def rank_memory(free: int, place: str, ranks: int) -> tuple[int, str]:
    """Of so many free bytes of CPU memory those for each of a worker's ranks, and what sets this limit."""
    return (free, place) if ranks == 1 else (free // ranks, f"to each of {ranks} ranks {place}")


def plan_cpu_memory(
    shape: KVShape,
    config: CacheConfig,
    engine: EngineConfig,
    blocks: int,
    max_tokens: int,
    vocab: int,
    memory: tuple[int, str],
) -> MemoryPlan:
    """The same for a worker without a GPU, with weights and arena in memory already.

    Args:
        memory: bytes that are available, and what sets this limit.
    """
    slot = _slot_bytes(shape, config, max_tokens) + sampler_bytes(vocab)

    def wanted(slots: int) -> int:
        return _index_bytes(shape, config, blocks, slots, max_tokens) + slots * slot

    spare, place = memory
    slots = engine.max_num_seqs or _most_slots(wanted, spare, min(blocks, AUTO_SEQS["cpu"]))
    if wanted(slots) > spare:
        raise ConfigError(
            f"{slots} requests at a time take {format_size(wanted(slots))} of CPU memory beside the KV cache "
            f"and only {format_size(spare)} are available {place}: lower --max-num-seqs, --resident or "
            "--kv-size."
        )
    if engine.max_num_seqs is None:
        _say(slots, f"with {format_size(wanted(slots))} of resident rows and index, on the CPU")
    return MemoryPlan(slots, spare - wanted(slots))


def _index_bytes(shape: KVShape, config: CacheConfig, blocks: int, slots: int, max_tokens: int) -> int:
    tokens = index_pages(shape, blocks, slots, max_tokens) * shape.block_tokens
    if config.attention != "clo":
        return 0
    return TwoBitIndex.bytes_per_token(shape, values=config.tail_tokens(max_tokens) > 0) * tokens


def _slot_bytes(shape: KVShape, config: CacheConfig, max_tokens: int) -> int:
    """Resident rows and state of one sequence, its blocks and its index apart."""
    capacity = sum(sizes.resident for sizes in config.sizes(max_tokens, shape.layers))
    rows = 0 if config.attention == "full" else shape.layers * (config.sinks + config.recent) + capacity
    tables = 2 * 8 * -(-max_tokens // shape.block_tokens)
    state = shape.layers * (32 + 8 * -(-config.tail_tokens(max_tokens) // RUN))
    return shape.kv_heads * (rows * shape.row_bytes + state) + tables


def _most_slots(wanted: Callable[[int], int], spare: int, most: int) -> int:
    """The largest number up to ``most`` that fits; 1 where none does."""
    return max((slots for slots in range(1, most + 1) if wanted(slots) <= spare), default=1)


def _say(slots: int, reason: str) -> None:
    print(f"--max-num-seqs auto: {slots} ({reason}).", file=sys.stderr, flush=True)
