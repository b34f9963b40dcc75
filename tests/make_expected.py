"""``python -m tests.make_expected``: ask transformers once what tests compare with, and write it down.

The prompts are pieces of the LICENSE, real text that is the same everywhere. Beside the greedy tokens stands
the smallest distance of the two best logits at any of them: rounding does not bridge it.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
import transformers

from clo.runtime.config import DEFAULT_MODEL, ModelConfig
from clo.runtime.model.files import resolve
from clo.runtime.tokenizer import Tokenizer
from clo.runtime.wire.messages import Text
from tests.reference import load_transformers, transformers_greedy
from tests.server import ROOT

FILE = ROOT / "tests/expected/smollm2.json"
PIECES = ((0, 20), (300, 60), (600, 150), (900, 300), (1200, 600))  # first token, tokens
TOKENS = 32


@dataclass(frozen=True)
class Answer:
    """What transformers' own generate answers to a piece of the text."""

    start: int
    length: int
    tokens: list[int]
    margin: float  # least difference of the two best logits


@dataclass(frozen=True)
class Expected:
    """All answers, and what they were made of."""

    made_by: str
    torch: str
    transformers: str
    model: str
    folder: str  # its name says of which file of weights
    text: str
    answers: list[Answer]


def license_tokens(folder: Path) -> list[int]:
    """The LICENSE as the model's token ids."""
    tokenizer = Tokenizer(folder, vocab_size=2**31)
    return tokenizer.encode(Text((ROOT / "LICENSE").read_text()), limit=10**6)


def read() -> Expected:
    """What was written."""
    return msgspec.json.decode(FILE.read_bytes(), type=Expected)


def make() -> Expected:
    """Ask transformers."""
    folder = resolve(ModelConfig(device="cpu")).folder
    text, model = license_tokens(folder), load_transformers(str(folder))
    answers = []
    for start, length in PIECES:
        prompt = text[start : start + length]
        tokens = transformers_greedy(model, prompt, TOKENS)
        answers.append(Answer(start, length, tokens, round(margin(model, prompt, tokens), 4)))
    return Expected(
        made_by="python -m tests.make_expected",
        torch=torch.__version__,
        transformers=transformers.__version__,
        model=DEFAULT_MODEL,
        folder=folder.name,
        text="LICENSE",
        answers=answers,
    )


@torch.inference_mode()
def margin(model: Any, prompt: list[int], tokens: list[int]) -> float:
    logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    best = logits.topk(2).values
    return float((best[:, 0] - best[:, 1]).min())


def main() -> int:
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(asdict(make()), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
