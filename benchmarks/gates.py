"""Does a gate pay? Profiles, one gate for all heads, and none, on text that no profile was calibrated with.

    python -m benchmarks.calibrate profile.json --rows 3
    python -m benchmarks.gates profile.json

A gate saves selections and rows at the price of exactness. So does a smaller ``k`` without a gate, and rows
are what crosses PCIe. Each profile is compared, at the rows that it moves itself, with what lies between the
measured points of ``UNIFORM`` (one gate for all heads) and of ``SELECTED`` (no gate, fewer rows selected).
The intervals are those of the ratio of the mean KL divergences, from a bootstrap over blocks of steps that
takes the same blocks for all cases: they hold for this text.

Teacher-forced decode steps after a prompt, against full attention.
"""

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.result import Result, write
from benchmarks.tasks import Item, documents, make_item
from clo.gpu_worker.in_process import make_engine, prefill
from clo.gpu_worker.model.decoder import Decoder, load_decoder
from clo.runtime.config import CacheConfig, ModelConfig
from clo.runtime.model.files import resolve
from clo.runtime.profile import Profile
from clo.runtime.tokenizer import Tokenizer
from clo.runtime.wire.messages import Text

DOCUMENTS = (0, 1)  # of benchmarks.tasks; calibration takes others
UNIFORM = (0.9, 0.8, 0.7)
SELECTED = (64, 40)  # beside the default
BLOCK, RESAMPLES = 16, 4000

Steps = NDArray[numpy.float64]


class Run(NamedTuple):
    """What one case did, step by step over all texts: each [steps]."""

    kl: Steps  # nats
    rows: Steps  # moved per head
    selections: Steps  # share of heads that selected

    def point(self, steps: NDArray[numpy.int64] | slice) -> tuple[float, float]:
        """Mean rows and KL of some steps."""
        return float(self.rows[steps].mean()), float(self.kl[steps].mean())


@torch.inference_mode()
def decode(decoder: Decoder, config: CacheConfig, item: Item, steps: int) -> tuple[Tensor, Tensor]:
    """Logits [steps, vocab] after each token of the answer, and the counters [steps, 6] of all heads."""
    total = len(item.prompt) + steps
    engine = make_engine(decoder, config, 1, total)
    prefill(engine, 0, item.prompt, total)
    logits, tallies = [], [engine.cache.counters(0)]
    for length, token in enumerate(item.answer[:steps], len(item.prompt) + 1):
        engine.feed(0, token)
        logits.append(engine.forward(1, length))
        tallies.append(engine.cache.counters(0))
    return torch.cat(logits), torch.stack(tallies).diff(dim=0)


def run(decoder: Decoder, config: CacheConfig, items: list[Item], full: list[Tensor]) -> Run:
    heads = decoder.shape.layers * decoder.shape.kv_heads
    divergences, tallies = [], []
    for item, expected in zip(items, full, strict=True):
        logits, counters = decode(decoder, config, item, len(expected))
        p, q = expected.log_softmax(-1), logits.log_softmax(-1)
        divergences.append((p.exp() * (p - q)).sum(-1).double().cpu())
        tallies.append(counters.double().cpu() / heads)
    counters = torch.cat(tallies)
    return Run(torch.cat(divergences).numpy(), counters[:, 3].numpy(), counters[:, 1].numpy())


def beside(mine: Run, others: list[Run], steps: NDArray[numpy.int64] | slice) -> tuple[float, float]:
    """KL of a run, and of others at the rows that it moved: between their points the logarithm is linear."""
    rows, kl = mine.point(steps)
    points = sorted(other.point(steps) for other in others)
    logs = numpy.interp(rows, [point[0] for point in points], numpy.log([point[1] for point in points]))
    return kl, float(numpy.exp(logs))


def compare(case: str, against: str, mine: Run, others: list[Run]) -> list[Result]:
    """KL of a run beside others, and the interval of the ratio."""
    kl, reference = beside(mine, others, slice(None))
    random = numpy.random.default_rng(0)
    blocks = numpy.arange(len(mine.kl)).reshape(-1, BLOCK)
    ratios = []
    for _ in range(RESAMPLES):
        drawn = blocks[random.integers(len(blocks), size=len(blocks))].ravel()
        found, other = beside(mine, others, drawn)
        ratios.append(found / other)
    low, high = numpy.quantile(ratios, (0.025, 0.975))
    return [
        Result(case, f"KL, beside {against}", kl, "nats", reference, kl / reference),
        Result(case, f"ratio to {against}, 2.5 %", float(low), ""),
        Result(case, f"ratio to {against}, 97.5 %", float(high), ""),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gates", description=__doc__)
    parser.add_argument("profiles", type=Path, nargs="+", metavar="PROFILE.json")
    parser.add_argument("--model", default=ModelConfig().model)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--prompt", type=int, default=3500, help="tokens of a text before the first step")
    parser.add_argument(
        "--steps", type=int, default=256, help=f"of a text: a multiple of {BLOCK}, at most 256"
    )
    arguments = parser.parse_args()
    resolved = resolve(ModelConfig(model=arguments.model, device=arguments.device))
    decoder = load_decoder(resolved)
    tokenizer = Tokenizer(resolved.folder, decoder.vocab)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(Text(text), limit=10**7, continues=True)

    every = documents(encode)
    items = [make_item("text", every[number], arguments.prompt, number, encode) for number in DOCUMENTS]
    full = [decode(decoder, CacheConfig(attention="full"), item, arguments.steps)[0] for item in items]
    measure = partial(run, decoder, items=items, full=full)

    profiles = {path.stem: Profile.load(path) for path in arguments.profiles}
    none = CacheConfig(prefetch="off")
    configs = {"no gate": none}
    _, resident = none.sizes(arguments.prompt + arguments.steps, 1)[0]
    configs |= {f"no gate, k {k}": replace(none, select_k=k, resident=resident) for k in SELECTED}
    configs |= {f"uniform {gate}": replace(none, gate=gate) for gate in UNIFORM}
    configs |= {f"profile {name}": replace(none, profile=profile) for name, profile in profiles.items()}
    runs, results = {}, []
    for case, config in configs.items():
        runs[case] = measure(config)
        rows, kl = runs[case].point(slice(None))
        results += [
            Result(case, "KL(full || case)", kl, "nats"),
            Result(case, "fetched", rows, "rows per step and head"),
            Result(case, "selections", float(runs[case].selections.mean()), "per step and head"),
        ]
        print(f"{case}: KL {kl:.5f}, {rows:.2f} rows", file=sys.stderr, flush=True)
    uniform = [runs["no gate"], *(runs[f"uniform {gate}"] for gate in UNIFORM)]
    smaller = [runs["no gate"], *(runs[f"no gate, k {k}"] for k in SELECTED)]
    for name in profiles:
        mine = runs[f"profile {name}"]
        results += compare(f"profile {name}", "a uniform gate at equal rows", mine, uniform)
        results += compare(f"profile {name}", "no gate and a smaller k at equal rows", mine, smaller)
        results += compare(f"profile {name}", "no gate", mine, [runs["no gate"]])
    write("calibrate", results)


if __name__ == "__main__":
    main()
