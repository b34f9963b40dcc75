"""The scheduler alone: whole requests, what ends or shapes their answers, and what is reported of them."""

import random
from collections.abc import Callable
from itertools import count

import pytest

from clo.gpu_worker.outputs import StepHandle
from clo.gpu_worker.scheduler import PROGRESS_SECONDS
from clo.gpu_worker.sequence import State
from clo.runtime.wire.errors import PromptTooLong
from clo.runtime.wire.messages import (
    Allocate,
    Commit,
    Done,
    Free,
    Grow,
    Prefilled,
    PromptScored,
    Refused,
    Stepped,
)
from tests.fake_engine import BLOCK_TOKENS, MAX_TOKENS, SLOTS
from tests.scheduler_world import BLOCKS, END, World, done


def sizes(world: World) -> list[tuple[int, int]]:
    """The sequences for which blocks were asked, and how many."""
    return [(message.sequence, message.blocks) for message in world.asked if isinstance(message, Allocate)]


# ------------------------------------------------------------------------------------ whole requests


def test_a_request_from_its_prompt_to_its_last_token() -> None:
    world = World()
    number = world.add(prompt=6, max_tokens=5, first=10)
    assert sizes(world) == [(number, 3)], "blocks for the prompt and all that may follow"
    assert (world.scheduler.waiting, world.scheduler.running, world.scheduler.busy) == (1, 0, False)
    world.serve()
    assert done(world, number) == ("length", [11, 12, 13, 14, 15])
    end = world.end(number)
    assert isinstance(end, Done)
    assert (end.cache.steps, end.cache.kv_bytes) == (4, 10), "one step for each token but the first"
    assert Prefilled(number, 6, 6) in world.reports
    assert world.engine.activated == [(world.runs[number].sampling, world.runs[number].seed)]
    assert world.freed == [number]
    assert (world.scheduler.steps, world.scheduler.generated) == (4, 5)
    world.check_over()


@pytest.mark.parametrize("group", [None, "others"])
@pytest.mark.parametrize("prompt", [1, 3, 4, 5])
def test_commits_say_what_stands_in_the_blocks(prompt: int, group: str | None) -> None:
    """The prompt at once, then each block when it is full, or one step later where other ranks store rows of
    it; the store holds the tokens in order."""
    world, behind = World(group=group), int(group is not None)
    number = world.add(prompt, max_tokens=13, first=10)
    held: list[int] = []
    ends: list[int] = []  # of the commits
    world.store_works()
    for _ in range(30):
        world.store_answers()
        world.engine.finish()
        world.scheduler.advance()
        world.asked[:] = [message for message in world.asked if not isinstance(message, Free)]
        for message in world.asked:
            if isinstance(message, Grow):
                continue
            assert isinstance(message, Commit) and message.tokens
            ends.append(message.start + len(message.tokens))
        world.store_works()
        known = [10] * prompt + world.tokens(number)
        held = [token for block in world.pool.describe(0, number)[1] for token in block]
        assert held == known[: len(held)]
        assert not world.tokens(number) or len(held) > len(known) - 1 - BLOCK_TOKENS - behind
    assert len(world.tokens(number)) == 13 and world.end(number) is not None
    assert held[:prompt] == [10] * prompt and len(held) > prompt
    full = [end for end in range(prompt + 1, prompt + 13 - behind) if end % BLOCK_TOKENS == 0]
    assert ends == [prompt, *full]


@pytest.mark.parametrize("answered", [1, 3, 4])
def test_an_answer_that_another_worker_began_goes_on(answered: int) -> None:
    """All that was asked is of the whole answer: its length, forced tokens, what its penalties count, and its
    grammar."""
    world = World()
    known, rest = tuple(range(11, 11 + answered)), list(range(11 + answered, 16))
    plain = world.add(prompt=6, max_tokens=5, first=10, answer=known)
    forced = world.add(prompt=6, max_tokens=5, first=10, answer=known, forced=[11, 12, 13, 14, 90])
    counted = world.add(prompt=6, max_tokens=5, first=10, answer=known, presence_penalty=0.5)
    assert sizes(world) == [(number, 3) for number in (plain, forced, counted)], "no more blocks than before"
    world.serve()
    assert done(world, plain) == done(world, counted) == ("length", rest)
    assert done(world, forced) == ("length", [11, 12, 13, 14, 90][answered:])
    assert [each[1:] for each in world.engine.adjusted] == [([10] * 6, [END], [*known])]
    grammar = world.add(6, 9, first=10, answer=known, grammar="11 12 13 14 15")
    world.serve()
    assert done(world, grammar) == ("stop", rest)
    complete = world.add(6, 9, first=10, answer=known, grammar=" ".join(map(str, known)))
    world.serve()
    assert done(world, complete) == ("stop", []), "nothing was left but to say so"
    world.check_over()


