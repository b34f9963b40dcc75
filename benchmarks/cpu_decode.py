"""Decode speed on the CPU at a 6,000-token context, against transformers' own generate in the same run.

    python -m benchmarks.cpu_decode

Real model (SmolLM2-135M-Instruct, float32), real text. Each runs alone, in turn; the median step counts.
"""

import time
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from benchmarks.result import Result, write
from clo.gpu_worker.engine import Engine
from clo.gpu_worker.in_process import make_engine, prefill, stats_of, wait_for
from clo.gpu_worker.model.decoder import load_decoder
from clo.runtime.config import CacheConfig, ModelConfig
from clo.runtime.model.files import resolve
from examples.document import document

CONTEXT, STEPS = 6000, 40


def clo_step(engine: Engine, prompt: list[int]) -> tuple[float, float]:
    """Seconds of the median decode step, and rows fetched per step and head."""
    logits = prefill(engine, 0, prompt, CONTEXT + STEPS)
    wait_for(engine, engine.start(0, logits))
    times = []
    for step in range(1, STEPS):
        began = time.perf_counter()
        wait_for(engine, engine.step([0], CONTEXT + step))
        times.append(time.perf_counter() - began)
    return median(times), stats_of(engine, CONTEXT + STEPS - 1, STEPS - 1).rows_per_step_and_head


@torch.inference_mode()
def transformers_step(model: Any, prompt: list[int]) -> float:
    """Seconds of the median decode step of ``generate``: its own loop, timed between its tokens."""
    cache = DynamicCache(config=model.config)
    times: list[float] = []

    class Clock:
        def put(self, _: torch.Tensor) -> None:
            times.append(time.perf_counter())

        def end(self) -> None:
            pass

    ids = torch.tensor([prompt])
    model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, streamer=Clock(), do_sample=False,
        max_new_tokens=STEPS, min_new_tokens=STEPS, pad_token_id=0,
    )  # fmt: skip
    return median(after - before for before, after in pairwise(times[1:]))


def main() -> None:
    resolved = resolve(ModelConfig(device="cpu", dtype="float32"))
    tokenizer = AutoTokenizer.from_pretrained(resolved.folder)
    prompt = tokenizer(document("compound"))["input_ids"][:CONTEXT]
    model = AutoModelForCausalLM.from_pretrained(resolved.folder, dtype=torch.float32).eval()
    reference = transformers_step(model, prompt)
    del model
    results = [Result("transformers/generate/6k", "decode", 1 / reference, "tokens/s")]

    decoder = load_decoder(resolved)
    for case, config in {
        "clo/6k": CacheConfig(),
        "full/6k": CacheConfig(attention="full"),
        "clo/6k/prefetch-off": CacheConfig(prefetch="off"),
    }.items():
        seconds, rows = clo_step(make_engine(decoder, config, 1, CONTEXT + STEPS), prompt)
        results.append(Result(case, "decode", 1 / seconds, "tokens/s", 1 / reference, reference / seconds))
        results.append(Result(case, "fetched", rows, "rows per step and head"))
    write("cpu-decode", results)


if __name__ == "__main__":
    main()
