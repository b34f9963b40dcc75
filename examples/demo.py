"""The main job on the default model: two questions about one real document, answered from the KV store.

Starts two servers one after the other, with full attention and with CLO, and compares the perplexity of the
same text on both. Run it with ``make demo``.
"""

import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from clo.runtime.client import Client, Result
from clo.runtime.units import format_size
from clo.runtime.wire.messages import Progress
from examples.document import document

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT_CHARACTERS = 26_000  # about 6,300 tokens
SCORED_CHARACTERS = 600
ANSWER_TOKENS = 64
QUESTIONS = (
    "What does the finally clause of a try statement do?",
    "How does the with statement use a context manager?",
)


@contextmanager
def server(attention: str) -> Iterator[str]:
    """A server on a free port; yields its address."""
    command = [sys.executable, "launch.py", "--workers", "1", "--kvstore", "numa0", "--port", "0"]
    print(f"$ {' '.join(['python', *command[1:], '--attention', attention])}", flush=True)
    process = subprocess.Popen(
        [*command, "--attention", attention], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        ready = process.stdout.readline().strip()
        if not ready:
            sys.exit(process.wait() or 1)
        print(ready, flush=True)
        yield ready.split()[1]
    finally:
        process.terminate()
        process.wait()


@contextmanager
def progress_bar() -> Iterator[Callable[[Progress], None]]:
    """A bar on a terminal, nothing in a file; yields what to tell it with."""
    with tqdm(unit=" tokens", leave=False, disable=None) as bar:

        def show(progress: Progress) -> None:
            bar.set_description(progress.stage, refresh=False)
            bar.total = progress.total
            bar.update(progress.done - bar.n)
            if progress.done == progress.total:
                bar.clear()

        yield show


def ask(client: Client, text: str, question: str) -> tuple[Result, float]:
    """Stream one answer to the terminal; returns the result and decode tokens/s."""
    turns = [{"role": "user", "content": f"{text}\n\nQuestion about the text above: {question}"}]
    print(f"\nQ: {question}", flush=True)
    began = 0.0
    with progress_bar() as show:
        stream = client.stream(turns, temperature=0.0, max_tokens=ANSWER_TOKENS, on_progress=show)
        for chunk in stream:
            if not began:
                began = time.monotonic()
                print("A: ", end="")
            print(chunk.text, end="", flush=True)
    print(flush=True)
    result = stream.result
    return result, (result.usage.completion_tokens - 1) / max(time.monotonic() - began, 1e-9)


def perplexity(client: Client, text: str, continuation: str) -> float:
    """Of the continuation, token by token through the decode path."""
    with progress_bar() as show:
        scored = client.score(text, continuation, on_progress=show)
    assert scored.logprobs is not None
    return math.exp(-sum(entry.logprob for entry in scored.logprobs) / len(scored.logprobs))


def main() -> None:
    source = document("compound")
    text = source[:DOCUMENT_CHARACTERS]
    continuation = source[DOCUMENT_CHARACTERS : DOCUMENT_CHARACTERS + SCORED_CHARACTERS]
    measured: dict[str, float] = {}
    rows: list[tuple[str, Result, float]] = []
    for attention in ("full", "clo"):
        with server(attention) as address, Client(address) as client:
            if attention == "clo":
                for number, question in enumerate(QUESTIONS, 1):
                    rows.append((f"question {number}", *ask(client, text, question)))
            measured[attention] = perplexity(client, text, continuation)

    print(f"\n{'':12} {'tokens':>7} {'KV in store':>12} {'resident':>10} {'index':>10} {'hit rate':>9} "
          f"{'rows/step/head':>15} {'tokens/s':>9}")  # fmt: skip
    for name, result, speed in rows:
        cache = result.cache
        print(f"{name:12} {result.usage.prompt_tokens:7} {format_size(cache.kv_bytes):>12} "
              f"{format_size(cache.resident_bytes):>10} {format_size(cache.index_bytes):>10} "
              f"{cache.hit_rate:9.1%} {cache.rows_per_step_and_head:15.1f} {speed:9.1f}")  # fmt: skip
    print(
        f"\nperplexity of the next {SCORED_CHARACTERS} characters: "
        f"full {measured['full']:.3f}, clo {measured['clo']:.3f}"
    )


if __name__ == "__main__":
    main()
