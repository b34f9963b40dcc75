"""Which group holds which block of the arena for which sequence, and which tokens are in it."""

from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from clo.runtime.wire.errors import PromptTooLong, ProtocolError


class Grant(NamedTuple):
    """Blocks that a sequence of a group now holds."""

    group: int
    sequence: int
    blocks: list[int]


class _Holding:
    """The blocks of one sequence, in the order of its tokens, and the tokens committed so far."""

    def __init__(self, blocks: list[int]) -> None:
        self.blocks = blocks
        self.tokens = array("i")  # 4 bytes a token


@dataclass
class _Wait:
    """What a sequence in the queue waits for: new blocks after the shared ones, which it holds already."""

    shared: list[int]
    new: int
    passed: int = 0  # new blocks that later ones were given meanwhile


class BlockPool:
    """Blocks 0 .. ``blocks - 1`` of ``block_tokens`` tokens each.

    A block is free, or held by one or several sequences, whose number is counted. A group is one worker, or
    several that serve the same sequences together. A sequence gets all its blocks at once. One that has to
    wait queues. Later ones that fit pass it, so that a small request does not wait for a large one, but they
    get no more blocks in all than it asks for itself, so that it does not starve.
    """

    def __init__(self, blocks: int, block_tokens: int) -> None:
        self.blocks = blocks
        self.block_tokens = block_tokens
        self._free = list(range(blocks - 1, -1, -1))  # a stack: the block given back last is used next
        self._holders = array("l", bytes(array("l").itemsize * blocks))  # by block
        self._held: dict[int, dict[int, _Holding]] = {}  # group -> sequence -> blocks
        self._waiting: OrderedDict[tuple[int, int], _Wait] = OrderedDict()  # by group and sequence

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    @property
    def sequences(self) -> int:
        """Sequences that hold blocks."""
        return sum(len(held) for held in self._held.values())

    @property
    def waiting(self) -> int:
        """Sequences that wait for blocks."""
        return len(self._waiting)

    def allocate(self, group: int, sequence: int, blocks: int, shared: Sequence[int] = ()) -> None:
        """Put a sequence at the end of the queue; ``grants`` gives it its blocks.

        Args:
            blocks: number of blocks that it will hold, including the shared ones.
            shared: blocks with its first tokens that other sequences hold already; from now on this one holds
                them too.

        Raises:
            PromptTooLong: there are not that many blocks.
            ProtocolError: the sequence holds or awaits blocks already, or a shared block is free.
        """
        if blocks > self.blocks:
            raise PromptTooLong(
                f"The request needs KV cache for {blocks * self.block_tokens} tokens, the store holds "
                f"{self.blocks * self.block_tokens}: shorten the prompt, lower max_tokens or raise --kv-size."
            )
        if sequence in self._held.get(group, ()) or (group, sequence) in self._waiting:
            raise ProtocolError(f"Sequence {sequence} has asked for blocks before; free it first.")
        for block in shared:
            if not (0 <= block < self.blocks and self._holders[block]):
                raise ProtocolError(f"Block {block} is held by no sequence and cannot be shared.")
        self._take(shared)
        self._waiting[group, sequence] = _Wait(list(shared), max(0, blocks - len(shared)))

    def grants(self) -> Iterator[Grant]:
        """Serve the queue as far as free blocks allow; call it after each ``allocate`` and ``free``."""
        ahead: list[_Wait] = []  # those that go on waiting, so far
        for (group, sequence), wait in list(self._waiting.items()):
            new = wait.new
            if new > len(self._free) or any(other.passed + new > other.new for other in ahead):
                ahead.append(wait)
                continue
            for other in ahead:
                other.passed += new
            del self._waiting[group, sequence]
            start = len(self._free) - new
            own = self._free[start:][::-1]
            del self._free[start:]
            self._take(own)
            blocks = [*wait.shared, *own]
            self._held.setdefault(group, {})[sequence] = _Holding(blocks)
            yield Grant(group, sequence, list(blocks))

    def commit(self, group: int, sequence: int, start: int, tokens: list[int]) -> None:
        """Record that ``tokens`` are in the blocks of a sequence from position ``start`` on.

        Raises:
            ProtocolError: the sequence holds no blocks, ``start`` is not the next position, or the tokens go
                beyond the blocks.
        """
        holding = self._holding(group, sequence)
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

    def free(self, group: int, sequence: int) -> int:
        """Take back the blocks of a sequence, or withdraw it from the queue.

        Returns the number of blocks that it held; those that another sequence holds too do not become free.
        """
        wait = self._waiting.pop((group, sequence), None)
        if wait is not None:
            self._give_back(wait.shared)
        held = self._held.get(group, {})
        if sequence not in held:
            return 0
        blocks = held.pop(sequence).blocks
        if not held:
            del self._held[group]
        self._give_back(blocks)
        return len(blocks)

    def free_group(self, group: int) -> int:
        """``free`` every sequence of a group. Returns the number of blocks."""
        waiting = [sequence for owner, sequence in self._waiting if owner == group]
        return sum(self.free(group, sequence) for sequence in [*waiting, *self._held.get(group, ())])

    def blocks_of(self, group: int, sequence: int) -> list[int]:
        """The blocks of a sequence, in order.

        Raises:
            ProtocolError: the sequence holds no blocks.
        """
        return list(self._holding(group, sequence).blocks)

    def describe(self, group: int, sequence: int) -> tuple[list[int], list[list[int]]]:
        """The blocks of a sequence and the tokens that each one holds.

        Raises:
            ProtocolError: the sequence holds no blocks.
        """
        holding = self._holding(group, sequence)
        starts = range(0, len(holding.blocks) * self.block_tokens, self.block_tokens)
        tokens = [holding.tokens[start : start + self.block_tokens].tolist() for start in starts]
        return list(holding.blocks), tokens

    def check_integrity(self) -> None:
        """Raises ``AssertionError``, with what is wrong, unless each block is free once or counted as often
        as it is held, the tokens fit into their blocks and nobody waits without need."""
        held = [0] * self.blocks
        for group, sequences in self._held.items():
            for sequence, holding in sequences.items():
                name = f"Sequence {sequence} of group {group}"
                if not holding.blocks or len(holding.tokens) > len(holding.blocks) * self.block_tokens:
                    raise AssertionError(
                        f"{name} holds {len(holding.tokens)} tokens in {len(holding.blocks)} blocks."
                    )
                if (group, sequence) in self._waiting:
                    raise AssertionError(f"{name} holds blocks and waits.")
                for block in holding.blocks:
                    held[block] += 1
        for wait in self._waiting.values():
            for block in wait.shared:
                held[block] += 1
        if self._holders.tolist() != held:
            raise AssertionError(f"Blocks are held {held} times and counted {self._holders.tolist()} times.")
        free = [block for block in range(self.blocks) if not held[block]]
        if sorted(self._free) != free:
            raise AssertionError(f"Free blocks are {free} and listed as {sorted(self._free)}.")
        if self._waiting and next(iter(self._waiting.values())).new <= len(self._free):
            raise AssertionError(f"The queue waits although {len(self._free)} blocks are free.")

    def _take(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self._holders[block] += 1

    def _give_back(self, blocks: list[int]) -> None:
        for block in reversed(blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free.append(block)

    def _holding(self, group: int, sequence: int) -> _Holding:
        holding = self._held.get(group, {}).get(sequence)
        if holding is None:
            raise ProtocolError(f"Sequence {sequence} holds no blocks.")
        return holding
