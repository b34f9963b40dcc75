"""overlap: a prompt and decode steps on two streams at once, beside one after the other.

A decode step is bound by memory and a prompt by arithmetic, so each could use what the other leaves. CLO does
not run them at once: this says what that would bring.
"""

import time
from functools import partial

import torch

from benchmarks.gpu.ceilings import seconds
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.prefill import prefill
from benchmarks.gpu.synthetic import LLAMA_8B, arena_of, filled_engine, random_decoder, replay
from benchmarks.result import Result
from clo.gpu_worker.engine import Engine
from clo.runtime.config import CacheConfig

SEQUENCES, CONTEXT = 8, 8192
PROMPT = 32768
ROWS = 23  # new ones a step and head: 9 % of k
ARENA_GIB = 14


@torch.inference_mode()
def measure(machine: Machine) -> list[Result]:
    model = LLAMA_8B
    decoder, config = random_decoder(model), CacheConfig()
    arena = arena_of(machine.memory, model.shape, SEQUENCES, CONTEXT + 512)
    engine = filled_engine(decoder, arena, config, SEQUENCES, CONTEXT - 512, CONTEXT + 512)
    replay(engine, ROWS)
    graphs = engine.captured(SEQUENCES)
    rest = machine.memory[arena.nbytes :]
    prompts = Engine(decoder, arena_of(rest, model.shape, 1, PROMPT + 512), config, 1, PROMPT + 512)
    prefill(prompts, PROMPT)  # compiles
    alone = prefill(prompts, PROMPT)
    step = seconds(partial(graphs.replay, SEQUENCES), 50)
    results = [
        Result("overlap", "prompt alone", alone, "s"),
        Result("overlap", "decode step alone", step * 1e3, "ms"),
    ]
    for share in (0.25, 0.5, 1.0):
        steps = round(share * alone / step)
        stream = torch.cuda.Stream(priority=-1)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        with torch.cuda.stream(stream):
            for _ in range(steps):
                graphs.replay(SEQUENCES)
        prefill(prompts, PROMPT)
        torch.cuda.synchronize()
        took, serial = time.perf_counter() - begin, alone + steps * step
        results.append(Result("overlap", f"{steps} steps beside a prompt", took, "s", serial, took / serial))
    return results
