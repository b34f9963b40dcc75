"""prefix/32k and prefix/128k: a prompt at the Llama-3-8B shape of which all but the last 64 tokens are in the
arena already, from its tokens to its last logits.

Beside it stands what the copy engine takes for the same rows, and the prefill of the whole prompt. The blocks
lie in the arena in no order, as they do after a while of serving.
"""

from random import Random
from statistics import median

import torch

from benchmarks.gpu.machine import Machine
from benchmarks.gpu.synthetic import LLAMA_8B, arena_of, random_decoder
from benchmarks.result import Result
from clo.gpu_worker.engine import Engine
from clo.runtime.config import CacheConfig

LENGTHS = (32768, 131072)
SUFFIX = 64  # tokens that are not in the arena
ARENA_GIB = 17
_REPEATS = 5


@torch.inference_mode()
def measure(machine: Machine) -> list[Result]:
    shape, room = LLAMA_8B.shape, max(LENGTHS) + 512
    arena = arena_of(machine.memory, shape, 1, room)
    engine = Engine(random_decoder(LLAMA_8B, room), arena, CacheConfig(), 1, room)
    blocks = list(range(len(arena)))
    Random(0).shuffle(blocks)
    results = []
    for total in LENGTHS:
        tokens = torch.randint(0, engine.decoder.vocab, (total + SUFFIX,)).tolist()
        whole, *_ = sorted(prefill(engine, tokens, blocks, 0) for _ in range(2))
        took = median(prefill(engine, tokens, blocks, total) for _ in range(_REPEATS))
        copied = total * shape.token_bytes / machine.to_gpu
        case = f"prefix/{total // 1024}k"
        results += [
            Result(case, "time", took, "s", copied, took / copied),
            Result(case, "time beside the whole prompt", took, "s", whole, took / whole),
        ]
    return results


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
