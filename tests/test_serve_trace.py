"""``prefix/trace`` of ``benchmarks.serve``: what a trace of agents asks, and figures from real servers."""

from pathlib import Path

import pytest

from benchmarks.result import Result
from benchmarks.serve.agents import Agents
from benchmarks.serve.replay import measure_trace

SMALL = Agents(sessions=2, turns=3, first=1100, last=1800, shared=1030, think_s=0.1)


def test_a_trace_has_the_statistics_that_it_stands_for() -> None:
    trace = Agents()
    prompts, again = trace.prompts, trace.prompts[:-1]
    assert (len(prompts), prompts[0], prompts[-1]) == (33, 12 * 1024, 80 * 1024)
    assert sum(prompts) / (len(prompts) * trace.answer) == pytest.approx(131, rel=0.01)
    shared = (trace.sessions - 1) / trace.sessions * trace.shared
    assert (sum(again) + shared) / sum(prompts) == pytest.approx(0.94, abs=0.02)


def test_a_trace_is_decided_by_its_seed_and_sessions_differ_behind_what_they_share() -> None:
    assert SMALL.opening(0) == Agents(**vars(SMALL)).opening(0)
    assert SMALL.opening(0)[:1030] == SMALL.opening(1)[:1030]
    assert SMALL.opening(0)[1030:] != SMALL.opening(1)[1030:]
    assert SMALL.opening(0) != Agents(**{**vars(SMALL), "seed": 1}).opening(0)
    for turn in (1, 2):
        grown = len(SMALL.added(0, turn)) + SMALL.answer
        assert SMALL.prompts[turn] - SMALL.prompts[turn - 1] == grown


@pytest.mark.parametrize("wrong", [{"turns": 0}, {"shared": 1100}, {"last": 1101}, {"think_s": -1.0}])
def test_a_trace_that_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"trace|shared|turn"):
        Agents(**{**vars(SMALL), **wrong})


@pytest.mark.slow  # two servers, and answers from both
def test_a_trace_is_played_on_real_servers_with_reuse_and_without(tiny_model: Path) -> None:
    results: list[Result] = []
    options = f"--model {tiny_model} --kv-size 8MiB --select-k 16 --resident 64"
    note, *servers = measure_trace(SMALL, "cpu", results, options=options)
    found = {result.metric: result for result in results}
    total = SMALL.sessions * sum(SMALL.prompts)
    saved, computed = found["prefill tokens saved"].value, found["prefill tokens"]
    # blocks of 512 tokens: all but a session's first turn find what the turn before had
    assert saved >= SMALL.sessions * (SMALL.turns - 1) * 1024
    assert computed.value + saved == computed.reference == total
    assert found["requests"].value == SMALL.sessions * SMALL.turns
    assert 0 < found["TTFT p50"].value <= found["TTFT p99"].value
    assert "RANDOM TOKENS" in note and "caching on" in servers[0] and "caching off" in servers[1]
