"""Speed on one GPU: ``python -m benchmarks.gpu [CASE ...]``; without a name, all cases.

Where a case does not say otherwise, weights, rows and queries are random, and the rows that a step fetches
are replayed at a stated rate, drawn anew for every step. Each figure stands beside a ceiling of the same run.
"""

import argparse
import gc
import sys
from types import ModuleType

import torch

from benchmarks.gpu import (
    ablation,
    gather,
    host,
    million,
    overlap,
    prefill,
    prefix,
    real,
    step,
    tensor_parallel,
    throughput,
    translation,
)
from benchmarks.gpu.machine import Machine
from benchmarks.result import write

CASES: dict[str, ModuleType] = {
    "gather": gather,
    "translation": translation,
    "step": step,
    "throughput": throughput,
    "ablation": ablation,
    "million": million,
    "overlap": overlap,
    "prefill": prefill,
    "prefix": prefix,
    "host": host,
    "real": real,
    "tp": tensor_parallel,
}
"""Each has ``ARENA_GIB`` and ``measure(machine) -> list[Result]``."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help="all where none is named")
    names = parser.parse_args().cases or list(CASES)
    machine = Machine(max(CASES[name].ARENA_GIB for name in names) * 2**30)
    for name in names:
        print(f"measuring {name}", file=sys.stderr)
        if results := CASES[name].measure(machine):
            write(f"gpu-{name}", [*machine.results(), *results])
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
