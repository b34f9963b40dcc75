"""Allocation of blocks: order, limits and what a block holds; ``test_pool_machine`` has any use."""

import pytest

from clo.kvstore.pool import BlockPool, Grant
from clo.runtime.wire.errors import PromptTooLong, ProtocolError


def granted(pool: BlockPool) -> list[tuple[int, int]]:
    return [(grant.group, grant.sequence) for grant in pool.grants()]


def test_blocks_are_granted_in_order_of_asking() -> None:
    pool = BlockPool(blocks=10, block_tokens=4)
    pool.allocate(0, 1, 8)
    assert list(pool.grants()) == [Grant(0, 1, list(range(8)), 0)]
    pool.allocate(0, 2, 9)
    pool.allocate(1, 1, 4)
    assert granted(pool) == []
    pool.allocate(0, 3, 1)
    pool.free(0, 1)
    assert granted(pool) == [(0, 2), (0, 3)], "the first before those that fit, too"
    pool.free(0, 2)
    assert granted(pool) == [(1, 1)]
    pool.check_integrity()


def test_a_small_request_passes_a_large_one_that_has_to_wait_but_not_for_ever() -> None:
    """Those that pass get as many blocks in all as the large one wants, and no more."""
    pool = BlockPool(blocks=10, block_tokens=4)
    pool.allocate(0, 1, 8)
    pool.allocate(0, 2, 5)
    assert granted(pool) == [(0, 1)]
    pool.allocate(1, 3, 2)
    assert granted(pool) == [(1, 3)]
    for sequence in (4, 5, 6):
        pool.free(1, sequence - 1)
        pool.allocate(1, sequence, 1)
        assert granted(pool) == [(1, sequence)]
    pool.free(1, 6)
    pool.allocate(1, 7, 1)
    assert granted(pool) == [], "five blocks have passed it"
    pool.allocate(1, 8, 1)
    assert granted(pool) == []
    pool.free(0, 1)
    assert granted(pool) == [(0, 2), (1, 7), (1, 8)]
    pool.check_integrity()


def test_an_allocation_that_can_never_fit_is_denied_and_does_not_queue() -> None:
    pool = BlockPool(blocks=10, block_tokens=4)
    with pytest.raises(PromptTooLong, match=r"44 tokens.*40.*raise --kv-size"):
        pool.allocate(0, 1, 11)
    assert pool.waiting == 0
    pool.allocate(0, 1, 10)
    assert granted(pool) == [(0, 1)]


def test_withdrawing_the_head_of_the_queue_serves_those_behind_it() -> None:
    pool = BlockPool(blocks=4, block_tokens=4)
    pool.allocate(0, 1, 2)
    assert granted(pool) == [(0, 1)]
    pool.allocate(0, 2, 4)
    pool.allocate(0, 3, 1)
    assert pool.free(0, 2) == 0
    assert granted(pool) == [(0, 3)]
    pool.check_integrity()


def test_a_second_allocation_of_a_sequence_is_refused_whether_it_owns_or_waits() -> None:
    pool = BlockPool(blocks=2, block_tokens=4)
    pool.allocate(0, 1, 2)
    with pytest.raises(ProtocolError, match="Sequence 1 has asked for blocks before"):
        pool.allocate(0, 1, 1)
    assert granted(pool) == [(0, 1)]
    with pytest.raises(ProtocolError, match="Sequence 1 has asked for blocks before"):
        pool.allocate(0, 1, 1)
    pool.allocate(1, 1, 1)  # the same number of another worker is another sequence
    assert pool.waiting == 1


def test_commits_continue_where_the_last_ended_and_stay_inside_the_blocks() -> None:
    pool = BlockPool(blocks=4, block_tokens=4)
    pool.allocate(0, 1, 2)
    blocks = next(pool.grants()).blocks
    pool.commit(0, 1, 0, [1, 2, 3, 4, 5])
    for start, tokens, wrong in (
        (4, [6], "holds 5 tokens; a commit cannot start at 4"),
        (6, [6], "holds 5 tokens; a commit cannot start at 6"),
        (5, [6, 7, 8, 9], "has room for 8 tokens, not for 9"),
    ):
        with pytest.raises(ProtocolError, match=f"Sequence 1 {wrong}"):
            pool.commit(0, 1, start, tokens)
    with pytest.raises(ProtocolError, match="Sequence 1 holds no blocks"):
        pool.commit(1, 1, 0, [1])
    pool.commit(0, 1, 5, [6, 7, 8])
    assert pool.describe(0, 1) == (blocks, [[1, 2, 3, 4], [5, 6, 7, 8]])


