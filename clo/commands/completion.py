"""``clo completion bash|zsh|tcsh``: completions of all commands and options, for a shell to read."""

import argparse

import shtab

from clo import launch
from clo.commands import chat, reload, run, top
from clo.commands.server import Parser

_ABOUT = "Print completions for a shell: clo completion bash > ~/.local/share/bash-completion/completions/clo"


def parser() -> argparse.ArgumentParser:
    root = Parser(prog="clo completion", description=_ABOUT)
    root.add_argument("shell", choices=shtab.SUPPORTED_SHELLS, help="which shell")
    return root


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    options = parser().parse_args(argv)
    root = argparse.ArgumentParser(prog="clo")
    commands = root.add_subparsers()
    for made in (
        launch.parser("clo serve"),
        launch.parser("clo check"),
        chat.parser(),
        run.parser(),
        top.parser(),
        reload.parser(),
        parser(),
    ):
        name = made.prog.removeprefix("clo ")
        commands.add_parser(
            name, parents=[made], add_help=False, help=made.description, conflict_handler="resolve"
        )
    print(shtab.complete(root, options.shell))
    return 0
