"""Decode speed on the CPU at a 6,000-token context, against transformers' own generate in the same run.

    python -m benchmarks.cpu_decode

Real model (SmolLM2-135M-Instruct, float32), real text. After each token of transformers every engine takes a
step, so that what else the machine does slows all of them down alike; the median step counts.
"""

import time
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
CASES = {
    "clo/6k": CacheConfig(),
    "full/6k": CacheConfig(attention="full"),
    "clo/6k/prefetch-off": CacheConfig(prefetch="off"),
}


class Turns:
    """A streamer of ``generate`` that times its steps, and after each one a step of every engine.

    Args:
        engines: with their prompts, each about to take its first step.
    """

    def __init__(self, engines: dict[str, Engine]) -> None:
        self._engines = engines
        self._began: float | None = None
        self.own: list[float] = []  # seconds of each step of transformers
        self.theirs: dict[str, list[float]] = {case: [] for case in engines}  # those of each engine

    def put(self, tokens: torch.Tensor) -> None:
        """The prompt, then each token."""
        if tokens.numel() > 1:
            return
        now = time.perf_counter()
        if self._began is not None:
            self.own.append(now - self._began)
            for case, engine in self._engines.items():
                began = time.perf_counter()
                wait_for(engine, engine.step([0], CONTEXT + len(self.own)))
                self.theirs[case].append(time.perf_counter() - began)
        self._began = time.perf_counter()

    def end(self) -> None:
        """Nothing to do."""


@torch.inference_mode()
def take_turns(model: Any, engines: dict[str, Engine], prompt: list[int]) -> Turns:
    """Times of the steps after the first token."""
    turns = Turns(engines)
    ids = torch.tensor([prompt])
    model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=DynamicCache(config=model.config),
        streamer=turns, do_sample=False, max_new_tokens=STEPS, min_new_tokens=STEPS, pad_token_id=0,
    )  # fmt: skip
    return turns


def main() -> None:
    resolved = resolve(ModelConfig(device="cpu", dtype="float32"))
    tokenizer = AutoTokenizer.from_pretrained(resolved.folder)
    prompt = tokenizer(document("compound"))["input_ids"][:CONTEXT]
    model = AutoModelForCausalLM.from_pretrained(resolved.folder, dtype=torch.float32).eval()
    decoder = load_decoder(resolved)
    engines = {case: make_engine(decoder, config, 1, CONTEXT + STEPS) for case, config in CASES.items()}
    for engine in engines.values():
        wait_for(engine, engine.start([0], prefill(engine, 0, prompt, CONTEXT + STEPS)))
    turns = take_turns(model, engines, prompt)

    reference = median(turns.own)
    results = [Result("transformers/generate/6k", "decode", 1 / reference, "tokens/s")]
    for case, engine in engines.items():
        seconds = median(turns.theirs[case])
        results.append(Result(case, "decode", 1 / seconds, "tokens/s", 1 / reference, reference / seconds))
        rows = stats_of(engine, CONTEXT + STEPS - 1, STEPS - 1).rows_per_step_and_head
        results.append(Result(case, "fetched", rows, "rows per step and head"))
    write("cpu-decode", results)


if __name__ == "__main__":
    main()
