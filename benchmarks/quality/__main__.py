"""What a cache loses against full attention, and what it moves, on real text and on tasks with known answers.

    python -m benchmarks.quality --quick    # the default model, on two CPU cores
    python -m benchmarks.quality --model FOLDER --lengths 8192,16384,32768 --setting k=256,C=2048

Every item, text or task, is a prompt and an answer that is forced through the worker's decode step, token by
token, all items of a kind together as the slots of one engine. The reference is one full-attention pass over
the same tokens; ``full, by steps`` is full attention by decode steps, which leaves only rounding. The items
are those of ``benchmarks.tasks`` and ``benchmarks.quality.ruler``; a run always has the same ones. Writes
``quality-MODEL`` into ``benchmarks/results`` as .json, .md and two .png.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

from benchmarks.quality.forcing import FULL, Heads, Reference, heads_of
from benchmarks.quality.plots import draw_heads, draw_settings
from benchmarks.quality.report import Figures, figures_of, results_of, tables_of
from benchmarks.quality.ruler import COPIED, Ruler, ruler_item
from benchmarks.quality.settings import (
    DEFAULT,
    DROPPING,
    FASTER,
    PAPER,
    SETTINGS,
    VERIFIED,
    Setting,
    parse_setting,
)
from benchmarks.result import RESULTS, write
from benchmarks.tasks import Encode, Item, Kind, documents, make_item
from clo.gpu_worker.model.decoder import load_decoder
from clo.runtime.config import DEFAULT_MODEL, ModelConfig
from clo.runtime.model.files import resolve
from clo.runtime.tokenizer import Tokenizer
from clo.runtime.wire.messages import Text

TASKS: tuple[Kind | Ruler, ...] = ("quote", "lookup", "track", "count", "list", "needle", "chain", "copy")
QUICK_TASKS = TASKS[:5]  # needle and chain are for models of ``benchmarks.long_model``, copy takes long
ITEMS, QUICK_ITEMS = 4, 2  # of a task, for each document


def main() -> None:
    options = parse()
    resolved = resolve(ModelConfig(model=options.model, device=options.device, dtype=options.dtype))
    decoder = load_decoder(resolved)
    tokenizer = Tokenizer(resolved.folder, decoder.vocab)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(Text(text), limit=10**9, continues=True)

    make = partial(items_of, documents(encode)[: options.documents], encode)
    figures: list[Figures] = []
    for length in options.lengths:
        items = make("text", length - options.tokens, options.documents)
        reference = Reference(decoder, items, options.tokens)
        settings = [Setting("full, by steps", FULL), *SETTINGS, *options.setting]
        figures += measure("text", length, reference, settings)
    probed = {setting.name: probe(reference, setting) for setting in (DEFAULT, VERIFIED)}
    del reference
    for length in options.lengths[:1] if options.quick else options.lengths:
        for kind in options.tasks:
            count = (QUICK_ITEMS if options.quick else ITEMS) * options.documents
            tokens = min(COPIED, length // 4) if kind == "copy" else options.tokens
            reference = Reference(decoder, make(kind, length - tokens, count), tokens)
            figures += measure(kind, length, reference, [DEFAULT, FASTER, DROPPING, PAPER, *options.setting])
            del reference

    name = options.name or f"quality-{Path(resolved.name).name}"
    late = {setting: float(heads.late.mean()) for setting, heads in probed.items()}
    write(name, results_of(figures, late))
    (RESULTS / f"{name}.md").write_text(tables_of(resolved.name, options.tokens, figures, late))
    draw_settings(figures, RESULTS / f"{name}.png")
    title = f"{DEFAULT.name}, {options.lengths[-1]} tokens"
    draw_heads(probed[DEFAULT.name], title, RESULTS / f"{name}-heads.png")


def items_of(
    texts: list[list[int]], encode: Encode, kind: Kind | Ruler, prompt: int, count: int
) -> list[Item]:
    """Items with prompts of so many tokens, over the documents in turn; seeds are 0, 1, 2, ..."""
    items = []
    for seed in range(count):
        text = texts[seed % len(texts)]
        match kind:
            case "lookup" | "track" | "count" | "list" | "copy":
                items.append(ruler_item(kind, text, prompt, seed, encode))
            case _:
                items.append(make_item(kind, text, prompt, seed, encode))
    return items


def measure(kind: str, length: int, reference: Reference, settings: list[Setting]) -> list[Figures]:
    """Figures of each setting over the items of a reference."""
    rows = []
    for setting in settings:
        engine = reference.engine(setting.config)
        scores = reference.force(engine)
        rows.append(figures_of(kind, length, setting, reference, scores, engine.cache))
        print(f"measured {kind} {length} {setting.name}: KL {rows[-1].kl.value:.5f}", file=sys.stderr)
    return rows


def probe(reference: Reference, setting: Setting) -> Heads:
    """What each head does with a setting."""
    engine = reference.engine(setting.config, probe=True)
    reference.force(engine)
    return heads_of(engine, reference.steps)


def parse() -> argparse.Namespace:
    def lengths(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="name or folder (%(default)s)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32"),
        help="float32 leaves bfloat16's rounding out, which differs from batch to batch",
    )
    parser.add_argument("--lengths", type=lengths, help="tokens, answer included (2048,4096,8192)")
    parser.add_argument("--documents", type=int, help="1 to 5, of text; a task has several items each (4)")
    parser.add_argument("--tokens", type=int, help="forced of an answer but copy's, 80 to 256 (256)")
    parser.add_argument("--tasks", help=f"of {','.join(TASKS)}, or none (all of them)")
    parser.add_argument("--name", help="of the files in benchmarks/results (quality-MODEL)")
    parser.add_argument("--quick", action="store_true", help="fewer of everything: minutes on two CPU cores")
    parser.add_argument(
        "--setting",
        type=parse_setting,
        action="append",
        default=[],
        help="one more cache, such as k=256,C=2048,gate=.9,prefetch=off",
    )
    options = parser.parse_args()
    quick = options.quick
    options.lengths = options.lengths or ([2048, 6144] if quick else [2048, 4096, 8192])
    options.documents = options.documents or (2 if quick else 4)
    options.tokens = options.tokens or (96 if quick else 256)
    tasks = TASKS if options.tasks is None else () if options.tasks == "none" else options.tasks.split(",")
    options.tasks = QUICK_TASKS if quick and options.tasks is None else tasks
    if unknown := set(options.tasks) - set(TASKS):
        parser.error(f"--tasks: unknown {', '.join(sorted(unknown))}; there are {', '.join(TASKS)}")
    return options


if __name__ == "__main__":
    main()
