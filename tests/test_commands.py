"""The commands of ``clo`` beside ``serve``, on a real server and on files."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clo import Client
from clo.__main__ import COMMANDS
from clo.commands.check import fitting
from clo.commands.server import with_files
from clo.runtime.config import ModelConfig, ServerConfig
from clo.runtime.model.files import resolve
from clo.runtime.wire.errors import ConfigError
from tests.server import ROOT, Server, launch

LIMIT_S = 120.0
GREEDY = ("--temperature", "0", "--max-tokens", "8")


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[Server]:
    with launch("--model", str(tiny_model), "--kv-size", "64MiB", "--max-num-seqs", "4") as server:
        yield server


def clo(*arguments: str, text: str = "", server: Server | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "120"}
    if server is not None:
        environment["CLO_SERVER"] = server.address
    return subprocess.run(
        [sys.executable, "-m", "clo", *arguments],
        cwd=ROOT, env=environment, input=text, capture_output=True, text=True, timeout=LIMIT_S,
    )  # fmt: skip


def answer_to(server: Server, prompt: Any, **sampling: Any) -> str:
    with Client(server.address) as client:
        return client.generate(prompt, temperature=0, max_tokens=8, **sampling).text


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def lines_of(file: Path) -> dict[Any, dict[str, Any]]:
    answers = [json.loads(line) for line in file.read_text().splitlines()]
    found = {answer["id"]: answer for answer in answers}
    assert len(found) == len(answers), "an answer was written twice"
    return found


def test_one_prompt(server: Server, tmp_path: Path) -> None:
    """As a chat, as it is, from standard input, and behind a document."""
    document = tmp_path / "notes.txt"
    document.write_text("the moon is made of rock")
    behind = with_files([document], "what is it made of")
    assert behind == "notes.txt:\n\nthe moon is made of rock\n\nwhat is it made of"
    for arguments, text, prompt in (
        (("hello there",), "", chat("hello there")),
        (("hello there", "--raw"), "", "hello there"),
        (("-",), "from a pipe", chat("from a pipe")),
        (("what is it made of", "--file", str(document)), "", chat(behind)),
    ):
        done = clo("run", *arguments, *GREEDY, text=text, server=server)
        assert (done.returncode, done.stdout) == (0, answer_to(server, prompt) + "\n"), done.stderr


def test_a_file_of_prompts_goes_on_where_it_was_interrupted(server: Server, tmp_path: Path) -> None:
    prompts, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text(
        '{"id": "a", "prompt": "one"}\n\n{"prompt": [1, 2, 3], "max_tokens": 2}\n'
        '{"id": "c", "messages": [{"role": "user", "content": "two"}]}\n{"id": "d", "prompt": ""}\n'
    )
    # what a run leaves that was killed while it wrote its second answer
    output.write_text('{"id": "a", "text": "kept as it is"}\n{"id": 3, "te')
    done = clo("run", "--input", str(prompts), "--output", str(output), *GREEDY, server=server)
    answers = lines_of(output)
    assert set(answers) == {"a", 3, "c", "d"}
    assert answers["a"]["text"] == "kept as it is"
    assert answers[3]["usage"] == {"prompt_tokens": 3, "completion_tokens": 2}
    assert answers["c"]["text"] == answer_to(server, chat("two"))
    assert answers["d"]["error"]["code"] == "invalid_request"
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.endswith(f"error: 1 of 3 prompts failed; see {output}.\n")

    prompts.write_text(prompts.read_text().replace('"prompt": ""', '"prompt": "three"'))
    done = clo("run", "--input", str(prompts), "--output", str(output), *GREEDY, server=server)
    assert done.returncode == 0, done.stderr
    again = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(again) == 5, "only the one that failed was asked again"
    assert again[-1]["id"] == "d" and again[-1]["text"] == answer_to(server, "three")


WRONG_LINES = {
    "no JSON": ("{", "is not JSON"),
    "no object": ("[1]", "is not a JSON object"),
    "nothing to ask": ('{"id": 1}', "has to have either 'prompt' or 'messages'"),
    "two things to ask": ('{"prompt": "a", "messages": []}', "has to have either 'prompt' or 'messages'"),
    "an id that is none": ('{"id": [], "prompt": "a"}', "has an 'id' that is neither a text nor a number"),
    "unknown parameter": ('{"prompt": "a", "beams": 3}', "has 'beams', which is no sampling parameter"),
}


@pytest.mark.parametrize(("line", "expected"), WRONG_LINES.values(), ids=WRONG_LINES)
def test_a_wrong_line_is_named_before_anything_is_asked(line: str, expected: str, tmp_path: Path) -> None:
    prompts = tmp_path / "in.jsonl"
    prompts.write_text('{"prompt": "fine"}\n' + line + "\n")
    done = clo("run", "--input", str(prompts), "--output", str(tmp_path / "out.jsonl"))
    assert done.returncode == 1 and not (tmp_path / "out.jsonl").exists()
    assert done.stderr.startswith(f"error: Line 2 of {prompts} {expected}") and done.stderr.count("\n") == 1


def test_a_line_may_ask_for_what_the_client_takes(server: Server, tmp_path: Path) -> None:
    prompts, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    properties = {"a": {"enum": [1]}}
    schema = {"type": "object", "properties": properties, "required": ["a"], "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    lines = [
        {"id": "s", "prompt": "a", "max_tokens": 100, "response_format": wanted},
        {"id": "b", "prompt": "a", "max_tokens": 3, "logit_bias": {"7": 100}, "echo": True},
    ]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    done = clo("run", "--input", str(prompts), "--output", str(output), *GREEDY, server=server)
    assert done.returncode == 0, done.stderr
    answers = lines_of(output)
    assert json.loads(answers["s"]["text"]) == {"a": 1}
    assert answers["b"]["text"].startswith("a")


def test_ids_that_occur_twice(tmp_path: Path) -> None:
    prompts = tmp_path / "in.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"id": 1, "prompt": "b"}\n')
    done = clo("run", "--input", str(prompts), "--output", str(tmp_path / "out.jsonl"))
    assert done.returncode == 2 and done.stderr.startswith("error: An id occurs twice in ")


def test_a_chat_remembers_and_forgets(server: Server, tmp_path: Path) -> None:
    document = tmp_path / "notes.txt"
    document.write_text("rock")
    typed = [
        "first",
        "second",
        "/undo",
        f"/file {document}",
        "third",
        "/clear",
        "/nonsense",
        "fourth",
        "/exit",
    ]
    done = clo("chat", *GREEDY, text="\n".join(typed) + "\n", server=server)
    assert done.returncode == 0, done.stderr
    first = answer_to(server, chat("first"))
    history = [*chat("first"), {"role": "assistant", "content": first}]
    second = answer_to(server, [*history, *chat("second")])
    third = answer_to(server, [*history, *chat("notes.txt:\n\nrock\n\nthird")])
    fourth = answer_to(server, chat("fourth"))
    place = 0
    for expected in (first, second, third, "/nonsense is no command", fourth):
        # a terminal is spared bells and the like
        for line in expected.translate(dict.fromkeys(b"\x07\x08\x0b\x0c\r")).strip().splitlines():
            place = done.stdout.find(line.strip(), place)
            assert place >= 0, f"{line!r} is missing in {done.stdout!r}"


def test_an_error_does_not_end_a_chat(server: Server) -> None:
    long = "a b " * 5000  # more than the model takes
    done = clo("chat", *GREEDY, text=f"{long}\n/file /nowhere\nhello\n", server=server)
    assert done.returncode == 0, done.stderr
    assert "error: " in done.stdout and "/nowhere cannot be read" in done.stdout.replace("\n", " ")
    assert " tokens in, " in done.stdout, "the last message was answered"


def test_top_shows_a_server_once(server: Server) -> None:
    with Client(server.address) as client:
        client.generate("warm", max_tokens=4)
        info = client.info()
    done = clo("top", "--once", server=server)
    assert done.returncode == 0, done.stderr
    assert f"up to {info.max_model_len} tokens a request" in done.stdout
    assert info.stores[0].store in done.stdout and "64.0 MiB" in done.stdout


def test_check_says_what_fits(tiny_model: Path) -> None:
    done = clo("check", "--device", "cpu", "--model", str(tiny_model), "--kv-size", "64MiB")
    assert done.returncode == 0, done.stderr
    assert "4 layers of 2 KV heads" in done.stdout
    assert "--max-num-seqs auto: 8 (" in done.stdout
    assert "With --tensor-parallel-size 2, " in done.stdout and "-size 3, " not in done.stdout
    assert done.stdout.endswith("A server with these options should start.\n")
    too_large = clo("check", "--device", "cpu", "--model", str(tiny_model), "--kv-size", "9TiB")
    assert too_large.returncode == 1
    assert too_large.stderr.startswith("error: The KV cache wants 9.0 TiB of memory but only ")


def test_check_counts_the_gpus_of_all_workers(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ModelConfig(model=str(tiny_model), device="cpu")
    on_gpu = replace(resolve(asked), device="cuda", gpu_nodes=(0, 0, 0))
    monkeypatch.setattr("clo.runtime.model.files.resolve", lambda model: on_gpu)
    monkeypatch.setattr("clo.gpu_worker.startup.check_model", lambda model, cache, ranks: cache)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (2**34, 2**34))
    config = ServerConfig(model=asked, kv_size=2**24)
    others = {
        workers: re.findall(
            r"With --tensor-parallel-size (\d+)", "\n".join(fitting(replace(config, workers=workers)))
        )
        for workers in (1, 2)
    }
    assert others == {1: ["2"], 2: []}
    with pytest.raises(
        ConfigError, match=r"--workers 2 with --tensor-parallel-size 2 takes 4 GPUs, .* sees 3"
    ):
        next(fitting(replace(config, workers=2, tensor_parallel_size=2)))


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completions(shell: str) -> None:
    done = clo("completion", shell)
    assert done.returncode == 0 and "--max-num-seqs" in done.stdout and "--concurrency" in done.stdout
    if shell == "bash":
        assert subprocess.run(["bash", "-n"], input=done.stdout, text=True).returncode == 0


def test_every_command_is_there_and_explains_itself() -> None:
    usage = clo("--help").stdout
    for name, text in COMMANDS.items():
        assert f"  {name:<12}{text}\n" in usage
        done = clo(name, "--help")
        assert done.returncode == 0 and done.stdout.startswith("usage: "), f"{name}: {done.stderr}"


WRONG = {
    "unknown command": ("frob", 2, "'frob' is not a command; clo --help lists them."),
    "unknown option": ("chat --frob", 2, "unrecognized arguments: --frob; see 'clo chat --help'."),
    "no prompt": ("run", 2, "There is no prompt; give one, or - for standard input, or --input."),
    "no output": ("run --input x", 2, "--input goes with --output, and without a prompt or --file."),
    "no requests": (
        "run --input x --output y --concurrency 0",
        2,
        "--concurrency is 0; it must be at least 1.",
    ),
    "no such file": ("run a --file /nowhere", 2, "/nowhere cannot be read (No such file or directory)."),
    "no server": ("run a --server tcp://127.0.0.1:9", 1, "tcp://127.0.0.1:9"),
    "no address": ("top --server nowhere", 1, "nowhere"),
    "no time": ("top --every 0", 2, "--every is 0; it must be above 0."),
}


@pytest.mark.parametrize(("line", "code", "expected"), WRONG.values(), ids=WRONG)
def test_errors_are_one_sentence(line: str, code: int, expected: str) -> None:
    done = clo(*line.split())
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("error: ") and expected in done.stderr and done.stderr.count("\n") == 1


def test_a_document_that_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "picture"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="picture is not text in UTF-8"):
        with_files([file], "")
