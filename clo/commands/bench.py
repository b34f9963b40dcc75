"""``clo bench``: what ``python -m benchmarks.serve`` measures, time to first token, gaps and throughput."""

import importlib.util
import runpy
import sys

from clo.runtime.wire.errors import ConfigError


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    if importlib.util.find_spec("benchmarks") is None:
        raise ConfigError(
            "Benchmarks are in CLO's repository and not in its package; run this in a checkout."
        )
    sys.argv = ["clo bench", *argv]
    runpy.run_module("benchmarks.serve", run_name="__main__")
    return 0
