"""The examples and the README's first program, run as a reader runs them, against the default model."""

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from examples.document import pytorch_readme
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


def test_the_first_program_of_the_readme(server: Server) -> None:
    """As it stands there, but for the port."""
    section = (ROOT / "README.md").read_text().partition("\n## Try it\n")[2].partition("\n## ")[0]
    program = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert program is not None
    printed = run("-c", program[1].replace("tcp://127.0.0.1:5555", server.address))
    assert printed.startswith(f"{PARIS} stop ") and printed.count(PARIS) == 2


def test_openai(server: Server) -> None:
    whole, usage, streamed, person = run("-m", "examples.openai_client", f"{server.url}/v1").splitlines()
    assert whole == streamed == PARIS
    assert usage == "37 tokens in, 8 out"
    assert person.startswith("Person(name='Ada Lovelace', city='London', year=")


def test_a_long_file(server: Server, tmp_path: Path) -> None:
    readme, file = pytorch_readme(), tmp_path / "readme.txt"
    at = readme.index("supplied to build images")
    file.write_text(readme[at - 900 : at + 900])
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
