"""The examples and the README's first program, run as a reader runs them, against the default model."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from examples.document import pytorch_readme
from examples.questions import ASKED
from tests.server import ROOT, Server

Launch = Callable[..., AbstractContextManager[Server]]

LIMIT_S = 600.0  # only a failure takes as long
PARIS = "The capital of France is Paris."


@pytest.fixture(scope="module")
def server(launch: Launch, smollm2: Path) -> Iterator[Server]:
    """With few rows on the worker, so that a file of 500 tokens is more than it holds."""
    options = ("--kv-size", "128MiB", "--max-model-len", "2048", "--max-num-seqs", "8")
    with launch(*options, "--select-k", "32", "--resident", "256", "--http", "0") as server:
        yield server


def run(*command: str) -> str:
    """What a Python program prints; ``AssertionError`` where it fails."""
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def readme(section: str, language: str) -> str:
    """The first block of a section in a language, or in none."""
    text = (ROOT / "README.md").read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    block = re.search(rf"```{language}\n(.*?)```", text, re.DOTALL)
    assert block is not None
    return block[1]


# What the README shows is run as it stands there, but for the ports.


def test_the_first_program_of_the_readme(server: Server) -> None:
    printed = run("-c", readme("Try it", "python").replace("tcp://127.0.0.1:5555", server.address))
    assert printed.startswith(f"{PARIS} stop ") and printed.count(PARIS) == 2


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_curl_of_the_readme(server: Server) -> None:
    command = readme("HTTP", "").replace("http://127.0.0.1:8000", server.url)
    assert command.startswith("curl ")
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == PARIS


def test_the_openai_client_of_the_readme(server: Server) -> None:
    program = readme("HTTP", "python")
    assert "OpenAI(" in program
    assert run("-c", program.replace("http://127.0.0.1:8000", server.url)) == PARIS


@pytest.mark.slow  # one of its answers may be as long as the context
def test_the_terminal_of_the_readme(server: Server, tmp_path: Path) -> None:
    """Its commands, but for those of which other tests take care: they end with Ctrl-C, download a model or
    take minutes."""
    (tmp_path / "report.txt").write_text("Our lamps are green. They cost 12 euros.\n")
    prompts = ["What is the capital of France?", "What is the capital of Italy?"]
    chats = [{"messages": [{"role": "user", "content": prompt}], "temperature": 0} for prompt in prompts]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    here = os.environ | {"CLO_SERVER": server.address, "PYTHONPATH": str(ROOT)}
    printed, left = {}, set()
    for line in readme("In a terminal", "").splitlines():
        command = line.partition("  ")[0].removeprefix("clo ")
        if command.split()[0] in ("top", "check", "bench"):
            left.add(command.split()[0])
            continue
        done = subprocess.run(
            ["sh", "-c", f'"$0" -m clo {command}', sys.executable], cwd=tmp_path, env=here,
            input="What do the lamps cost?\n", capture_output=True, text=True, timeout=LIMIT_S,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        printed[command.split()[0]] = done.stdout
    assert left == {"top", "check", "bench"} and set(printed) == {"chat", "run", "completion"}
    read = re.search(r"(\d+) tokens in, \d+ out", printed["chat"])
    assert read is not None and int(read[1]) > 50, "the document stood in front"
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert {answer["id"] for answer in answers} == {1, 2}
    assert PARIS in {answer["text"] for answer in answers}


@pytest.mark.slow
def test_the_demo(smollm2: Path, tmp_path: Path) -> None:
    """Its servers are those of ``clo serve``; it draws a picture where it is run."""
    done = subprocess.run(
        [sys.executable, "-m", "examples.demo", "--device", "cpu"], cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("$ clo serve ") == 2
    assert len(re.findall(r"CLO: right", done.stdout)) == ASKED
    assert (tmp_path / "demo.png").stat().st_size > 10_000


def test_openai(server: Server) -> None:
    whole, usage, streamed, person = run("-m", "examples.openai_client", f"{server.url}/v1").splitlines()
    assert whole == streamed == PARIS
    assert usage == "37 tokens in, 8 out"
    assert person.startswith("Person(name='Ada Lovelace', city='London', year=")


def test_a_long_file(server: Server, tmp_path: Path) -> None:
    document, file = pytorch_readme(), tmp_path / "readme.txt"
    at = document.index("supplied to build images")
    file.write_text(document[at - 900 : at + 900])
    question = "Which CUDA version does the Dockerfile support?"
    answer, _, *figures = run("-m", "examples.long_file", str(file), question, server.address).splitlines()
    assert "12.1" in answer
    for line, pattern in zip(
        figures,
        (
            r"\d+ tokens in, \d+ out",
            r"\d+\.\d MiB of keys and values in CPU memory",
            r"\d+\.\d MiB of rows and index on the worker",
            r"\d\d\.\d% of the selected rows were there already",
        ),
        strict=True,
    ):
        assert re.fullmatch(pattern, line)
    held = [float(line.split()[0]) for line in figures[1:3]]
    assert held[1] < 0.7 * held[0]


def test_a_batch_that_was_interrupted(server: Server, tmp_path: Path) -> None:
    reviews, answers = tmp_path / "reviews.txt", tmp_path / "answers.jsonl"
    reviews.write_text("Never asked again.\nI love this lamp. It works perfectly.\nTerrible. It broke.\n")
    kept = json.dumps({"id": 1, "text": '{"feeling": "good"}'})
    answers.write_text(f'{kept}\n{{"id": 2, "te')  # what a run leaves that was killed while it wrote
    counts = run("-m", "examples.batch", str(reviews), str(answers), server.address)
    first, *others = answers.read_text().splitlines()
    assert first == kept and {json.loads(line)["id"] for line in others} == {2, 3}
    assert sum(map(int, re.findall(r"(\d) (?:good|bad)", counts))) == 3


@pytest.mark.skipif(
    importlib.util.find_spec("langchain_openai") is None, reason="needs pip install langchain-openai"
)
def test_langchain(server: Server) -> None:
    chat, *others, city = run("-m", "examples.langchain_chat", f"{server.url}/v1").splitlines()
    assert chat == PARIS and city == "Answer(city='Paris')"
    assert "The capital of Japan is Tokyo." in others
