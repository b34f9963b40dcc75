"""Closeness to full attention and rows moved, on real text: CLO beside the rule of arXiv 2511.14510.

    python -m benchmarks.quality

Real model (SmolLM2-135M-Instruct, float32), real text (a chapter of the Python language reference): a prompt
of 6,000 tokens, then 256 tokens teacher-forced through the decode step. "fetched" are rows that were not
resident; "selected" are what a rule moves that fetches its whole set when it selects, as the paper's does.
"""

import sys

from torch import Tensor

from benchmarks.result import Result, write
from examples.document import document
from gpu_worker.loader import load_decoder, resolve
from runtime.config import CacheConfig, ModelConfig
from runtime.messages import CacheStats, Text
from runtime.text import Tokenizer
from tests.reference import divergence, force, make_engine, stats_of

PROMPT, FORCED = 6000, 256
CASES = {
    "clo/k128/C1024": CacheConfig(select_k=128, resident=1024),
    "clo/k128/C1024/prefetch-correct": CacheConfig(select_k=128, resident=1024, prefetch="correct"),
    "topk/k128": CacheConfig(attention="topk", select_k=128),
    "paper/k256/C256/gate.8": CacheConfig(select_k=256, resident=256, gate=0.8),
}


def main() -> None:
    resolved = resolve(ModelConfig(device="cpu", dtype="float32"))
    decoder = load_decoder(resolved)
    tokenizer = Tokenizer(resolved.folder, decoder.vocab)
    tokens = tokenizer.encode(Text(document("compound")), limit=10**6)
    prompt, continuation = tokens[:PROMPT], tokens[PROMPT : PROMPT + FORCED]

    def measure(config: CacheConfig) -> tuple[Tensor, CacheStats]:
        engine = make_engine(decoder, config, slots=1, max_tokens=PROMPT + FORCED)
        logits = force(engine, prompt, continuation)
        return logits, stats_of(engine, PROMPT + FORCED - 1, FORCED - 1)

    full, _ = measure(CacheConfig(attention="full"))
    results = []
    for case, config in CASES.items():
        logits, stats = measure(config)
        results += [
            Result(case, "KL(full || case)", divergence(logits, full), "nats"),
            Result(case, "fetched", stats.rows_per_step_and_head, "rows per step and head"),
            Result(case, "selected", stats.selected_rows / stats.head_steps, "rows per step and head"),
        ]
        print(f"measured {case}", file=sys.stderr)
    write("quality", results)


if __name__ == "__main__":
    main()
