"""step/resident and step/fetch: a decode step of 24 sequences of 32K at the Llama-3-8B shape.

store/decode is step/resident beside the same step without writing its new rows to CPU memory. All steps run
in turn, several times around, so that they find the machine in the same state.
"""

from contextlib import ExitStack
from unittest.mock import patch

import torch

from benchmarks.gpu.ceilings import gemm_step, in_turn, seconds
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.synthetic import LLAMA_8B, arena_of, filled_engine, random_decoder, replayed
from benchmarks.result import Result
from clo.gpu_worker import cache as cache_module
from clo.gpu_worker.engine import Engine
from clo.runtime.config import CacheConfig

CONTEXT, STEPS = 32768, 40
MAX_TOKENS = CONTEXT + 512
SELECTED = 256  # k
CONFIG = CacheConfig(select_k=SELECTED, resident=2048)
ARENA_GIB = 98
SHARES = (0, 5, 9, 10, 20, 50, 100)  # of k, new rows a step and head, in percent


def measure(machine: Machine) -> list[Result]:
    model, sequences = LLAMA_8B, 24
    gemm = gemm_step(model, sequences)
    arena = arena_of(machine.memory, model, sequences, MAX_TOKENS)
    engine = filled_engine(
        random_decoder(model, MAX_TOKENS), arena, CONFIG, sequences, CONTEXT - 300, MAX_TOKENS
    )
    read = sequences * CONTEXT * engine.cache.index_token_bytes + engine.cache.resident_bytes
    floor = gemm + read / machine.hbm
    with ExitStack() as replays:
        replays.enter_context(replayed(0))
        with patch.object(cache_module, "store_new", lambda *_: None):
            steps = [captured(engine, sequences)]
        for share in SHARES:
            replays.enter_context(replayed(round(SELECTED * share / 100)))
            steps.append(captured(engine, sequences))
        without, resident, *fetching = in_turn([step.replay for step in steps])
    results = [
        Result("ceiling", "GEMM graph", gemm * 1e3, "ms"),
        Result("step/resident", "time", resident * 1e3, "ms", floor * 1e3, resident / floor),
        Result("store/decode", "time", resident * 1e3, "ms", without * 1e3, resident / without),
    ]
    for share, took in zip(SHARES[1:], fetching, strict=True):
        name = "step/fetch" if share == 9 else f"step/fetch/{share}%"
        results.append(Result(name, "time", took * 1e3, "ms", resident * 1e3, took / resident))
    return results


def step_seconds(engine: Engine, size: int) -> float:
    """Median seconds of a decode step, captured as it now is."""
    return seconds(captured(engine, size).replay, STEPS)


@torch.inference_mode()
def captured(engine: Engine, size: int) -> torch.cuda.CUDAGraph:
    """A decode step, captured as it now is."""
    engine._capture(size)
    return engine._graphs[size]
