"""context/1m: a decode step of one sequence of a million tokens at the Qwen2.5-7B shape, and its memory."""

import gc
from functools import partial

import torch

from benchmarks.gpu.ceilings import gemm_step, seconds
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.step import STEPS
from benchmarks.gpu.synthetic import (
    QWEN_7B,
    arena_of,
    filled_engine,
    index_bytes_read,
    random_decoder,
    replay,
)
from benchmarks.result import Result
from clo.runtime.config import CacheConfig

CONTEXT = 1_000_000
ARENA_GIB = 54
ROWS = 10  # new ones a step and head: 9 % of k


def measure(machine: Machine) -> list[Result]:
    model, max_tokens = QWEN_7B, CONTEXT + 512
    config = CacheConfig()
    gemm = gemm_step(model, 1)
    before = memory_in_use()
    decoder = random_decoder(model)
    weights = memory_in_use() - before
    arena = arena_of(machine.memory, model.shape, 1, max_tokens)
    engine = filled_engine(decoder, arena, config, 1, CONTEXT, max_tokens)
    cache = engine.cache
    replay(engine, ROWS)
    graphs = engine.captured(1)  # whose memory counts below
    took = seconds(partial(graphs.replay, 1), STEPS)
    used = memory_in_use() - before
    read = index_bytes_read(engine, 1, CONTEXT) + cache.resident_bytes
    floor = gemm + read / machine.hbm
    kv = CONTEXT * model.shape.token_bytes
    case = "context/1m"
    parts = {"weights": weights, "index": cache.index_bytes, "resident rows": cache.resident_bytes}
    return [
        Result("ceiling", "GEMM graph, batch 1", gemm * 1e3, "ms"),
        Result(case, "time", took * 1e3, "ms", floor * 1e3, took / floor),
        Result(case, "KV in CPU memory", kv / 1e9, "GB"),
        # beside what it would be with the KV on the GPU
        Result(case, "GPU memory", used / 1e9, "GB", (weights + kv) / 1e9, used / (weights + kv)),
        *(Result(case, f"GPU memory: {name}", size / 1e9, "GB") for name, size in parts.items()),
        Result(case, "GPU memory: all else", (used - sum(parts.values())) / 1e9, "GB"),
    ]


def memory_in_use() -> int:
    """Bytes of GPU memory that nobody else could have now."""
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free
