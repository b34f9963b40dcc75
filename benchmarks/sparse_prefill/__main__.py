"""What a sparse prefill loses against a dense one, what it attends to, and how fast it is.

    python -m benchmarks.sparse_prefill --model FOLDER

FOLDER is a model of ``benchmarks.long_model``. Prompts are computed with full attention and with the blocks
that each method chooses; what follows is computed with full attention, so that only the prefill differs.
Texts go on with the 64 tokens that are most likely after the dense prefill; tasks with their answers.

The latest chunk's own rows are always attended, and so a prompt of four chunks is no hard case. Chunks of
2,048 tokens show what 32K tokens have in common with 128K tokens in chunks of 8,192: a sixteenth of the
prompt is in a chunk. Writes ``sparse-prefill`` into ``benchmarks/results``.
"""

import argparse
import sys
from functools import partial

import torch

from benchmarks.quality.__main__ import TASKS, items_of
from benchmarks.result import Result, write
from benchmarks.sparse_prefill import recall, speed
from benchmarks.sparse_prefill.closeness import (
    BY_BUDGET,
    BY_ESTIMATOR,
    DEFAULT,
    Comparison,
    Method,
    compared,
    task_results,
    text_results,
)
from benchmarks.sparse_prefill.context import Context, continued
from benchmarks.tasks import Item, documents
from clo.gpu_worker.model.decoder import Decoder, load_decoder
from clo.runtime.config import DEFAULT_MODEL, ModelConfig
from clo.runtime.model.files import resolve
from clo.runtime.tokenizer import Tokenizer
from clo.runtime.wire.messages import Text

ANSWER = 256  # tokens of a length that are left for an answer


def main() -> None:
    options = parse()
    resolved = resolve(ModelConfig(model=options.model, device=options.device))
    decoder = load_decoder(resolved)
    tokenizer = Tokenizer(resolved.folder, decoder.vocab)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(Text(text), limit=10**9, continues=True)

    make = partial(items_of, documents(encode)[: options.documents], encode)
    results = speed.measure() if decoder.device.type == "cuda" and options.speed else []
    longest = max(options.chunks)
    context = Context(decoder, max(options.lengths))
    for length in options.lengths:
        texts = make("text", length - ANSWER, options.documents)
        results += measure_texts(decoder, context, length, texts, options.tokens, options.chunks)
        for kind in options.tasks:
            items = [cut(item) for item in make(kind, length - ANSWER, options.items * options.documents)]
            results += measure_task(decoder, context, f"{kind}/{length}", items, options.chunks)
        results += measure_recall(decoder, context, length, texts[:2], min(options.chunks))
    write(options.name, results, [f"Chunks are served with {longest} tokens."])


def measure_texts(
    decoder: Decoder, context: Context, length: int, texts: list[Item], tokens: int, chunks: list[int]
) -> list[Result]:
    """KL of the continuations: budgets with all chunks, estimators with the shortest ones."""
    found: dict[tuple[int, Method], list[Comparison]] = {}
    for text in texts:
        first = context.prefill(text.prompt, max(chunks), context.dense)
        item = continued(context, text, first, tokens)
        full = context.forced(first, item.answer)
        for chunk in chunks:
            methods = BY_BUDGET + (BY_ESTIMATOR if chunk == min(chunks) else ())
            every = compared(decoder, context, item, chunk, methods, full)
            for method, comparison in zip(methods, every, strict=True):
                found.setdefault((chunk, method), []).append(comparison)
    results = []
    for (chunk, method), comparisons in found.items():
        case = f"text/{length}/chunks of {chunk}/{method.name}"
        results += text_results(case, comparisons)
        shown(results, "KL(dense || sparse prefill)")
    return results


def measure_task(
    decoder: Decoder, context: Context, case: str, items: list[Item], chunks: list[int]
) -> list[Result]:
    """Right answers after prefills with the default method."""
    found: dict[int, list[Comparison]] = {chunk: [] for chunk in chunks}
    for item in items:
        first = context.prefill(item.prompt, max(chunks), context.dense)
        full = context.forced(first, item.answer)
        for chunk in chunks:
            found[chunk] += compared(decoder, context, item, chunk, (DEFAULT,), full)
    results = []
    for chunk, comparisons in found.items():
        results += task_results(f"{case}/chunks of {chunk}", items, comparisons)
        shown(results, "right")
    return results


@torch.inference_mode()
def measure_recall(
    decoder: Decoder, context: Context, length: int, texts: list[Item], chunk: int
) -> list[Result]:
    """What the blocks of each estimator hold, over the attention of dense prefills."""
    judges = []
    for text in texts:
        judge = recall.Judge(context, len(text.prompt), decoder.scale)
        context.prefill(text.prompt, chunk, judge)
        judges.append(judge)
    return recall.results_of(length, judges)


def cut(item: Item) -> Item:
    return item._replace(answer=item.answer[:ANSWER], scored=item.scored[:ANSWER])


def shown(results: list[Result], metric: str) -> None:
    """Show the last result of a metric: the whole takes minutes."""
    print(next(result for result in reversed(results) if result.metric == metric), file=sys.stderr)


def parse() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    def names(text: str) -> list[str]:
        return [] if text == "none" else text.split(",")

    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparse_prefill", description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="name or folder (%(default)s)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--lengths", type=numbers, default=[16384, 32768], help="tokens (16384,32768)")
    parser.add_argument("--chunks", type=numbers, default=[8192, 2048], help="tokens (8192,2048)")
    parser.add_argument("--documents", type=int, default=4, help="1 to 5 (%(default)s)")
    parser.add_argument("--items", type=int, default=2, help="of a task, for each document (%(default)s)")
    parser.add_argument("--tasks", type=names, default=list(TASKS), help=f"of {','.join(TASKS)}, or none")
    parser.add_argument("--tokens", type=int, default=64, help="of a text's continuation (%(default)s)")
    parser.add_argument("--no-speed", dest="speed", action="store_false", help="leave out the 8B shape")
    parser.add_argument("--name", default="sparse-prefill", help="of the file in benchmarks/results")
    options = parser.parse_args()
    if unknown := set(options.tasks) - set(TASKS):
        parser.error(f"--tasks: unknown {', '.join(sorted(unknown))}; there are {', '.join(TASKS)}")
    return options


if __name__ == "__main__":
    main()
