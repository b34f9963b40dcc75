"""The pool of blocks under any use, beside a model that follows what the rows of each block depend on, also
where blocks come back from below.

Some thousands of steps here; ``python -m tests.fuzz`` takes other ones in each run.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from clo.kvstore.pool import BlockPool, Grant, Growth, Load, Lower
from clo.runtime.wire.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from tests.fuzz import drawn

BLOCKS, BLOCK_TOKENS = 7, 2
Key = tuple[int, int]  # group and sequence

keys = st.tuples(st.integers(0, 1), st.integers(0, 4))
# Alike but for one token, so that many begin alike.
prompts = st.builds(
    lambda length, other: [int(place == other) for place in range(length)],
    st.integers(0, 12),
    st.integers(1, 12),
)


class Asked(NamedTuple):
    blocks: int
    prompt: list[int]
    own: int
    salt: str


class Rows(NamedTuple):
    """What the rows of a block were computed from; None where they are of no use to others."""

    salt: str
    tokens: tuple[int, ...]


class PoolMachine(RuleBasedStateMachine):
    lower: Lower | None = None

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS, BLOCK_TOKENS, report=True, lower=self.lower)
        assert self.pool.events() == [AllBlocksCleared()]
        self.asked: dict[Key, Asked] = {}  # in order, until granted
        self.passed: Counter[Key] = Counter()  # new blocks that overtook it
        self.holds: dict[Key, tuple[Asked, list[int]]] = {}
        self.loading: dict[Key, tuple[Asked, Load]] = {}  # blocks are taken for it, and not granted
        self.loads: list[tuple[Asked, Load]] = []  # that are under way, whatever has become of the sequence
        self.growing: dict[Key, int] = {}  # further blocks that it waits for, in order of asking
        self.committed: dict[Key, list[int]] = {}  # tokens
        self.rows: dict[int, Rows | None] = {}  # by block, in the arena
        self.published: set[int] = set()

    @rule(
        count=st.integers(1, 3),
        prompt=prompts,
        more=st.integers(0, 1),
        own=st.integers(1, 5),
        salt=st.sampled_from("aaab"),
        data=st.data(),
    )
    def allocate_alike(
        self, count: int, prompt: list[int], more: int, own: int, salt: str, data: Any
    ) -> None:
        for _ in range(count):
            self.allocate(data.draw(keys), prompt, more, own, salt)

    def allocate(self, key: Key, prompt: list[int], more: int, own: int, salt: str) -> None:
        blocks = max(1, min(BLOCKS, -(-len(prompt) // BLOCK_TOKENS) + more))
        if key in self.asked or key in self.holds or key in self.loading:
            return
        self.asked[key] = Asked(blocks, prompt, own, salt)
        self.pool.allocate(*key, blocks, prompt, own, salt)
        self.serve()

    @precondition(lambda self: self.holds)
    @rule(data=st.data(), most=st.integers(1, 12), generated=st.integers(0, 1))
    def commit_some(self, data: Any, most: int, generated: int) -> None:
        for key in data.draw(st.sets(st.sampled_from(sorted(self.holds)), min_size=1)):
            self.commit(key, most, generated)

    def commit(self, key: Key, most: int, generated: int) -> None:
        asked, blocks = self.holds[key]
        start = len(self.committed[key])
        count = min(most, len(blocks) * BLOCK_TOKENS - start)
        new = asked.prompt[start : start + count]
        new += [generated] * (count - len(new))
        committed = self.pool.commit(key[0], key[1], start, new)
        self.committed[key] += new
        full = min(len(self.committed[key]), len(asked.prompt)) // BLOCK_TOKENS
        for place in range(start // BLOCK_TOKENS, full):
            end = (place + 1) * BLOCK_TOKENS
            self.rows[blocks[place]] = Rows(asked.salt, tuple(asked.prompt[:end]))
        assert committed == max(0, full - start // BLOCK_TOKENS)
        self.serve()

    @precondition(lambda self: self.holds)
    @rule(data=st.data(), blocks=st.integers(1, 3))
    def grow(self, data: Any, blocks: int) -> None:
        key = data.draw(st.sampled_from(sorted(self.holds)))
        if key in self.growing or len(self.holds[key][1]) + blocks > BLOCKS:
            return
        self.growing[key] = blocks
        self.pool.grow(key[0], key[1], blocks)
        self.serve()

    @precondition(lambda self: len(self.holds) + len(self.asked) + len(self.loading) > 3)
    @rule(data=st.data())
    def free(self, data: Any) -> None:
        key = data.draw(st.sampled_from(sorted(self.keys())))
        held = self.forget(key)
        assert self.pool.free(*key) == held
        self.serve()

    @precondition(lambda self: self.asked)
    @rule(times=st.integers(2, 2 * BLOCKS))
    def come_and_go(self, times: int) -> None:
        """Small requests one after the other, which might keep a large one waiting for ever."""
        for number in range(times):
            key = 0, 100 + number
            self.allocate(key, [], 1, 1, "a")
            assert self.pool.free(*key) == self.forget(key)
            self.serve()

    @precondition(lambda self: len(self.asked) > 1)
    @rule(group=st.integers(0, 1))
    def free_group(self, group: int) -> None:
        held = sum(self.forget(key) for key in self.keys() if key[0] == group)
        assert self.pool.free_group(group) == held
        self.serve()

    def keys(self) -> list[Key]:
        return [*self.holds, *self.asked, *self.loading]

    def forget(self, key: Key) -> int:
        if key in self.loading:
            return len(self.loading.pop(key)[1].holding.blocks)
        self.asked.pop(key, None)
        self.growing.pop(key, None)
        self.passed.pop(key, None)
        self.committed.pop(key, None)
        return len(self.holds.pop(key, (None, []))[1])

    def serve(self) -> None:
        for grant in self.pool.grants():
            self.begin_loads()  # those before it in the queue
            if isinstance(grant, Growth):
                self.check_growth(grant)
            else:
                self.check(grant)
        self.begin_loads()

    def begin_loads(self) -> None:
        for load in self.pool.loads():
            self.begin(load)

    def begin(self, load: Load) -> None:
        key, holding = (load.group, load.sequence), load.holding
        asked = self.asked[key]
        new = holding.blocks[holding.committed :]
        self.take(key, new)
        assert new[: len(load.blocks)] == load.blocks
        assert holding.committed * BLOCK_TOKENS < len(asked.prompt)
        self.loading[key] = asked, load
        self.loads.append((asked, load))

    def used(self) -> set[int]:
        """Blocks that are held."""
        used = {block for _, blocks in self.holds.values() for block in blocks}
        used |= {block for _, load in self.loads for block in load.blocks}
        return used | {block for _, load in self.loading.values() for block in load.holding.blocks}

    def take(self, key: Key, new: list[int]) -> None:
        """A sequence has got new blocks."""
        assert not {*new} & self.used()
        for other in list(self.asked)[: list(self.asked).index(key)]:
            self.passed[other] += len(new)
            assert self.passed[other] <= self.asked[other].blocks, "others pass it without end"
        for block in new:
            self.rows[block] = None
        del self.asked[key]
        self.passed.pop(key, None)

    def check_growth(self, growth: Growth) -> None:
        key = growth.group, growth.sequence
        if not growth.blocks:
            first = next(iter(self.growing.values()))
            assert key in self.growing and first > self.pool.free_blocks
            return
        assert key == next(iter(self.growing)), "it has waited longest"
        assert len({*growth.blocks}) == self.growing.pop(key)
        assert not {*growth.blocks} & self.used()
        for block in growth.blocks:
            self.rows[block] = None
        asked, blocks = self.holds[key]
        self.holds[key] = asked, blocks + growth.blocks

    def check(self, grant: Grant) -> None:
        key = grant.group, grant.sequence
        assert not self.growing or key in self.loading, "who holds blocks comes before who has none"
        asked = self.loading[key][0] if key in self.loading else self.asked[key]
        assert len(grant.blocks) == len({*grant.blocks}) == asked.blocks
        shared, new = grant.blocks[: grant.cached], grant.blocks[grant.cached :]
        assert grant.cached * BLOCK_TOKENS <= max(0, len(asked.prompt) - asked.own)
        for place, block in enumerate(shared):
            assert self.rows[block] == self.names(asked)[place], "it has the rows of these tokens"
        if key in self.loading:
            assert grant.blocks == self.loading.pop(key)[1].holding.blocks
        else:
            assert grant.cached >= self.surely_there(asked)
            self.take(key, new)
        self.holds[key] = asked, grant.blocks
        self.committed[key] = asked.prompt[: grant.cached * BLOCK_TOKENS]

    @staticmethod
    def names(asked: Asked) -> list[Rows]:
        ends = range(BLOCK_TOKENS, len(asked.prompt) + 1, BLOCK_TOKENS)
        return [Rows(asked.salt, tuple(asked.prompt[:end])) for end in ends]

    def surely_there(self, asked: Asked) -> int:
        """Blocks at the beginning of a prompt that a sequence holds, so that they cannot have been taken."""
        held = {self.rows[block] for _, blocks in self.holds.values() for block in blocks}
        most = max(0, len(asked.prompt) - asked.own) // BLOCK_TOKENS
        names = self.names(asked)[:most]
        return next((place for place, name in enumerate(names) if name not in held), len(names))

    @invariant()
    def all_is_well(self) -> None:
        pool = self.pool
        pool.check_integrity()
        assert (pool.sequences, pool.waiting) == (
            len(self.holds) + len(self.loading),
            len(self.asked) + len(self.growing),
        )
        held = {block for _, blocks in self.holds.values() for block in blocks}
        assert pool.free_blocks <= BLOCKS - len(held)
        if not self.holds and not self.loads:
            assert pool.free_blocks == BLOCKS and not self.asked
        for key, (_, blocks) in self.holds.items():
            described, parts = pool.describe(*key)
            assert described == blocks
            assert [token for part in parts for token in part] == self.committed[key]
        for event in pool.events():
            match event:
                case BlockStored():
                    assert not {*event.block_hashes} & self.published
                    assert event.parent_block_hash is None or event.parent_block_hash in self.published
                    self.published |= {*event.block_hashes}
                case BlockRemoved():
                    assert {*event.block_hashes} <= self.published
                    self.published -= {*event.block_hashes}
        assert pool.kept_blocks <= len(self.published) <= BLOCKS


class Copies:
    """Names of all blocks that have been committed, but for some that are lost."""

    def __init__(self) -> None:
        self.names: list[bytes] = []

    def keep(self, names: Sequence[bytes], blocks: Sequence[int]) -> None:
        assert len(names) == len(blocks) == len({*blocks})
        self.names = [*self.names, *(name for name in names if name not in self.names)]

    def taken(self, block: int) -> None:
        assert 0 <= block < BLOCKS

    def found(self, names: Sequence[bytes]) -> int:
        return next((place for place, name in enumerate(names) if name not in self.names), len(names))


class LoadingPoolMachine(PoolMachine):
    lower: Copies

    def __init__(self) -> None:
        self.lower = Copies()
        super().__init__()

    @precondition(lambda self: self.loads)
    @rule(data=st.data())
    def finish(self, data: Any) -> None:
        asked, load = self.loads.pop(data.draw(st.integers(0, len(self.loads) - 1)))
        good = data.draw(st.integers(0, len(load.names)))
        first = load.holding.blocks.index(load.blocks[0])
        for place, block in enumerate(load.blocks[:good], first):
            self.rows[block] = self.names(asked)[place]
        self.pool.loaded(load, good)
        self.serve()

    @precondition(lambda self: len(self.lower.names) > 8)
    @rule(data=st.data())
    def lose(self, data: Any) -> None:
        self.lower.names.pop(data.draw(st.integers(0, len(self.lower.names) - 1)))


TestPool = PoolMachine.TestCase
TestPool.settings = settings(drawn(40), stateful_step_count=100)
TestLoadingPool = LoadingPoolMachine.TestCase
TestLoadingPool.settings = settings(drawn(40), stateful_step_count=100)
