"""``clo chat``: talk to a model in the terminal."""

import argparse
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from clo.commands.server import Parser, add_sampling, add_server, client, sampling_of, with_files
from clo.runtime.client import Client, Result
from clo.runtime.wire.errors import CLOError, ServerUnreachable, Unauthorized
from clo.runtime.wire.messages import Progress

HELP = """\
/file PATH   put a document in front of the next message
/clear       forget the conversation
/undo        forget the last question and its answer
/help        this list
/exit        leave, as Ctrl-D does; Ctrl-C ends an answer"""


@dataclass
class Conversation:
    """What was said, and the documents that go in front of the next message."""

    system: str | None
    files: list[Path] = field(default_factory=list)
    turns: list[dict[str, str]] = field(default_factory=list)

    def asked(self, text: str) -> list[dict[str, str]]:
        """The messages with a new one of the user. Raises ``ConfigError`` where a document cannot be read."""
        head = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*head, *self.turns, {"role": "user", "content": with_files(self.files, text)}]

    def answered(self, asked: list[dict[str, str]], answer: str) -> None:
        self.turns = [turn for turn in asked if turn["role"] != "system"]
        self.turns.append({"role": "assistant", "content": answer})
        self.files = []


def parser() -> argparse.ArgumentParser:
    root = Parser(
        prog="clo chat", description="Talk to a model, with documents in front of the first message."
    )
    root.add_argument(
        "--file", type=Path, action="append", default=[], help="a document in front; may be repeated (none)"
    )
    root.add_argument("--system", metavar="TEXT", help="what the model is told first (nothing)")
    add_sampling(root)
    add_server(root)
    return root


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    options = parser().parse_args(argv)
    talk = Conversation(options.system, list(options.file))
    with_files(talk.files, "")  # says at once what cannot be read
    console = Console(highlight=False)
    if sys.stdin.isatty():
        import readline  # noqa: F401  # editing and history of what is typed

    with client(options) as connected:
        info = connected.info()
        console.print(f"[bold]{info.model}[/bold], up to {info.max_model_len} tokens; /help lists commands.")
        while True:
            try:
                text = input("> ").strip()
            except (EOFError, KeyboardInterrupt):
                console.print()
                return 0
            if text == "/exit":
                return 0
            if text.startswith("/"):
                _command(talk, text, console)
            elif text:
                _turn(talk, text, connected, options, console)


def _command(talk: Conversation, text: str, console: Console) -> None:
    name, _, rest = text.partition(" ")
    match name:
        case "/clear":
            talk.turns, talk.files = [], []
        case "/undo":
            del talk.turns[-2:]
        case "/file" if rest:
            file = Path(rest).expanduser()
            try:
                with_files([file], "")
            except CLOError as error:
                console.print(f"error: {error}", style="red", markup=False)
            else:
                talk.files.append(file)
        case "/help":
            console.print(HELP, markup=False)
        case _:
            console.print(f"{text} is no command; /help lists them.", style="red", markup=False)


def _turn(
    talk: Conversation, text: str, connected: Client, options: argparse.Namespace, console: Console
) -> None:
    """One question and its answer. An error ends the answer, and the program only where no server is left."""
    try:
        asked = talk.asked(text)
        answer = _stream(asked, connected, options, console)
    except (ServerUnreachable, Unauthorized):
        raise
    except CLOError as error:
        console.print(f"error: {error}", style="red", markup=False)
    else:
        talk.answered(asked, answer)


def _stream(
    asked: list[dict[str, str]], connected: Client, options: argparse.Namespace, console: Console
) -> str:
    """Print an answer as it comes; returns what there is of it, also where Ctrl-C has ended it."""
    began, first, answer = time.monotonic(), 0.0, ""
    with console.status("waiting") as status:

        def show(progress: Progress) -> None:
            part = f" {progress.done} of {progress.total} tokens" if progress.stage == "prefill" else ""
            status.update(f"{progress.stage}{part}")

        stream = connected.stream(asked, on_progress=show, **sampling_of(options))
        try:
            for chunk in stream:
                if not answer:
                    status.stop()
                    first = time.monotonic() - began
                answer += chunk.text
                console.print(chunk.text, end="", markup=False, soft_wrap=True)
        except KeyboardInterrupt:
            stream.cancel()
            console.print(" [dim](ended)[/dim]")
            return answer
    console.print()
    console.print(_summary(stream.result, first, time.monotonic() - began), style="dim", markup=False)
    return answer


def _summary(result: Result, first: float, total: float) -> str:
    tokens = result.usage.completion_tokens
    rate = f", {(tokens - 1) / (total - first):.1f} tokens/s" if tokens > 1 and total > first else ""
    rows = f", {result.cache.hit_rate:.0%} of rows at hand" if result.cache.selected_rows else ""
    return f"{result.usage.prompt_tokens} tokens in, {tokens} out, {first:.2f} s to the first{rate}{rows}"
