"""``python -m benchmarks.serve.launcher PARENT WORKER [options]``: ``launch.py`` for a benchmark.

It dies with the process PARENT, however that ends, and its workers run the module WORKER.
"""

import sys

from clo.launch import main
from clo.runtime.machine.process import die_with_parent

if __name__ == "__main__":
    parent, worker, *options = sys.argv[1:]
    die_with_parent(int(parent))
    sys.exit(main(options, worker=worker))
