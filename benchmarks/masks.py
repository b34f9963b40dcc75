"""What a request with a grammar costs beside its steps: compiling, and a mask for each token.

    python -m benchmarks.masks

The default model's tokenizer (49,152 tokens), no model. A mask is timed from the token's arrival to the call
that publishes it, the way to a thread and back included: as long as that is shorter than a step, no step is
repeated.
"""

import asyncio
import json
import time
from statistics import median
from typing import Any

import numpy as np

from benchmarks.result import Result, write
from clo.gpu_worker.constraint import Constraint, Constraints
from clo.runtime.config import ModelConfig
from clo.runtime.grammars import Grammars
from clo.runtime.model.files import resolve
from clo.runtime.tokenizer import Tokenizer
from clo.runtime.wire.messages import StructuredOutputs, Text

_ROUNDS = 50
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0},
        "tags": {"type": "array", "items": {"type": "string"}},
        "address": {
            "type": "object",
            "properties": {
                "street": {"type": "string"},
                "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
                "country": {"enum": ["France", "Germany", "Italy", "Spain"]},
            },
            "required": ["street", "zip", "country"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "tags", "address"],
    "additionalProperties": False,
}
_ANSWER = json.dumps(
    {
        "name": "Ada Lovelace of London",
        "age": 36,
        "tags": ["mathematics and machines", "poetry, notes & numbers"],
        "address": {"street": "12 St. James's Square", "zip": "12345", "country": "France"},
    },
    indent=2,
)
_CASES: dict[str, tuple[StructuredOutputs, str]] = {
    "schema": (StructuredOutputs(json=PERSON), _ANSWER),
    "any JSON object": (StructuredOutputs(json_object=True), _ANSWER),
    "regex": (
        StructuredOutputs(regex=r"([A-Z][a-z]+ ){3,20}[a-z0-9]+@[a-z]+\.com"),
        "Dear Ada Write To ada42@clo.com",
    ),
}  # fmt: skip


async def _grammars() -> tuple[dict[str, str], float, float]:
    """The grammars, the seconds until the first one is checked, and the median of the others."""
    grammars, found, seconds = Grammars(), {}, []
    try:
        for name, (wanted, _) in _CASES.items():
            began = time.perf_counter()
            found[name] = await grammars.compile(wanted)
            seconds.append(time.perf_counter() - began)
    finally:
        await grammars.close()
    return found, seconds[0], median(seconds[1:])


def _follow(constraint: Constraint, tokens: list[int]) -> list[float]:
    """Seconds from each token to its mask."""
    seconds: list[float] = []

    def publish(mask: np.ndarray[Any, Any], length: int) -> None:
        seconds.append(time.perf_counter() - began)

    for length, token in enumerate(tokens):
        began = time.perf_counter()
        constraint.advance(token, length, publish)
        constraint.wait()
    if constraint.error:
        raise RuntimeError(constraint.error)
    return seconds


def main() -> None:
    model = resolve(ModelConfig(device="cpu"))
    grammars, first, later = asyncio.run(_grammars())
    began = time.perf_counter()
    constraints = Constraints(model.folder, model.vocab_size)
    results = [
        Result("tokenizer", "load", time.perf_counter() - began, "s"),
        Result("check", "first, with its process", first, "s"),
        Result("check", "later", 1e3 * later, "ms"),
    ]
    tokenizer = Tokenizer(model.folder, model.vocab_size)
    for name, (_, text) in _CASES.items():
        tokens = tokenizer.encode(Text(text), 10_000)
        began = time.perf_counter()
        constraint = constraints.begin(grammars[name])
        constraint.wait()
        compiled = time.perf_counter() - began
        times = _follow(constraint, tokens)
        for _ in range(_ROUNDS):
            constraint = constraints.begin(grammars[name])
            constraint.wait()
            times += _follow(constraint, tokens)
        results += [
            Result(name, "compile", 1e3 * compiled, "ms"),
            Result(name, "mask, median", 1e6 * median(times), "us"),
            Result(name, "mask, 99 %", 1e6 * float(np.percentile(times, 99)), "us"),
            Result(name, "mask, longest", 1e6 * max(times), "us"),
        ]
    write("masks", results)


if __name__ == "__main__":
    main()
