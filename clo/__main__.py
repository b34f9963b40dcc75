"""The command ``clo``: ``clo serve`` is ``launch.py``, the other commands are in ``clo.commands``."""

import importlib
import sys

from clo.runtime.wire.errors import CLOError, ConfigError

COMMANDS = {
    "serve": "start a server",
    "chat": "talk to a model, with documents in front",
    "run": "ask one thing, or all that a file holds",
    "top": "show what a server is doing, live",
    "reload": "restart a server's workers with the code on disk, while it serves",
    "check": "say what this machine can run, and what of a model fits",
    "bench": "measure a server as its clients see it",
    "completion": "print completions for a shell: clo completion bash",
}
USAGE = "\n".join(
    [
        "usage: clo COMMAND [options]     clo COMMAND --help lists them",
        "",
        *(f"  {name:<12}{text}" for name, text in COMMANDS.items()),
        "",
        "       clo --version",
    ]
)


def main() -> int:
    """Returns the exit code: 1 where something failed, 2 for a wrong option."""
    try:
        return _main()
    except BrokenPipeError:  # whoever reads has had enough
        sys.stderr.close()
        return 1


def _main() -> int:
    match sys.argv[1:]:
        case ["serve", *options]:
            from clo import launch

            return launch.main(options, "clo serve")
        case ["--version"]:
            from clo import __version__

            print(f"clo {__version__}")
            return 0
        case ["--help" | "-h"]:
            print(USAGE)
            return 0
        case [name, *options] if name in COMMANDS:
            return run(name, options)
        case []:
            print(USAGE, file=sys.stderr)
            return 2
    print(f"error: '{sys.argv[1]}' is not a command; clo --help lists them.", file=sys.stderr)
    return 2


def run(name: str, options: list[str]) -> int:
    """One of ``clo.commands``; what it raises on purpose is one sentence on stderr."""
    try:
        code: int = importlib.import_module(f"clo.commands.{name}").main(options)
        return code
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except CLOError as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
