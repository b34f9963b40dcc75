"""``python -m clo.replica PARENT [options]``: ``launch.py`` as the child of a replica.

The server dies with the process PARENT, however that ends.
"""

import sys

from clo.launch import main
from clo.runtime.machine.process import die_with_parent

if __name__ == "__main__":
    parent, *options = sys.argv[1:]
    die_with_parent(int(parent))
    sys.exit(main(options, "clo serve"))