def test_max_tokens_of_one_takes_no_step() -> None:
    world = World()
    number = world.add(prompt=3, max_tokens=1)
    world.serve()
    assert done(world, number) == ("length", [1])
    assert "step" not in world.engine.log
    world.check_over()


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_an_end_token_stops_with_a_step_on_its_way(ignore_eos: bool) -> None:
    """What that step brings is dropped, and the slot is free only when it is over."""
    world = World()
    number = world.add(prompt=3, max_tokens=6, first=END - 3, ignore_eos=ignore_eos)
    world.serve()
    tokens = list(range(END - 2, END + 4))
    assert done(world, number) == (("length", tokens) if ignore_eos else ("stop", tokens[:3]))
    world.check_over()


def test_an_end_token_as_the_first_and_as_the_last() -> None:
    world = World()
    first = world.add(prompt=3, max_tokens=6, first=END - 1)
    last = world.add(prompt=3, max_tokens=3, first=END - 3)
    world.serve()
    assert done(world, first) == ("stop", [END])
    assert done(world, last) == ("stop", [END - 2, END - 1, END])
    world.check_over()


def test_forced_tokens_are_fed_before_the_step_that_reads_them() -> None:
    """They are reported in place of the drawn ones, with what the model thought of them; no end token ends
    them."""
    world = World()
    forced = [50, END, 7, 7, 90]
    number = world.add(prompt=5, max_tokens=5, first=10, forced=forced, logprobs=2)
    world.serve()
    assert done(world, number) == ("length", forced)
    steps = [step for report in world.reports if isinstance(report, Stepped) for step in report.steps]
    predicted = [step.logprob.logprob for step in steps if step.logprob is not None]
    assert predicted == [11, 51, END + 1, 8, 8], "each follows from the forced token before"
    assert all(step.logprob is not None and step.logprob.token == step.token for step in steps)
    assert all(step.logprob is not None and len(step.logprob.top) == 2 for step in steps)
    world.check_over()


def test_logprobs_are_those_of_their_own_step() -> None:
    """The logits' buffer is overwritten by the step that is launched before the tokens arrive."""
    world = World()
    asked = world.add(prompt=2, max_tokens=8, first=100, logprobs=0)
    other = world.add(prompt=2, max_tokens=8, first=200)
    world.serve()
    steps = [step for report in world.reports if isinstance(report, Stepped) for step in report.steps]
    assert [step.logprob.logprob for step in steps if step.logprob is not None] == list(range(101, 109))
    assert all(step.logprob is None for step in steps if step.sequence == other)
    assert done(world, asked)[1] == list(range(101, 109))


@pytest.mark.parametrize("prompt", [0, MAX_TOKENS - 4, 10 * MAX_TOKENS])
def test_a_request_that_can_never_run_is_refused_at_once(prompt: int) -> None:
    world = World()
    number = world.add(prompt, max_tokens=5)
    end = world.end(number)
    text = f"{prompt + 5} tokens with the prompt; the longest sequence is {MAX_TOKENS}."
    assert end == Refused(number, PromptTooLong.code, text)
    assert world.asked == []
    world.check_over()