def test_the_blocks_of_a_sequence_are_those_that_it_was_granted() -> None:
    pool = BlockPool(blocks=8, block_tokens=4)
    for group, sequence in ((0, 1), (0, 2), (1, 1)):
        pool.allocate(group, sequence, 2)
    grants = list(pool.grants())
    for grant in grants:
        assert pool.blocks_of(grant.group, grant.sequence) == grant.blocks
    pool.blocks_of(0, 1).clear()  # a caller's list is its own
    assert pool.blocks_of(0, 1) == grants[0].blocks
    pool.allocate(1, 2, 3)  # waits
    for group, sequence in ((1, 2), (2, 1)):
        with pytest.raises(ProtocolError, match=f"Sequence {sequence} holds no blocks"):
            pool.blocks_of(group, sequence)


def test_freed_blocks_forget_their_tokens() -> None:
    pool = BlockPool(blocks=1, block_tokens=4)
    pool.allocate(0, 1, 1)
    assert granted(pool) == [(0, 1)]
    pool.commit(0, 1, 0, [1, 2])
    assert pool.free(0, 1) == 1
    assert pool.free(0, 1) == 0
    pool.allocate(0, 1, 1)
    assert granted(pool) == [(0, 1)]
    assert pool.describe(0, 1) == ([0], [[]])


