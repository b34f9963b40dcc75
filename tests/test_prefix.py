"""Reuse of prefixes: names of blocks, and prompts that begin with rows that are there already."""

from array import array
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from clo.gpu_worker.engine import Engine
from clo.gpu_worker.in_process import GREEDY, blocks_of, make_engine, wait_for
from clo.gpu_worker.model.decoder import load_decoder
from clo.kvstore.prefix import chain
from clo.runtime.client import Client
from clo.runtime.config import Attention, CacheConfig, ModelConfig
from clo.runtime.model.files import resolve
from tests.faults import WAIT_S, assert_serves
from tests.server import Server

PROMPT, STEPS = 1400, 24
ROOM = 2000  # tokens; a sequence that goes on decoding beside the others comes to more than they do


def test_a_block_has_a_name_that_depends_on_all_before_it() -> None:
    tokens = array("i", range(20))
    names = chain(tokens, 8)
    assert len(names) == 2, "whole blocks alone"
    assert chain(tokens[:16], 8) == names and chain(tokens[:15], 8) == names[:1]
    other = chain(array("i", [99, *tokens[1:]]), 8)
    assert not set(other) & set(names), "the second block is the same, but not what is before it"
    assert not set(chain(tokens, 8, b"another root")) & set(names)


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(4, 300, (PROMPT,), generator=generator).tolist()


def generate(engine: Engine, slot: int, blocks: list[int], prompt: list[int], cached: int) -> list[int]:
    """Greedy tokens of a slot whose first ``cached`` tokens are in its blocks already."""
    work = engine.prefill(slot, prompt, blocks, cached=cached)
    assert work.done == cached
    while (logits := work.advance()) is None:
        assert cached <= work.done <= work.total and work.remaining_flops > 0
    engine.activate(slot, len(prompt), GREEDY, 0)
    (first,) = wait_for(engine, engine.start([slot], logits))
    tokens = [first]
    for _ in range(STEPS):
        tokens += wait_for(engine, engine.step([slot], ROOM))
    return tokens


@pytest.mark.parametrize("attention", ["clo", "topk", "full"])
def test_a_prompt_that_begins_with_rows_that_are_there_gets_the_tokens_that_it_would_get(
    tiny_model: Path, prompt: list[int], attention: Attention
) -> None:
    """While the sequence that has computed them decodes, and after it has gone."""
    decoder = load_decoder(resolve(ModelConfig(model=str(tiny_model), device="cpu")))
    size = decoder.shape.block_tokens
    config = CacheConfig(attention=attention, select_k=8, resident=64)
    engine = make_engine(decoder, config, 3, ROOM)
    shared = PROMPT // size
    assert shared >= 2
    own = [blocks_of(engine, slot, ROOM) for slot in range(3)]
    expected = generate(engine, 0, own[0], prompt, 0)
    other = prompt[: size * shared] + [7] * 40
    fresh = generate(engine, 1, own[1], other, 0)
    engine.retire(1)
    for blocks, tokens, answer in ((own[2], prompt, expected), (own[1], other, fresh)):
        for held in range(1, shared + 1):
            cached = min(held * size, (len(tokens) - 32) // size * size)
            begin = own[0][: cached // size]
            found = generate(engine, 2, begin + blocks[len(begin) :], tokens, cached)
            assert found == answer, f"{cached} tokens were there"
            engine.retire(2)
    engine.retire(0)
    engine.check_integrity()


OPTIONS = ("--kv-size", "4MiB", "--max-num-seqs", "4", "--select-k", "16", "--resident", "64")


def test_a_server_computes_what_prompts_have_in_common_once(
    launch: Callable[..., AbstractContextManager[Server]], tiny_model: Path, prompt: list[int]
) -> None:
    """With the answers of one that keeps nothing; more prompts than the store holds leave nothing behind."""
    questions = [[*prompt, *([base] * 40)] for base in range(4, 7)]
    others = [[base, *prompt] for base in range(100, 104)]
    answers: dict[str, list[list[int]]] = {}
    for caching in ("on", "off"):
        line = ("--model", str(tiny_model), "--prefix-caching", caching, *OPTIONS)
        with launch(*line) as server, Client(server.address, timeout=WAIT_S) as client:
            asked = [
                client.generate(question, max_tokens=8, temperature=0.0, ignore_eos=True)
                for question in questions
            ]
            cached = [answer.usage.cached_tokens for answer in asked]
            assert cached == ([0, 1024, 1024] if caching == "on" else [0] * 3)
            asked += [
                client.generate(other, max_tokens=8, temperature=0.0, ignore_eos=True) for other in others
            ]
            again = client.generate(others[-1], max_tokens=8, temperature=0.0, ignore_eos=True)
            assert again.usage.cached_tokens == (1024 if caching == "on" else 0)
            for place in range(2):
                salted = client.generate(others[-1], max_tokens=1, temperature=0.0, cache_salt="of a tenant")
                assert salted.usage.cached_tokens == (1024 if caching == "on" and place else 0)
            (store,) = client.info().stores
            assert store.cached_tokens == (4 * 1024 if caching == "on" else 0)
            assert (store.kept_blocks > 0) == (caching == "on")
            answers[caching] = [answer.tokens for answer in [*asked, again]]
            assert_serves(server)
    assert answers["on"] == answers["off"]
