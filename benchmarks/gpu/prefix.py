"""prefix/32k and prefix/128k: a prompt at the Llama-3-8B shape of which all but the last 64 tokens are in the
arena already, from its tokens to its last logits.

Beside it stands what the copy engine takes for the same rows, and the prefill of the whole prompt. The blocks
lie in the arena in no order, as they do after a while of serving. Then the same with ``--prefix-attention
sparse`` (prefix/32k/sparse, prefix/128k/sparse), beside the exact time.
"""

from dataclasses import replace
from random import Random
from statistics import median

import torch
from torch import Tensor

from benchmarks.gpu.machine import Machine
from benchmarks.gpu.synthetic import LLAMA_8B, arena_of, random_decoder
from benchmarks.result import Result
from clo.gpu_worker.engine import Engine
from clo.gpu_worker.model.decoder import Decoder
from clo.kvstore.layout import by_block, codes_of, rows_of
from clo.runtime.config import CacheConfig

LENGTHS = (32768, 131072)
SUFFIX = 64  # tokens that are not in the arena
ARENA_GIB = 19  # with codes
_REPEATS = 5


@torch.inference_mode()
def measure(machine: Machine) -> list[Result]:
    shape, room = LLAMA_8B.shape, max(LENGTHS) + 512
    decoder = random_decoder(LLAMA_8B)
    prompts = {total: torch.randint(0, decoder.vocab, (total + SUFFIX,)).tolist() for total in LENGTHS}
    results, exact = [], {}
    engine = Engine(decoder, arena_of(machine.memory, shape, 1, room), CacheConfig(), 1, room)
    engine.capture([1])
    for total, tokens in prompts.items():
        whole, exact[total] = times(engine, tokens, total)
        copied = total * shape.token_bytes / machine.to_gpu
        case = f"prefix/{total // 1024}k"
        results += [
            Result(case, "time", exact[total], "s", copied, exact[total] / copied),
            Result(case, "time beside the whole prompt", exact[total], "s", whole, exact[total] / whole),
        ]
    del engine
    engine = sparse_engine(machine.memory, decoder, room)
    engine.capture([1])
    for total, tokens in prompts.items():
        _, took = times(engine, tokens, total)
        case = f"prefix/{total // 1024}k/sparse"
        results.append(Result(case, "time", took, "s", exact[total], took / exact[total]))
    return results


def sparse_engine(memory: Tensor, decoder: Decoder, room: int) -> Engine:
    """An engine for one sequence, over an arena of blocks with codes that is cut from ``memory``."""
    shape = replace(decoder.shape, codes=True)
    blocks = -(-room // shape.block_tokens)
    parts = memory[: blocks * shape.block_bytes].view(shape.layers, shape.kv_heads, blocks, shape.part_bytes)
    arena, codes = by_block(rows_of(parts, shape)), codes_of(parts, shape)
    return Engine(decoder, arena, CacheConfig(prefix_attention="sparse"), 1, room, codes=codes)


def times(engine: Engine, tokens: list[int], cached: int) -> tuple[float, float]:
    """Seconds of the whole prompt, whose blocks lie in no order, and behind what is cached."""
    blocks = list(range(engine.max_blocks))
    Random(0).shuffle(blocks)
    whole = min(prefill(engine, tokens, blocks, 0) for _ in range(2))
    prefill(engine, tokens, blocks, cached)  # compiles what is not yet compiled
    return whole, median(prefill(engine, tokens, blocks, cached) for _ in range(_REPEATS))


def prefill(engine: Engine, tokens: list[int], blocks: list[int], cached: int) -> float:
    """Seconds of a prefill of which ``cached`` tokens are in the arena, until it can decode."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    needed = blocks[: -(-len(tokens) // engine.decoder.shape.block_tokens)]
    begin.record()
    work = engine.prefill(0, tokens, needed, cached=cached)
    while work.advance() is None:
        pass
    engine.cache.join_prompts()
    end.record()
    end.synchronize()
    engine.retire(0)
    return float(begin.elapsed_time(end)) / 1e3