def begin(
    pool: BlockPool,
    sequence: int,
    prompt: list[int],
    blocks: int | None = None,
    own: int = 1,
    salt: str = "",
) -> Grant:
    """A sequence of group 0 that gets its blocks at once."""
    pool.allocate(0, sequence, blocks or -(-len(prompt) // pool.block_tokens), prompt, own, salt)
    (grant,) = pool.grants()
    pool.check_integrity()
    assert isinstance(grant, Grant)
    return grant


def complete(pool: BlockPool, sequence: int, prompt: list[int], cached: int) -> None:
    """All rows of its prompt are there."""
    start = cached * pool.block_tokens
    pool.commit(0, sequence, start, prompt[start:])
    pool.check_integrity()


def test_a_prompt_that_begins_like_another_shares_the_blocks_that_are_committed() -> None:
    pool = BlockPool(blocks=10, block_tokens=4)
    prompt = list(range(14))
    first = begin(pool, 1, prompt)
    assert begin(pool, 2, prompt).cached == 0, "nobody waits for rows that are being computed"
    pool.free(0, 2)
    pool.commit(0, 1, 0, prompt[:9])
    other = [*prompt[:6], 99, *prompt[7:]]
    second = begin(pool, 3, other)
    assert (second.cached, second.blocks[0]) == (1, first.blocks[0])
    assert not set(second.blocks[1:]) & set(first.blocks)
    third = begin(pool, 4, prompt)
    assert (third.cached, third.blocks[:2]) == (2, first.blocks[:2])
    assert pool.describe(0, 4)[1] == [[0, 1, 2, 3], [4, 5, 6, 7], [], []], "their tokens are known"
    assert pool.free(0, 1) == 4
    assert pool.free_blocks == 10 - 4 - 4 + 1, "the first block is in both"
    pool.check_integrity()


def test_prompts_under_another_salt_share_nothing() -> None:
    pool = BlockPool(blocks=10, block_tokens=4)
    prompt = list(range(9))
    begin(pool, 1, prompt, salt="one")
    pool.commit(0, 1, 0, prompt)
    assert begin(pool, 2, prompt).cached == 0
    assert begin(pool, 3, prompt, salt="one").cached == 2


def test_blocks_that_nobody_holds_are_kept_until_their_space_is_needed() -> None:
    pool = BlockPool(blocks=6, block_tokens=4)
    prompts = [[base + place for place in range(8)] for base in (0, 100, 200)]
    for sequence, prompt in enumerate(prompts):
        grant = begin(pool, sequence, prompt)
        complete(pool, sequence, prompt, grant.cached)
        pool.free(0, sequence)
    assert (pool.free_blocks, pool.kept_blocks) == (6, 6)
    assert begin(pool, 3, [*prompts[0], 1], blocks=3).cached == 2, "it takes one that was left longer ago"
    pool.free(0, 3)
    assert begin(pool, 4, [*prompts[1], 1], blocks=3).cached == 1, (
        "the end of a chain goes before its beginning"
    )
    pool.free(0, 4)
    assert begin(pool, 5, [*prompts[0], 1], blocks=3).cached == 2
    pool.free(0, 5)
    assert begin(pool, 6, [], blocks=6).cached == 0
    assert pool.kept_blocks == 0
    pool.free(0, 6)
    assert begin(pool, 7, [*prompts[0], 1]).cached == 0, "the space was needed"


def test_last_tokens_of_a_prompt_are_left_to_compute() -> None:
    pool = BlockPool(blocks=9, block_tokens=4)
    prompt = list(range(12))
    complete(pool, 1, prompt, begin(pool, 1, prompt).cached)
    for sequence, (own, cached) in enumerate(((1, 2), (4, 2), (5, 1), (8, 1), (9, 0), (12, 0), (99, 0)), 2):
        assert begin(pool, sequence, prompt, own=own).cached == cached
        pool.free(0, sequence)


def test_what_a_sequence_generates_is_not_shared() -> None:
    """Its rows come from steps that attend to a part of the context."""
    pool = BlockPool(blocks=9, block_tokens=4)
    begin(pool, 1, [1, 2, 3, 4, 5], blocks=4)
    pool.commit(0, 1, 0, [1, 2, 3, 4, 5])
    pool.commit(0, 1, 5, [6, 7, 8, 9, 10, 11])
    assert begin(pool, 2, [*range(1, 12)]).cached == 1


def test_of_two_that_compute_the_same_the_first_is_shared() -> None:
    pool = BlockPool(blocks=9, block_tokens=4)
    prompt = list(range(8))
    first, second = begin(pool, 1, prompt), begin(pool, 2, prompt)
    complete(pool, 2, prompt, 0)
    complete(pool, 1, prompt, 0)
    third = begin(pool, 3, [*prompt, 1])
    assert (third.cached, third.blocks[:2]) == (2, second.blocks)
    for sequence in (1, 2, 3):
        pool.free(0, sequence)
        pool.check_integrity()
    assert (pool.free_blocks, pool.kept_blocks) == (9, 2)
    assert not set(first.blocks) & set(second.blocks)


def test_a_commit_of_other_tokens_than_the_prompts_is_refused() -> None:
    pool = BlockPool(blocks=4, block_tokens=4)
    begin(pool, 1, [1, 2, 3, 4, 5], blocks=2)
    with pytest.raises(ProtocolError, match="Sequence 1 commits other tokens than those of its prompt"):
        pool.commit(0, 1, 0, [1, 2, 3, 9])
    pool.commit(0, 1, 0, [1, 2, 3, 4, 5, 9])
    with pytest.raises(ProtocolError, match="do not hold a prompt of 9 tokens"):
        pool.allocate(0, 2, 2, [1] * 9)


def test_a_pool_that_keeps_nothing_shares_nothing() -> None:
    pool = BlockPool(blocks=4, block_tokens=4, keep=False)
    prompt = list(range(8))
    begin(pool, 1, prompt)
    pool.commit(0, 1, 0, prompt)
    assert begin(pool, 2, prompt).cached == 0
    pool.free(0, 1)
    assert (pool.free_blocks, pool.kept_blocks) == (2, 0)
    pool.check_integrity()


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        ("lost", r"Free blocks are \[2, 3\] and listed as \[3\]"),
        ("twice", r"Free blocks are \[2, 3\] and listed as \[0, 2, 3\]"),
        ("foreign", r"Free blocks are \[2, 3\] and listed as \[2, 4\]"),
        ("counted wrongly", r"held \[1, 1, 0, 0\] times and counted \[2, 1, 0, 0\] times"),
        ("overfull", "Sequence 1 of group 0 holds 5 tokens in 2 blocks"),
        ("holder waits", "Sequence 1 of group 0 holds blocks and waits"),
        ("idle queue", "The queue waits although 2 blocks are free"),
    ],
)
def test_check_integrity_finds_damage(damage: str, text: str) -> None:
    pool = BlockPool(blocks=4, block_tokens=2)
    pool.allocate(0, 1, 2)
    assert granted(pool) == [(0, 1)]
    holding = pool._held[0][1]
    match damage:
        case "lost":
            pool._free.pop()
        case "twice":
            pool._free.append(holding.blocks[0])
        case "foreign":
            pool._free[0] = 4
        case "counted wrongly":
            pool._holders[holding.blocks[0]] += 1
        case "overfull":
            holding.tokens.extend([1] * 5)
        case "holder waits":
            pool.allocate(0, 2, 3)
            pool._waiting[0, 1] = pool._waiting.pop((0, 2))
        case "idle queue":
            pool.allocate(0, 2, 2)  # just as many as are free
    with pytest.raises(AssertionError, match=text):
        pool.check_integrity()
