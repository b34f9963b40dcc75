"""Which sequence owns which block of the arena, and which tokens stand in it."""

from array import array
from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

from clo.runtime.wire.errors import PromptTooLong, ProtocolError


class Grant(NamedTuple):
    """Blocks that a sequence of a worker now owns."""

    worker: int
    sequence: int
    blocks: list[int]


class _Holding:
    """The blocks of one sequence, in the order of its tokens, and the tokens committed so far."""

    def __init__(self, blocks: list[int]) -> None:
        self.blocks = blocks
        self.tokens = array("i")  # 4 bytes a token


class BlockPool:
    """Blocks 0 .. ``blocks - 1`` of ``block_tokens`` tokens each.

    A sequence gets all its blocks at once. One that has to wait stands in a queue, and no later one passes
    the head of the queue: large requests do not starve.
    """

    def __init__(self, blocks: int, block_tokens: int) -> None:
        self.blocks = blocks
        self.block_tokens = block_tokens
        self._free = list(range(blocks - 1, -1, -1))  # a stack: the block given back last is used next
        self._held: dict[int, dict[int, _Holding]] = {}  # worker -> sequence -> blocks
        self._waiting: OrderedDict[tuple[int, int], int] = OrderedDict()  # (worker, sequence) -> blocks

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    @property
    def sequences(self) -> int:
        """Sequences that own blocks."""
        return sum(len(held) for held in self._held.values())

    @property
    def waiting(self) -> int:
        """Sequences that wait for blocks."""
        return len(self._waiting)

    def allocate(self, worker: int, sequence: int, blocks: int) -> None:
        """Put a sequence at the end of the queue; ``grants`` gives it its blocks.

        Raises:
            PromptTooLong: there are not that many blocks.
            ProtocolError: the sequence owns or awaits blocks already.
        """
        if blocks > self.blocks:
            raise PromptTooLong(
                f"The request needs KV cache for {blocks * self.block_tokens} tokens, the store holds "
                f"{self.blocks * self.block_tokens}: shorten the prompt, lower max_tokens or raise --kv-size."
            )
        if sequence in self._held.get(worker, ()) or (worker, sequence) in self._waiting:
            raise ProtocolError(f"Sequence {sequence} has asked for blocks before; free it first.")
        self._waiting[worker, sequence] = blocks

    def grants(self) -> Iterator[Grant]:
        """Serve the queue as far as free blocks allow; call it after each ``allocate`` and ``free``."""
        while self._waiting:
            (worker, sequence), count = next(iter(self._waiting.items()))
            if count > len(self._free):
                return
            del self._waiting[worker, sequence]
            blocks = self._free[: -count - 1 : -1]
            del self._free[-count:]
            self._held.setdefault(worker, {})[sequence] = _Holding(blocks)
            yield Grant(worker, sequence, list(blocks))

    def commit(self, worker: int, sequence: int, start: int, tokens: list[int]) -> None:
        """Record that ``tokens`` stand in the blocks of a sequence from position ``start`` on.

        Raises:
            ProtocolError: the sequence owns no blocks, ``start`` is not the next position, or the tokens go
                beyond the blocks.
        """
        holding = self._holding(worker, sequence)
        if start != len(holding.tokens):
            raise ProtocolError(
                f"Sequence {sequence} holds {len(holding.tokens)} tokens; a commit cannot start at {start}."
            )
        room = len(holding.blocks) * self.block_tokens
        if start + len(tokens) > room:
            raise ProtocolError(
                f"Sequence {sequence} has room for {room} tokens, not for {start + len(tokens)}."
            )
        holding.tokens.extend(tokens)

    def free(self, worker: int, sequence: int) -> int:
        """Take back the blocks of a sequence, or withdraw it from the queue. Returns the number of blocks."""
        self._waiting.pop((worker, sequence), None)
        held = self._held.get(worker, {})
        if sequence not in held:
            return 0
        blocks = held.pop(sequence).blocks
        if not held:
            del self._held[worker]
        self._free.extend(reversed(blocks))
        return len(blocks)

    def free_worker(self, worker: int) -> int:
        """``free`` every sequence of a worker. Returns the number of blocks."""
        waiting = [sequence for owner, sequence in self._waiting if owner == worker]
        return sum(self.free(worker, sequence) for sequence in [*waiting, *self._held.get(worker, ())])

    def blocks_of(self, worker: int, sequence: int) -> list[int]:
        """The blocks of a sequence, in order.

        Raises:
            ProtocolError: the sequence owns no blocks.
        """
        return list(self._holding(worker, sequence).blocks)

    def describe(self, worker: int, sequence: int) -> tuple[list[int], list[list[int]]]:
        """The blocks of a sequence and the tokens that each one holds.

        Raises:
            ProtocolError: the sequence owns no blocks.
        """
        holding = self._holding(worker, sequence)
        starts = range(0, len(holding.blocks) * self.block_tokens, self.block_tokens)
        tokens = [holding.tokens[start : start + self.block_tokens].tolist() for start in starts]
        return list(holding.blocks), tokens

    def check_integrity(self) -> None:
        """Raises ``AssertionError``, with what is wrong, unless each block is free or owned exactly once, the
        tokens fit into their blocks and nobody waits without need."""
        owner: dict[int, str] = {}
        free = ("the free list", self._free)
        held = [
            (f"sequence {sequence} of worker {worker}", holding.blocks)
            for worker, sequences in self._held.items()
            for sequence, holding in sequences.items()
        ]
        for name, blocks in (free, *held):
            for block in blocks:
                if block in owner:
                    raise AssertionError(f"Block {block} is in {owner[block]} and in {name}.")
                owner[block] = name
        if owner.keys() != set(range(self.blocks)):
            raise AssertionError(f"Of {self.blocks} blocks these are known: {sorted(owner)}.")
        for worker, sequences in self._held.items():
            for sequence, holding in sequences.items():
                if not holding.blocks or len(holding.tokens) > len(holding.blocks) * self.block_tokens:
                    raise AssertionError(
                        f"Sequence {sequence} of worker {worker} holds {len(holding.tokens)} tokens "
                        f"in {len(holding.blocks)} blocks."
                    )
                if (worker, sequence) in self._waiting:
                    raise AssertionError(f"Sequence {sequence} of worker {worker} owns blocks and waits.")
        if self._waiting and next(iter(self._waiting.values())) <= len(self._free):
            raise AssertionError(f"The queue waits although {len(self._free)} blocks are free.")

    def _holding(self, worker: int, sequence: int) -> _Holding:
        holding = self._held.get(worker, {}).get(sequence)
        if holding is None:
            raise ProtocolError(f"Sequence {sequence} owns no blocks.")
        return holding
