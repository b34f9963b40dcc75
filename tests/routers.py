"""What the tests of the router share: requests, an event loop for each test, and fixtures.

A file has the fixtures that it assigns to names of its own. Imported, they would look to ruff as if nobody
used them, and in conftest.py ``quiet`` would be for every test.
"""

import asyncio
import functools
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, ParamSpec

import pytest

from clo.runtime import router as router_module
from clo.runtime.config import ResolvedModel, ServerConfig
from clo.runtime.router import Router
from clo.runtime.tokenizer import Tokenizer
from clo.runtime.wire.messages import CacheStats, Generate, SamplingParams, Text, Tokens
from tests.conftest import TINY, VOCABULARY
from tests.faults import WAIT_S
from tests.store import KEY, new_endpoint

MODEL_LENGTH = 100
STATS = CacheStats(*[*range(1, 13), 0])
SEVEN = SamplingParams(max_tokens=7)

P = ParamSpec("P")


def in_loop(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run a test in an event loop of its own."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 2 * WAIT_S))

    return run


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is said only because time has passed."""
    monkeypatch.setattr(router_module, "QUIET_S", 1e9)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Iterator[Tokenizer]:
    """Loaded once for all routers of a file."""
    loaded = Tokenizer(tiny_model, VOCABULARY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(router_module, "Tokenizer", lambda *_: loaded)
        yield loaded


@pytest.fixture
def model(tiny_model: Path, tokenizer: Tokenizer) -> ResolvedModel:
    return model_in(tiny_model)


def model_in(folder: Path) -> ResolvedModel:
    return ResolvedModel("tiny", str(folder), TINY, MODEL_LENGTH, "float32", "cpu", "auto", 0)


def router_of(port: int, folder: Path, host: str = "127.0.0.1") -> Router:
    return Router(ServerConfig(host=host, port=port), model_in(folder), new_endpoint(), KEY)


def ask(name: str = "r", tokens: int = 5, sampling: SamplingParams = SEVEN) -> Generate:
    return Generate(name, Tokens(list(range(1, tokens + 1))), sampling)


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """A token for each character."""
    return [tokenizer.encode(Text(character), 10)[0] for character in text]
