"""The command ``clo``: ``clo serve`` starts a server, with the options of ``launch.py``."""

import sys

from clo import launch

USAGE = """\
usage: clo serve [options]     start a server; clo serve --help lists the options
       clo --version"""


def main() -> int:
    """Returns the exit code."""
    match sys.argv[1:]:
        case ["serve", *options]:
            return launch.main(options, "clo serve")
        case ["--version"]:
            from clo import __version__

            print(f"clo {__version__}")
            return 0
        case ["--help" | "-h"]:
            print(USAGE)
            return 0
        case _:
            print(
                f"error: {' '.join(sys.argv[1:2]) or 'no command'} is not a command.\n{USAGE}",
                file=sys.stderr,
            )
            return 2


if __name__ == "__main__":
    sys.exit(main())
