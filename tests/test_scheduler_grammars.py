"""The scheduler alone: answers that follow a grammar, whose masks come when other threads have them."""

import pytest

from clo.gpu_worker.sequence import State
from clo.runtime.wire.messages import Refused
from tests.scheduler_world import END, World, done


def test_a_request_with_a_grammar_follows_it_beside_others() -> None:
    world = World()
    number = world.add(prompt=3, max_tokens=9, grammar="5 9 2 7")
    other = world.add(prompt=3, max_tokens=6)
    world.serve()
    assert done(world, number) == ("stop", [5, 9, 2, 7]), "nothing may follow, so it waits for no end token"
    assert done(world, other) == ("length", [1, 2, 3, 4, 5, 6])
    world.check_over()


def test_a_grammar_whose_answer_may_go_on_ends_at_an_end_token_and_at_the_last_one() -> None:
    world = World()
    ending = world.add(prompt=3, max_tokens=9, grammar=f"5 {END} 7")
    ignoring = world.add(prompt=3, max_tokens=9, grammar=f"5 {END} 7", ignore_eos=True)
    long = world.add(prompt=3, max_tokens=2, grammar="5 9 2 7")
    world.serve()
    assert done(world, ending) == ("stop", [5, END])
    assert done(world, ignoring) == ("stop", [5, END, 7])
    assert done(world, long) == ("length", [5, 9])
    world.check_over()


def test_others_do_not_wait_for_a_mask() -> None:
    """The threads of a grammar do nothing, and the device everything: it repeats its step, in vain."""
    world = World()
    number = world.add(prompt=3, max_tokens=9, grammar="5 9 2")
    world.constraints.work()
    other = world.add(prompt=3, max_tokens=20)
    world.advance()
    world.store_works()
    world.store_answers()
    world.until(lambda: len(world.tokens(other)) == 12)
    slot = world.scheduler._sequences[number].slot
    assert world.tokens(number) == [5] and world.engine.lengths[slot] == 3
    world.constraints.work()
    world.serve()
    assert done(world, number) == ("stop", [5, 9, 2])
    assert world.tokens(other) == list(range(1, 21))
    world.check_over()


def test_a_request_waits_for_its_grammar_without_a_slot() -> None:
    world = World()
    number = world.add(prompt=3, max_tokens=9, grammar="5 9")
    assert world.state(number) is State.COMPILING and world.scheduler.busy
    assert (world.scheduler.waiting, world.scheduler.running) == (1, 0)
    world.advance(3)
    assert not world.asked
    world.constraints.work()
    world.advance()
    assert world.state(number) is State.ALLOCATING
    world.serve()
    assert done(world, number) == ("stop", [5, 9])
    world.check_over()


@pytest.mark.parametrize(("grammar", "tokens"), [("!", []), ("5 9 !", [5, 9])])
def test_a_grammar_that_cannot_be_followed_ends_its_request_with_a_sentence(
    grammar: str, tokens: list[int]
) -> None:
    world = World()
    number = world.add(prompt=3, max_tokens=9, grammar=grammar)
    other = world.add(prompt=3, max_tokens=6)
    world.serve()
    end = world.end(number)
    assert isinstance(end, Refused) and end.code == "invalid_request"
    assert end.text == "The answer cannot follow structured_outputs any further: too hard."
    assert world.tokens(number) == tokens
    assert done(world, other) == ("length", [1, 2, 3, 4, 5, 6])
    world.check_over()


def test_grammars_that_cannot_be_had_are_refused() -> None:
    world = World()
    world.constraints.missing = "the package llguidance is not installed"
    number = world.add(prompt=3, max_tokens=9, grammar="5")
    end = world.end(number)
    assert isinstance(end, Refused) and end.code == "invalid_request"
    assert end.text == "This server has no structured output: the package llguidance is not installed."
    world.check_over()


@pytest.mark.parametrize("rounds", range(12))
def test_a_request_with_a_grammar_may_be_cancelled_at_any_time(rounds: int) -> None:
    """Its slot is free only when the threads no longer write to its mask."""
    world = World()
    number = world.add(prompt=3, max_tokens=9, grammar="5 9 2 7 3 1")
    other = world.add(prompt=3, max_tokens=9)
    for turn in range(rounds):
        world.store_works()
        world.store_answers()
        if turn % 3 != 2:
            world.constraints.work()
        world.engine.finish()
        world.advance()
    world.abort(number)
    constraint = world.constraints.made[0]
    if not constraint.done and world.state(number) is State.RELEASING:
        world.engine.finish()
        world.advance()
        assert world.state(number) is State.RELEASING
    world.serve()
    assert done(world, number)[0] == "cancelled"
    assert done(world, other)[1] == list(range(1, 10))
    world.check_over()
