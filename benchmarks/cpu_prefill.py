"""Time to first token on the CPU, against transformers' own generate in the same run.

    python -m benchmarks.cpu_prefill

Real model (SmolLM2-135M-Instruct, float32), real text: 6,000 tokens, as ``benchmarks.cpu_decode`` decodes
after, and the prompt of the demo. The two take turns, so that what else the machine does slows both down
alike; the median counts.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.cpu_decode import CONTEXT
from benchmarks.result import Result, write
from clo.gpu_worker.engine import Engine
from clo.gpu_worker.in_process import make_engine, prefill, wait_for
from clo.gpu_worker.model.decoder import load_decoder
from clo.runtime.config import CacheConfig, ModelConfig
from clo.runtime.model.files import resolve
from examples.document import document, pytorch_readme
from examples.questions import PROMPT, answered_by

REPEATS = 5


@torch.inference_mode()
def first_of_transformers(model: Any, prompt: list[int]) -> int:
    """The first token after a prompt, by ``generate``."""
    ids = torch.tensor([prompt])
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=1, pad_token_id=0
    )
    return int(made[0, -1])


def first_of_engine(engine: Engine, prompt: list[int]) -> int:
    """The same by an engine without other sequences."""
    (token,) = wait_for(engine, engine.start([0], prefill(engine, 0, prompt, len(prompt) + 1)))
    engine.retire(0)
    return token


def seconds(work: Callable[[], int], tokens: set[int]) -> float:
    """How long it takes to find a token, which is added to ``tokens``."""
    began = time.perf_counter()
    tokens.add(work())
    return time.perf_counter() - began


def main() -> None:
    resolved = resolve(ModelConfig(device="cpu", dtype="float32"))
    tokenizer = AutoTokenizer.from_pretrained(resolved.folder)
    readme = pytorch_readme()
    demo = PROMPT.format(document=readme, question=answered_by(readme)[0].text)
    prompts: dict[str, list[int]] = {
        "6k": tokenizer(document("compound"))["input_ids"][:CONTEXT],
        "demo": tokenizer(demo)["input_ids"],
    }
    model = AutoModelForCausalLM.from_pretrained(resolved.folder, dtype=torch.float32).eval()
    decoder = load_decoder(resolved)
    engine = make_engine(decoder, CacheConfig(), 1, max(map(len, prompts.values())) + 1)
    results = []
    for case, prompt in prompts.items():
        works = partial(first_of_transformers, model, prompt), partial(first_of_engine, engine, prompt)
        for work in works:
            work()  # compiles, and fills the caches of the machine
        tokens: set[int] = set()
        took = [[seconds(work, tokens) for work in works] for _ in range(REPEATS)]
        if len(tokens) > 1:
            sys.exit(f"error: the first tokens after the prompt {case} differ: {sorted(tokens)}")
        reference, own = (median(each) for each in zip(*took, strict=True))
        results += [
            Result(f"transformers/generate/{case}", "TTFT", reference, "s"),
            Result(f"clo/{case}", "TTFT", own, "s", reference, own / reference),
        ]
        print(*results[-2:], f"{len(prompt)} tokens", sep="\n", file=sys.stderr, flush=True)
    write("cpu-prefill", results)


if __name__ == "__main__":
    main()