def test_the_longest_request_is_not_refused() -> None:
    world = World()
    number = world.add(MAX_TOKENS - 5, max_tokens=5)
    assert world.state(number) is State.ALLOCATING
    assert sizes(world) == [(number, MAX_TOKENS // BLOCK_TOKENS)]


def test_one_that_the_store_can_never_hold_is_refused_and_its_slot_goes_to_the_next() -> None:
    world = World()
    numbers = [world.add(prompt=30, max_tokens=BLOCKS * BLOCK_TOKENS - 29) for _ in range(SLOTS)]
    behind = world.add(prompt=3, max_tokens=2)
    world.store_works()
    world.store_answers()
    for number in numbers:
        end = world.end(number)
        assert isinstance(end, Refused) and end.code == PromptTooLong.code and "--kv-size" in end.text
    world.serve()
    assert done(world, behind) == ("length", [1, 2])
    assert world.freed == [behind], "what was denied is not freed"
    world.check_over()


def test_more_requests_than_slots_and_blocks_are_served_in_their_order() -> None:
    world = World()
    numbers = [world.add(prompt=9, max_tokens=5, first=100 * n) for n in range(9)]  # 4 blocks each
    assert world.scheduler.waiting == 9
    assert sizes(world) == [(number, 4) for number in numbers[:SLOTS]]
    ends = []
    for _ in range(1000):
        world.store_works()
        world.store_answers()
        assert world.scheduler.running <= 2, "two of them fill the store"
        world.engine.finish(1)
        world.advance()
        ends = [report.sequence for report in world.reports if isinstance(report, Done)]
        if len(ends) == len(numbers):
            break
    assert ends == numbers
    world.serve()
    assert all(done(world, n)[1] == [100 * n + i for i in range(1, 6)] for n in numbers)
    world.check_over()


# --------------------------------------------------------- what ends or shapes an answer besides


def test_one_of_the_stop_token_ids_ends_an_answer_also_where_end_tokens_do_not() -> None:
    world = World()
    numbers = [
        world.add(prompt=3, max_tokens=9, first=END - 3, stop_token_ids=[END + 1], ignore_eos=True),
        world.add(prompt=3, max_tokens=9, first=END - 3, stop_token_ids=[END - 1]),
    ]
    world.serve()
    assert done(world, numbers[0]) == ("stop", [END - 2, END - 1, END, END + 1])
    assert done(world, numbers[1]) == ("stop", [END - 2, END - 1])
    world.check_over()


def test_only_what_wants_its_logits_adjusted_is_adjusted() -> None:
    world = World()
    world.add(prompt=3, max_tokens=2)
    number = world.add(prompt=3, max_tokens=2, first=5, min_tokens=2, stop_token_ids=[8], logit_bias={1: 2.0})
    world.serve()
    slot = 1
    assert world.engine.adjusted == [(slot, world.runs[number].tokens, [END, 8], [])]
    world.check_over()


def test_a_prompt_is_scored_before_its_first_token() -> None:
    world = World()
    number = world.add(prompt=6, max_tokens=2, first=4, prompt_logprobs=0)
    world.serve()
    kinds = [type(report) for report in world.reports if not isinstance(report, Prefilled)]
    assert kinds == [PromptScored, Stepped, Stepped, Done]
    (scored,) = [report for report in world.reports if isinstance(report, PromptScored)]
    assert (scored.sequence, scored.start) == (number, 1)
    assert [entry.logprob for entry in scored.logprobs] == [-4.0] * 5
    world.check_over()


@pytest.mark.parametrize("prompt", [1, 6, 17])
def test_a_prompt_that_is_only_scored_takes_no_step(prompt: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside one that decodes; in pieces where it is long, and not among short prompts."""
    monkeypatch.setattr("clo.gpu_worker.scheduler._SCORES", 10)
    world = World()
    monkeypatch.setattr(world.engine.prompt_graphs, "longest", 8)
    other = world.add(prompt=3, max_tokens=6)
    number = world.add(prompt, max_tokens=0, first=4, prompt_logprobs=1)
    world.serve()
    assert done(world, number) == ("length", []) and done(world, other)[1] == [1, 2, 3, 4, 5, 6]
    scored = [report for report in world.reports if isinstance(report, PromptScored)]
    assert [report.start for report in scored] == [1, 11][: 1 + (prompt > 11)]
    assert sum(len(report.logprobs) for report in scored) == prompt - 1
    assert world.engine.together == [[0]]
    world.check_over()


def test_a_scored_prompt_that_is_cancelled_gives_everything_back() -> None:
    world = World()
    number = world.add(prompt=6, max_tokens=0, prompt_logprobs=1)
    world.store_works()
    world.store_answers()
    world.advance()
    world.abort(number)
    world.serve()
    assert done(world, number) == ("cancelled", [])
    world.check_over()


# ------------------------------------------------------------------------- what others hear of them


def test_the_progress_of_a_long_prefill_is_reported_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fake_engine.UNITS", 8)
    clock = count(1000.0, PROGRESS_SECONDS / 2)  # a unit takes half the time between two reports
    monkeypatch.setattr("clo.gpu_worker.scheduler.time.monotonic", lambda: next(clock))
    world = World()
    number = world.add(prompt=16, max_tokens=1)
    world.serve()
    progress = [report for report in world.reports if isinstance(report, Prefilled)]
    assert progress == [Prefilled(number, done, 16) for done in (2, 6, 10, 14, 16)]
    world.check_over()


def test_the_tokens_of_a_batch_are_reported_together() -> None:
    world = World()
    numbers = [world.add(prompt=2, max_tokens=9, first=100 * n) for n in range(3)]
    world.serve()
    full = [r for r in world.reports if isinstance(r, Stepped) and len(r.steps) == 3]
    assert len(full) >= 3
    assert all([step.sequence for step in report.steps] == numbers for report in full)


def test_a_drift_check_hears_of_every_step() -> None:
    class Recorder:
        """Lengths of the steps by slot, and the handles."""

        def __init__(self) -> None:
            self.lengths: list[dict[int, int]] = []
            self.handles: list[StepHandle] = []

        def before(self, lengths: dict[int, int]) -> None:
            assert len(self.lengths) == len(self.handles)
            self.lengths.append(dict(lengths))

        def after(self, handle: StepHandle) -> None:
            self.handles.append(handle)

    recorder = Recorder()
    world = World(recorder)
    world.add(prompt=3, max_tokens=4)
    world.serve()
    assert recorder.lengths == [{0: 4}, {0: 5}, {0: 6}]
    assert [handle.rows for handle in recorder.handles] == [[0]] * 3


# ----------------------------------------------------------------------------------------- at random


@pytest.mark.parametrize("seed", range(40))
def test_random_requests_get_their_tokens_and_give_all_back(seed: int) -> None:
    """Store, device and answers lag behind by random times; requests come and are cancelled in between."""
    rng = random.Random(seed)
    world = World()
    expected: dict[int, tuple[str, list[int]]] = {}
    aborted: set[int] = set()

    def new() -> None:
        prompt, count = rng.randint(1, 14), rng.randint(1, 12)
        first = rng.choice([10_000 * (1 + len(world.runs)), END - rng.randint(1, 14)])
        forced = [rng.randrange(END, END + 9) for _ in range(count)] if rng.random() < 0.2 else None
        logprobs = rng.choice([None, None, 0, 3])
        number = world.add(prompt, count, first=first, forced=forced, logprobs=logprobs)
        tokens = forced or list(range(first + 1, first + count + 1))
        if forced is None and END in tokens:
            expected[number] = "stop", tokens[: tokens.index(END) + 1]
        else:
            expected[number] = "length", tokens

    def abort() -> None:
        number = rng.randrange(len(world.runs) + 3)
        if number in world.runs and world.end(number) is None:
            aborted.add(number)
        world.abort(number)

    acts: list[Callable[[], None]] = [
        lambda: world.store_works(rng.randint(0, 3)),
        lambda: world.store_answers(rng.randint(0, 2)),
        lambda: world.engine.finish(rng.randint(0, 6)),
        world.advance,
        world.advance,
    ]
    for _ in range(600):
        if len(world.runs) < 60 and rng.random() < 0.15:
            new()
        if rng.random() < 0.03:
            abort()
        rng.choice(acts)()
        world.check()
    world.serve()
    assert len(world.runs) > 30
    for number, (reason, tokens) in expected.items():
        found, given = done(world, number)
        if number in aborted:
            assert given == tokens[: len(given)]
            assert found == "cancelled" or (found, given) == (reason, tokens)
        else:
            assert (found, given) == (reason, tokens)
    world.check_over()
