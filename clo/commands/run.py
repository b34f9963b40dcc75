"""``clo run``: one prompt, or a file of prompts, to a server.

A file of prompts has one JSON object a line: ``prompt`` (text or token ids) or ``messages`` (a chat), and
where wanted ``id``, ``response_format`` and fields of ``SamplingParams``, which go before the options. Each
answer is written as one line with the same ``id`` as soon as it is there, in any order. A run that was
interrupted goes on where it ended: prompts whose answers are in the output already are not asked again.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from clo.commands.server import (
    Parser,
    add_sampling,
    add_server,
    async_client,
    bad_line,
    client,
    read_text,
    sampling_of,
    with_files,
)
from clo.runtime.client import AsyncClient
from clo.runtime.wire.errors import CLOError, ConfigError, ServerUnreachable, Unauthorized
from clo.runtime.wire.messages import SamplingParams

_SAMPLING = frozenset((*SamplingParams.__struct_fields__, "response_format"))


@dataclass(frozen=True)
class _Task:
    """One line of a file of prompts."""

    id: str | int
    prompt: Any
    sampling: dict[str, Any]


def parser() -> argparse.ArgumentParser:
    root = Parser(
        prog="clo run",
        description="Ask a server one thing and print the answer, or ask it all that a file holds.",
        epilog="A file of prompts has one JSON object a line, with 'prompt' or 'messages', and where wanted "
        "'id' and sampling parameters. The same command again goes on where an interrupted one ended.",
    )
    root.add_argument("prompt", nargs="?", help="a text; - reads it from standard input")
    root.add_argument(
        "--file", type=Path, action="append", default=[], help="a document in front; may be repeated (none)"
    )
    root.add_argument("--raw", action="store_true", help="do not render the prompt as a chat (rendered)")
    batch = root.add_argument_group("many prompts")
    batch.add_argument(
        "--input", type=Path, metavar="JSONL", help="a file of prompts, in place of one (none)"
    )
    batch.add_argument("--output", type=Path, metavar="JSONL", help="where answers go, with --input (none)")
    batch.add_argument(
        "--concurrency", type=int, default=64, metavar="N", help="requests open at a time (64)"
    )
    add_sampling(root)
    add_server(root)
    return root


def main(argv: list[str]) -> int:
    """Returns the exit code: 0, or 1 where an answer is an error."""
    options = parser().parse_args(argv)
    if options.input is None:
        return _one(options)
    if options.output is None or options.prompt is not None or options.file:
        raise ConfigError("--input goes with --output, and without a prompt or --file.")
    if options.concurrency < 1:
        raise ConfigError(f"--concurrency is {options.concurrency}; it must be at least 1.")
    return asyncio.run(_batch(options))


def _one(options: argparse.Namespace) -> int:
    text = sys.stdin.read() if options.prompt == "-" else options.prompt
    if text is None:
        raise ConfigError("There is no prompt; give one, or - for standard input, or --input.")
    text = with_files(options.file, text)
    prompt = text if options.raw else [{"role": "user", "content": text}]
    with client(options) as connected:
        for chunk in connected.stream(prompt, **sampling_of(options)):
            print(chunk.text, end="", flush=True)
    print()
    return 0


async def _batch(options: argparse.Namespace) -> int:
    tasks = list(_tasks(options.input, sampling_of(options)))
    if len({str(task.id) for task in tasks}) < len(tasks):
        raise ConfigError(f"An id occurs twice in {options.input}; answers could not be told apart.")
    done = _answered(options.output)
    left = [task for task in tasks if str(task.id) not in done]
    failed = 0
    with (
        _appended(options.output) as output,
        tqdm(total=len(tasks), initial=len(tasks) - len(left), unit="prompt") as progress,
    ):
        async with async_client(options) as connected:
            waiting = iter(left)

            async def work() -> None:
                nonlocal failed
                for task in waiting:
                    answer = await _ask(connected, task)
                    failed += "error" in answer
                    output.write(json.dumps(answer, ensure_ascii=False) + "\n")
                    output.flush()
                    progress.update()

            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(options.concurrency, len(left))):
                        group.create_task(work())
            except* CLOError as errors:
                raise errors.exceptions[0] from None
    if failed:
        print(f"error: {failed} of {len(left)} prompts failed; see {options.output}.", file=sys.stderr)
    return int(failed > 0)


async def _ask(connected: AsyncClient, task: _Task) -> dict[str, Any]:
    """A line of the output. Raises ``ServerUnreachable`` and ``Unauthorized``, which all would meet."""
    try:
        result = await connected.generate(task.prompt, **task.sampling)
    except (ServerUnreachable, Unauthorized):
        raise
    except CLOError as error:
        return {"id": task.id, "error": {"code": error.code, "message": str(error)}}
    usage = {"prompt_tokens": result.usage.prompt_tokens, "completion_tokens": result.usage.completion_tokens}
    return {"id": task.id, "text": result.text, "finish_reason": result.finish_reason, "usage": usage}


def _tasks(file: Path, sampling: dict[str, Any]) -> Iterator[_Task]:
    for number, line in enumerate(read_text(file).splitlines(), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise bad_line(file, number, f"is not JSON ({error.msg})") from None
        if not isinstance(fields, dict):
            raise bad_line(file, number, "is not a JSON object")
        if ("prompt" in fields) == ("messages" in fields):
            raise bad_line(file, number, "has to have either 'prompt' or 'messages'")
        name = fields.pop("id", number)
        if not isinstance(name, str | int):
            raise bad_line(file, number, "has an 'id' that is neither a text nor a number")
        prompt = fields.pop("prompt") if "prompt" in fields else fields.pop("messages")
        if unknown := fields.keys() - _SAMPLING:
            raise bad_line(file, number, f"has '{min(unknown)}', which is no sampling parameter")
        yield _Task(name, prompt, sampling | fields)


def _answered(output: Path) -> set[str]:
    """Ids of the answers in the output that are no errors; those are asked again."""
    if not output.exists():
        return set()
    found = set()
    for line in read_text(output).splitlines():
        try:
            answer = json.loads(line)
        except json.JSONDecodeError:
            continue  # it was being written
        if isinstance(answer, dict) and "id" in answer and "error" not in answer:
            found.add(str(answer["id"]))
    return found


def _appended(output: Path) -> TextIO:
    """The output, open behind its last whole line."""
    try:
        with output.open("ab+") as file:
            size = file.tell()
            back = min(size, 2**20)
            file.seek(size - back)
            last = file.read().rfind(b"\n")
            if size and (last >= 0 or back == size):
                file.truncate(size - back + last + 1)
        return output.open("a", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{output} cannot be written ({error.strerror}).") from None
