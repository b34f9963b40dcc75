"""Which group holds which block of the arena for which sequence, and which blocks of prompts are kept."""

from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from clo.kvstore.prefix import chain, first_parent, next_name, number
from clo.runtime.wire.errors import PromptTooLong, ProtocolError
from clo.runtime.wire.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEvent


class Grant(NamedTuple):
    """Blocks that a sequence of a group now holds; the first ``cached`` hold its first tokens already."""

    group: int
    sequence: int
    blocks: list[int]
    cached: int


class _Origin(NamedTuple):
    """What a committed block's name is made from, and how many blocks of its prompt were there already when
    its rows were computed: of a copy from below, all before it, as nobody knows."""

    parent: bytes
    place: int  # in its prompt
    tokens: "array[int]"
    behind: int


class Growth(NamedTuple):
    """Blocks that a sequence of a group holds from now on beside those that it has; none where it has to wait
    for them."""

    group: int
    sequence: int
    blocks: list[int]


class _Holding:
    """The blocks of one sequence, in the order of its tokens, and the tokens committed so far."""

    def __init__(
        self,
        blocks: list[int],
        prompt: "array[int]",
        root: bytes,
        names: list[bytes],
        cached: int,
        block_tokens: int,
    ) -> None:
        self.blocks = blocks
        self.prompt = prompt
        self.root = root  # what stands for the name before the first one
        self.names = names  # of the blocks of its prompt
        self.committed = cached  # of these, how many have been committed
        self.cached = cached  # of these, how many it does not compute itself
        self.anchors: dict[int, int] = {}  # by place: another block with the same tokens, held as well
        self.tokens = prompt[: cached * block_tokens]  # 4 bytes a token
        self._block_tokens = block_tokens

    @property
    def room(self) -> int:
        """Tokens for which it has blocks."""
        return len(self.blocks) * self._block_tokens


@dataclass(frozen=True, eq=False)
class Load:
    """Blocks whose rows are to be read before the sequence that they were taken for is granted them.

    Attributes:
        names: the names of the rows, in order.
        blocks: where each belongs; nobody else has them until ``BlockPool.loaded``.
    """

    group: int
    sequence: int
    names: list[bytes]
    blocks: list[int]
    holding: _Holding


class Lower(Protocol):
    """Where copies of committed blocks are that may have left the arena: ``clo.kvstore.disk``."""

    def keep(self, names: Sequence[bytes], blocks: Sequence[int]) -> None:
        """The committed blocks of a chain, from its beginning on, have come to be or are used."""

    def taken(self, block: int) -> None:
        """A committed block is one no longer; its rows will be overwritten."""

    def found(self, names: Sequence[bytes]) -> int:
        """How many of the names, from the first one on, can be loaded."""


@dataclass
class _Wait:
    """What a sequence in the queue waits for."""

    blocks: int
    prompt: "array[int]"
    root: bytes
    names: list[bytes]
    shareable: int  # blocks that it may share
    passed: int = 0  # new blocks that later ones were given meanwhile


