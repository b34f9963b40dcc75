"""The scheduler alone: answers that grow, and give their blocks back where there are too few for all."""

from clo.gpu_worker.sequence import State
from clo.runtime.wire.messages import Allocate, Grown, ToStore
from tests.scheduler_world import BLOCKS, World, done


def allocations(world: World) -> list[int]:
    """Notes who asks for its first blocks, in order; a sequence that begins again is there again."""
    asked: list[int] = []

    def ask(message: ToStore) -> None:
        if isinstance(message, Allocate):
            asked.append(message.sequence)
        world.asked.append(message)

    world.scheduler._ask_store = ask
    return asked


def test_blocks_come_as_answers_grow_and_the_youngest_gives_its_own_back() -> None:
    """Two answers, each of which needs most of the arena in the end: both begin, the older one is never
    interrupted, and the younger one goes on where it was."""
    world = World()
    asked = allocations(world)
    old, young = (world.add(prompt=2, max_tokens=30, client=client) for client in range(2))
    world.serve()
    assert asked == [old, young, young]
    assert done(world, old) == done(world, young) == ("length", list(range(1, 31)))
    world.check_over()


def test_what_was_preempted_goes_on_with_all_that_was_asked_of_it() -> None:
    world = World()
    asked = allocations(world)
    world.add(prompt=2, max_tokens=36, client=1)
    forced = [90 - token for token in range(14)]
    numbers = [
        world.add(prompt=2, max_tokens=14, forced=forced, client=2),
        world.add(prompt=2, max_tokens=14, presence_penalty=0.5, client=3),
    ]
    world.serve()
    assert asked[3:] and {*asked[3:]} <= {*numbers}, "both are younger"
    assert done(world, numbers[0]) == ("length", forced)
    assert done(world, numbers[1]) == ("length", list(range(1, 15)))
    (_, prompt, _, first), *_, (_, _, _, last) = world.engine.adjusted
    assert prompt == [0, 0] and first == [] and last == list(range(1, 1 + len(last))) and last
    world.check_over()


def test_a_grammar_is_begun_again_after_what_it_has_allowed() -> None:
    world = World()
    asked = allocations(world)
    old = world.add(prompt=2, max_tokens=36, client=1)
    followed = [5 + 3 * place for place in range(20)]
    young = world.add(prompt=2, max_tokens=30, grammar=" ".join(map(str, followed)), client=2)
    world.constraints.work()
    world.serve()
    assert asked == [old, young, young]
    assert done(world, young) == ("stop", followed) and done(world, old) == ("length", list(range(1, 37)))
    world.check_over()


def test_what_is_cancelled_while_it_makes_room_does_not_begin_again() -> None:
    world = World()
    asked = allocations(world)
    old, young = (world.add(prompt=2, max_tokens=30, client=client) for client in range(2))
    world.store_works()
    world.store_answers()
    world.until(lambda: world.state(young) is State.RELEASING, 1)
    world.abort(young)
    world.abort(young)
    world.serve()
    assert asked == [old, young]
    assert done(world, young)[0] == "cancelled" and done(world, old) == ("length", list(range(1, 31)))
    world.check_over()


def test_nothing_is_written_where_no_block_is_because_the_store_is_late() -> None:
    world = World()
    asked = allocations(world)
    number = world.add(prompt=2, max_tokens=20)
    world.store_works()
    world.store_answers()
    for _ in range(40):
        world.engine.finish()
        world.advance()
    assert world.state(number) in (State.RELEASING, State.ALLOCATING), "it has given its blocks back"
    world.serve()
    assert asked == [number, number] and done(world, number) == ("length", list(range(1, 21)))
    world.check_over()


def test_who_takes_no_further_step_takes_no_blocks_from_others() -> None:
    """The store says that there are none when all steps of the one that asked have been launched."""
    world = World()
    number = world.add(prompt=4, max_tokens=5)  # its last token needs no row, and so no third block
    world.store_works()
    world.store_answers()
    world.pool.allocate(1, 99, BLOCKS - 2)  # of another worker
    assert len(list(world.pool.grants())) == 1
    while world.state(number) is not State.DRAINING:
        world.engine.finish(1)
        world.advance()
    world.store_works()
    assert Grown(number, []) in world.answers
    world.store_answers()
    assert world.state(number) is State.DRAINING
    world.pool.free(1, 99)
    world.serve()
    assert done(world, number) == ("length", [1, 2, 3, 4, 5]) and world.scheduler.preemptions == 0
    world.check_over()
