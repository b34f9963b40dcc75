"""``clo reload``: restart a server's workers with the code that is on disk, while it serves."""

import argparse

from clo.commands.server import Parser, add_address
from clo.runtime.machine.control import ask
from clo.runtime.wire.messages import Reload, Reloaded, Working

_ABOUT = """\
Restart the workers of a server of this machine and user one after another, with the code that is on
disk now. Its KV store stays, and with it the KV of prompts; open requests go on."""


def parser() -> argparse.ArgumentParser:
    root = Parser(prog="clo reload", description=_ABOUT)
    add_address(root.add_argument_group("server"))
    return root


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    options = parser().parse_args(argv)
    said = -1

    def tell(news: Working) -> None:
        nonlocal said
        if news.total and news.done != said:
            said = news.done
            print(f"{news.done} of {news.total} workers are restarted", flush=True)

    reloaded = ask(options.server, Reload(), Reloaded, tell)
    processes = ", ".join(f"worker {number} is process {pid}" for number, pid in enumerate(reloaded.pids))
    print(f"reloaded: {processes}")
    return 0