class BlockPool:
    """Blocks 0 .. ``blocks - 1`` of ``block_tokens`` tokens each.

    A block is free, or held by one or several sequences, whose number is counted, or nobody holds it and it
    is *kept*: it has the tokens of a block of a prompt, under its name (``clo.kvstore.prefix``), until the
    space is needed. A sequence begins with the longest chain of blocks that are committed under the names of
    its prompt, and shares them with whoever else does.

    Only whole blocks of prompts are committed, and only once all their rows are there. What a sequence
    generates is not: its rows come from decode steps, which attend to a part of the context, and a prompt
    that goes on after it would get other rows there.

    Where there are no free blocks, those kept are taken whose last holder left first; of a chain the end goes
    before the beginning, since holders give their blocks back from the last one on.

    A group is one worker, or several that serve the same sequences together. A sequence gets its first blocks
    at once. One that has to wait queues. Later ones that fit pass it, so that a small request does not wait
    for a large one, but they get no more new blocks in all than it needs itself, so that it does not starve.
    Those that grow come before all of these, in the order of asking: who holds blocks already keeps them from
    others as long as it waits.

    Args:
        blocks: their number.
        block_tokens: tokens of a block.
        keep: whether blocks are committed at all.
        report: whether ``events`` says what becomes of those that are.
        lower: has copies of those that were; a prompt that goes on with them gets blocks at once, and is
            granted them when they have been loaded.
    """

    def __init__(
        self,
        blocks: int,
        block_tokens: int,
        *,
        keep: bool = True,
        report: bool = False,
        lower: Lower | None = None,
    ) -> None:
        self.blocks = blocks
        self.block_tokens = block_tokens
        self._keep = keep
        self._free = list(range(blocks - 1, -1, -1))  # a stack: the block given back last is used next
        self._holders = array("l", bytes(array("l").itemsize * blocks))  # by block
        self._held: dict[int, dict[int, _Holding]] = {}  # group -> sequence -> blocks
        self._waiting: OrderedDict[tuple[int, int], _Wait] = OrderedDict()  # by group and sequence
        self._growing: OrderedDict[tuple[int, int], int] = OrderedDict()  # further blocks that are waited for
        self._asked: list[tuple[int, int]] = []  # those of them that have not been answered yet
        self._by_name: dict[bytes, int] = {}  # committed blocks, held or kept
        self._names: dict[int, bytes] = {}  # by block
        self._origins: dict[int, _Origin] = {}  # by block; 4 bytes a token
        self._kept: OrderedDict[int, None] = OrderedDict()  # the next to be taken first
        self._lower = lower
        self._begun: list[Load] = []  # that ``loads`` has not told of
        self._loads: list[Load] = []  # all that are under way
        self._loaded: list[Load] = []  # whose sequences are to be granted their blocks
        self._report = report
        self._events: list[KVEvent] = [AllBlocksCleared()] if report else []
        self.asked_tokens = self.cached_tokens = 0  # of all prompts so far

    @property
    def free_blocks(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free) + len(self._kept)

    @property
    def kept_blocks(self) -> int:
        """How many of these are kept."""
        return len(self._kept)

    @property
    def sequences(self) -> int:
        """Sequences that hold blocks."""
        return sum(len(held) for held in self._held.values())

    @property
    def waiting(self) -> int:
        """Sequences that wait for blocks."""
        return len(self._waiting) + len(self._growing)

    def allocate(
        self,
        group: int,
        sequence: int,
        blocks: int,
        prompt: Sequence[int] = (),
        own: int = 1,
        salt: str = "",
        most: int = 0,
    ) -> None:
        """Put a sequence at the end of the queue; ``grants`` gives it its blocks.

        Args:
            blocks: number of blocks that it will hold, those included that it shares.
            prompt: its first tokens; empty where it begins with no rows that are there already, and leaves
                none to others.
            own: last tokens of the prompt that it has to compute itself.
            salt: it has blocks in common with prompts under the same one alone.
            most: blocks that it may hold once it has grown, where these are more.

        Raises:
            PromptTooLong: there are not that many blocks.
            ProtocolError: the sequence holds or awaits blocks already, or the prompt does not fit into them.
        """
        if max(blocks, most) > self.blocks:
            raise PromptTooLong(
                f"The request needs KV cache for {max(blocks, most) * self.block_tokens} tokens, the store "
                f"holds {self.blocks * self.block_tokens}: shorten the prompt, lower max_tokens or raise "
                "--kv-size."
            )
        if sequence in self._held.get(group, ()) or (group, sequence) in self._waiting:
            raise ProtocolError(f"Sequence {sequence} has asked for blocks before; free it first.")
        if len(prompt) > blocks * self.block_tokens:
            raise ProtocolError(f"{blocks} blocks do not hold a prompt of {len(prompt)} tokens.")
        tokens = array("i", prompt if self._keep else ())
        shared = max(0, len(tokens) - own) // self.block_tokens
        root = salt.encode()
        names = chain(tokens, self.block_tokens, root)
        self._waiting[group, sequence] = _Wait(blocks, tokens, first_parent(root), names, shared)

    def grow(self, group: int, sequence: int, blocks: int) -> None:
        """A sequence needs so many further blocks; ``grants`` gives them to it.

        Raises:
            PromptTooLong: there are not that many blocks.
            ProtocolError: the sequence holds none yet, or waits for further ones already.
        """
        holding = self._holding(group, sequence)
        if (group, sequence) in self._growing:
            raise ProtocolError(f"Sequence {sequence} waits for further blocks already.")
        if len(holding.blocks) + blocks > self.blocks:
            raise PromptTooLong(f"Sequence {sequence} cannot grow beyond the store's {self.blocks} blocks.")
        self._growing[group, sequence] = blocks
        self._asked.append((group, sequence))

    def grants(self) -> Iterator[Grant | Growth]:
        """Serve the queue as far as free blocks allow; call it after each ``allocate``, ``grow``, ``commit``
        and ``free``."""
        loaded, self._loaded = self._loaded, []
        for load in loaded:
            if self._holds(load):  # it may have gone
                blocks = list(load.holding.blocks)
                yield Grant(load.group, load.sequence, blocks, load.holding.committed)
        yield from self._growths()
        if self._growing:
            return
        ahead: list[tuple[_Wait, int]] = []  # those that go on waiting, so far, and new blocks that they need
        for (group, sequence), wait in list(self._waiting.items()):
            shared = self._match(wait)
            new = wait.blocks - len(shared)
            if not self._fits(wait, shared) or any(other.passed + new > needs for other, needs in ahead):
                ahead.append((wait, new))
                continue
            for other, _ in ahead:
                other.passed += new
            del self._waiting[group, sequence]
            self._hold(shared)
            blocks = shared + [self._take() for _ in range(new)]
            holding = _Holding(blocks, wait.prompt, wait.root, wait.names, len(shared), self.block_tokens)
            self._held.setdefault(group, {})[sequence] = holding
            if wait.shareable:
                self.asked_tokens += len(wait.prompt)
                self.cached_tokens += len(holding.tokens)
            if self._lower is not None:
                self._lower.keep(wait.names[: len(shared)], shared)
            if not self._load(group, sequence, wait, holding):
                yield Grant(group, sequence, list(blocks), len(shared))

    def _growths(self) -> Iterator[Growth]:
        """Serve those that grow, in the order of asking; who has just asked hears in any case."""
        asked, self._asked = self._asked, []
        for (group, sequence), blocks in list(self._growing.items()):
            if blocks > self.free_blocks:
                break
            del self._growing[group, sequence]
            taken = [self._take() for _ in range(blocks)]
            self._held[group][sequence].blocks.extend(taken)
            yield Growth(group, sequence, taken)
        for owner in asked:
            if owner in self._growing:
                yield Growth(*owner, [])

    def loads(self) -> list[Load]:
        """Those that have begun since this was called last. ``loaded`` has to be called for each."""
        begun, self._begun = self._begun, []
        return begun

    def loaded(self, load: Load, blocks: int) -> None:
        """The first so many blocks of a load have their rows, and nobody writes to the others any more. What
        ``grants`` can serve has changed."""
        self._loads.remove(load)
        if self._holds(load):
            tokens = load.holding.prompt[len(load.holding.tokens) :][: blocks * self.block_tokens]
            if load.holding.blocks[load.holding.committed :][:1] == load.blocks[:1]:
                load.holding.cached += blocks
                self.commit(load.group, load.sequence, len(load.holding.tokens), tokens.tolist())
                self.cached_tokens += len(tokens)
            self._loaded.append(load)
        for block in reversed(load.blocks):
            self._give_back(block)

    def commit(self, group: int, sequence: int, start: int, tokens: list[int]) -> int:
        """Record that ``tokens`` are in the blocks of a sequence from position ``start`` on, with all their
        rows. Blocks of its prompt that have become full are committed.

        Returns:
            Their number. Who waits may share them, and so need fewer others.

        Raises:
            ProtocolError: the sequence holds no blocks, ``start`` is not the next position, or the tokens go
                beyond the blocks.
        """
        holding = self._holding(group, sequence)
        if start != len(holding.tokens):
            raise ProtocolError(
                f"Sequence {sequence} holds {len(holding.tokens)} tokens; a commit cannot start at {start}."
            )
        if start + len(tokens) > holding.room:
            raise ProtocolError(
                f"Sequence {sequence} has room for {holding.room} tokens, not for {start + len(tokens)}."
            )
        expected = holding.prompt[start : start + len(tokens)]
        if array("i", tokens[: len(expected)]) != expected:
            raise ProtocolError(f"Sequence {sequence} commits other tokens than those of its prompt.")
        holding.tokens.extend(tokens)
        full = min(len(holding.tokens) // self.block_tokens, len(holding.names))
        for place in range(holding.committed, full):
            name, block = holding.names[place], holding.blocks[place]
            first = self._by_name.setdefault(name, block)
            if first == block:
                self._names[block] = name
                parent = holding.names[place - 1] if place else holding.root
                part, behind = self._part(holding.prompt, place), min(place, holding.cached)
                self._origins[block] = _Origin(parent, place, part, behind)
                if self._report:
                    self._stored(holding, place)
            else:  # another sequence was faster: held, it goes no earlier than what follows on it
                holding.anchors[place] = first
                self._hold([first])
        new = max(0, full - holding.committed)
        holding.committed += new
        if new and self._lower is not None:
            names = holding.names[: holding.committed]
            self._lower.keep(names, [self._by_name[name] for name in names])
        return new

    def events(self) -> list[KVEvent]:
        """What has changed since this was called last, where it is reported."""
        events, self._events = self._events, []
        return events

    def free(self, group: int, sequence: int) -> int:
        """Take back the blocks of a sequence, or withdraw it from the queue.

        Returns the number of blocks that it held; those that another sequence holds too do not become free.
        """
        self._waiting.pop((group, sequence), None)
        self._growing.pop((group, sequence), None)
        held = self._held.get(group, {})
        if sequence not in held:
            return 0
        holding = held.pop(sequence)
        if not held:
            del self._held[group]
        for place in range(len(holding.blocks) - 1, -1, -1):
            self._give_back(holding.blocks[place])
            if place in holding.anchors:
                self._give_back(holding.anchors[place])
        return len(holding.blocks)

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
        """Raises ``AssertionError``, with what is wrong, unless each block is free or kept once or counted as
        often as it is held, names and blocks agree, the tokens fit into their blocks and nobody waits without
        need."""
        held = [0] * self.blocks
        for group, sequences in self._held.items():
            for sequence, holding in sequences.items():
                name = f"Sequence {sequence} of group {group}"
                if not holding.blocks or len(holding.tokens) > holding.room:
                    raise AssertionError(
                        f"{name} holds {len(holding.tokens)} tokens in {len(holding.blocks)} blocks."
                    )
                if (group, sequence) in self._waiting:
                    raise AssertionError(f"{name} holds blocks and waits.")
                for block in [*holding.blocks, *holding.anchors.values()]:
                    held[block] += 1
                for place in range(holding.committed):
                    block = holding.anchors.get(place, holding.blocks[place])
                    if self._by_name.get(holding.names[place]) != block:
                        raise AssertionError(f"{name} has committed block {block}, which has another name.")
        for load in self._loads:
            for block in load.blocks:
                held[block] += 1
        if self._holders.tolist() != held:
            raise AssertionError(f"Blocks are held {held} times and counted {self._holders.tolist()} times.")
        free = [block for block in range(self.blocks) if not held[block] and block not in self._kept]
        if sorted(self._free) != free:
            raise AssertionError(f"Free blocks are {free} and listed as {sorted(self._free)}.")
        if {block: name for name, block in self._by_name.items()} != self._names:
            raise AssertionError("Names lead to other blocks than blocks to names.")
        idle = {block for block in self._names if not held[block]}
        if idle != self._kept.keys():
            raise AssertionError(
                f"Kept are {sorted(self._kept)}, and named and held by nobody {sorted(idle)}."
            )
        for (group, sequence), blocks in self._growing.items():
            if sequence not in self._held.get(group, ()):
                raise AssertionError(f"Sequence {sequence} of group {group} grows and holds nothing.")
            if (group, sequence) == next(iter(self._growing)) and blocks <= self.free_blocks:
                raise AssertionError(f"A sequence cannot grow although {self.free_blocks} blocks are free.")
        if self._waiting and not self._growing:
            wait = next(iter(self._waiting.values()))
            if self._fits(wait, self._match(wait)):
                raise AssertionError(f"The queue waits although {self.free_blocks} blocks are free.")

    def check_names(self) -> None:
        """Raises ``AssertionError``, with what is wrong, unless each committed block has the name that the
        tokens in it and before it give, the block before it is committed too, and those who share it have
        these tokens in their prompts. It takes some microseconds for each block."""
        if self._origins.keys() != self._names.keys():
            raise AssertionError("Other blocks have tokens than have names.")
        for block, origin in self._origins.items():
            if len(origin.tokens) != self.block_tokens:
                raise AssertionError(f"Block {block} is committed with {len(origin.tokens)} tokens.")
            if self._names[block] != next_name(origin.parent, origin.tokens):
                raise AssertionError(f"Block {block} has another name than its tokens.")
            if origin.place:
                before = self._by_name.get(origin.parent)
                if before is None or self._origins[before].place != origin.place - 1:
                    raise AssertionError(f"Block {block} is committed, and the block before it is not.")
        for group, sequences in self._held.items():
            for sequence, holding in sequences.items():
                for place in range(holding.committed):
                    block = holding.anchors.get(place, holding.blocks[place])
                    tokens = self._part(holding.prompt, place)
                    if block not in self._origins or self._origins[block].tokens != tokens:
                        name = f"Sequence {sequence} of group {group}"
                        raise AssertionError(f"{name} shares block {block}, which has other tokens.")

    def committed(self, places: int) -> list[bytes]:
        """Names of the committed blocks that are among the first ``places`` ones of a prompt."""
        return [self._names[block] for block, origin in self._origins.items() if origin.place < places]

    def prompt_of(self, name: bytes) -> tuple[int, list[int], int] | None:
        """The block of a name, all tokens of a prompt up to its end, and how many of these were in blocks
        already when its rows were computed, at most; None where it is not committed."""
        parts: list[array[int]] = []
        first = block = self._by_name.get(name)
        while block is not None:
            origin = self._origins[block]
            parts.append(origin.tokens)
            if not origin.place:
                assert first is not None
                behind = self._origins[first].behind * self.block_tokens
                return first, [token for part in reversed(parts) for token in part], behind
            block = self._by_name.get(origin.parent) if len(parts) < self.blocks else None
        return None

    def _part(self, prompt: "array[int]", place: int) -> "array[int]":
        """The tokens of one block of a prompt."""
        return prompt[place * self.block_tokens : (place + 1) * self.block_tokens]

    def _match(self, wait: _Wait) -> list[int]:
        """Committed blocks of a prompt, from its first one on."""
        blocks = []
        for name in wait.names[: wait.shareable]:
            block = self._by_name.get(name)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _fits(self, wait: _Wait, shared: list[int]) -> bool:
        """Whether a sequence can be served that shares these blocks: there is room for the others, and the
        next one is not being loaded for somebody else, with whom it can share that, too."""
        following = wait.names[len(shared) : wait.shareable][:1]
        if any(load.names[: len(following)] == following for load in self._loads if following):
            return False
        return wait.blocks - len(shared) <= self._takeable(shared)

    def _load(self, group: int, sequence: int, wait: _Wait, holding: _Holding) -> bool:
        """Begin to load what a sequence that has just got its blocks goes on with; whether there is any."""
        if self._lower is None:
            return False
        first = holding.committed
        names = wait.names[first : min(wait.shareable, len(holding.blocks))]
        names = names[: self._lower.found(names)]
        if not names:
            return False
        load = Load(group, sequence, names, holding.blocks[first : first + len(names)], holding)
        self._hold(load.blocks)
        self._loads.append(load)
        self._begun.append(load)
        return True

    def _holds(self, load: Load) -> bool:
        """Whether a load's sequence has still the blocks that it was begun for."""
        return self._held.get(load.group, {}).get(load.sequence) is load.holding

    def _takeable(self, shared: list[int]) -> int:
        """Blocks that can be taken beside those shared."""
        return self.free_blocks - sum(block in self._kept for block in shared)

    def _take(self) -> int:
        """A block for new rows, held once."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._kept.popitem(last=False)
            name = self._names.pop(block)
            del self._by_name[name], self._origins[block]
            if self._lower is not None:
                self._lower.taken(block)
            if self._report:
                self._events.append(BlockRemoved([number(name)]))
        self._holders[block] += 1
        return block

    def _hold(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self._holders[block] += 1
            self._kept.pop(block, None)

    def _give_back(self, block: int) -> None:
        self._holders[block] -= 1
        if self._holders[block]:
            return
        if block in self._names:
            self._kept[block] = None
        else:
            self._free.append(block)

    def _stored(self, holding: _Holding, place: int) -> None:
        """Report that a block of a prompt has been committed."""
        names, tokens = holding.names, self._part(holding.prompt, place).tolist()
        parent = number(names[place - 1]) if place else None
        self._events.append(BlockStored([number(names[place])], parent, tokens, self.block_tokens))

    def _holding(self, group: int, sequence: int) -> _Holding:
        holding = self._held.get(group, {}).get(sequence)
        if holding is None:
            raise ProtocolError(f"Sequence {sequence} holds no blocks.")
        return holding
