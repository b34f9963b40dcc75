"""What a prompt loses that attends to what it begins with from codes: ``--prefix-attention sparse``.

    python -m benchmarks.quality.prefix    # the default model, minutes on two CPU cores

For each document a text is computed as a whole, and its last tokens again behind the blocks of all before
them, with several numbers of rows that a head has exactly. KL is that of the distributions behind each of the
last tokens. Writes ``prefix-attention-MODEL`` into ``benchmarks/results``.
"""

import argparse
from pathlib import Path

import numpy
from torch import Tensor

from benchmarks.quality.forcing import Numbers
from benchmarks.quality.metrics import blocks, divergences, estimate
from benchmarks.result import Result, write
from benchmarks.tasks import documents
from clo.gpu_worker.cache import layer
from clo.gpu_worker.engine import Engine
from clo.gpu_worker.in_process import blocks_of, make_engine
from clo.gpu_worker.model.decoder import load_decoder
from clo.runtime.config import DEFAULT_MODEL, CacheConfig, ModelConfig
from clo.runtime.model.files import resolve
from clo.runtime.tokenizer import Tokenizer
from clo.runtime.wire.messages import Text

CONFIG = CacheConfig(select_k=32, resident=256, prefix_attention="sparse")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.prefix", description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="name or folder (%(default)s)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--length", type=int, default=6144, help="tokens of the beginning (%(default)s)")
    parser.add_argument("--own", type=int, default=128, help="tokens behind it (%(default)s)")
    parser.add_argument("--documents", type=int, default=4, help="1 to 5 (%(default)s)")
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 1024, 2048], help="exact ones")
    options = parser.parse_args()
    resolved = resolve(ModelConfig(model=options.model, device=options.device, dtype="float32"))
    decoder = load_decoder(resolved)
    tokenizer = Tokenizer(resolved.folder, decoder.vocab)
    texts = documents(lambda text: tokenizer.encode(Text(text), limit=10**9, continues=True))
    size = decoder.shape.block_tokens
    cached, own = options.length // size * size, options.own
    engine = make_engine(decoder, CONFIG, 2, cached + own)
    found: dict[int, list[Numbers]] = {rows: [] for rows in options.rows}
    agree: dict[int, list[Numbers]] = {rows: [] for rows in options.rows}
    for text in texts[: options.documents]:
        tokens = text[: cached + own]
        exact = logits_of(engine, 0, tokens, own, 0)
        for rows in options.rows:
            layer.EXACT_ROWS = rows
            near = logits_of(engine, 1, tokens, own, cached)
            found[rows].append(divergences([exact], [near]))
            agree[rows].append((exact.argmax(-1) == near.argmax(-1)).cpu().double().numpy()[None])
        engine.retire(0)
    results = []
    for rows in options.rows:
        kl, same = (estimate(blocks(numpy.concatenate(part[rows]))) for part in (found, agree))
        case = f"prefix/{cached}/{rows} rows"
        for metric, of, unit in (
            ("KL(exact || sparse)", kl, "nats"),
            ("same top token", same, "of tokens"),
        ):
            ends = (("", of.value), (", 95% low", of.low), (", 95% high", of.high))
            results += [Result(case, metric + end, value, unit) for end, value in ends]
    notes = [f"The last {own} tokens of {options.documents} documents, behind {cached} tokens in the arena."]
    write(f"prefix-attention-{Path(resolved.name).name}", results, notes)


def logits_of(engine: Engine, slot: int, tokens: list[int], own: int, cached: int) -> Tensor:
    """Logits [own, vocab] of the last tokens of a prompt in a slot; slot 0 has the blocks of what is
    cached."""
    size = engine.decoder.shape.block_tokens
    blocks = [
        *blocks_of(engine, 0, len(tokens))[: cached // size],
        *blocks_of(engine, slot, len(tokens))[cached // size :],
    ]
    work = engine.prefill(slot, tokens, blocks, last=own, cached=cached)
    while (logits := work.advance()) is None:
        pass
    engine.cache.join_prompts()
    if slot:
        engine.retire(slot)
    return logits.float()


if __name__ == "__main__":
    main()
