"""Pages of a worker's index: as many as its sequences can need, however large the arena is."""


class IndexPages:
    """Which page holds the codes of which block of the arena.

    Several sequences may hold the same block; its page is counted, and is free again when the last of them
    has released it. Calls must come in the order in which the device does the work that they belong to.

    Args:
        pages: number of pages in the index.
    """

    def __init__(self, pages: int) -> None:
        self._free = list(range(pages - 1, -1, -1))  # a stack: the page given back last is used next
        self._page: dict[int, int] = {}  # by block
        self._holders: dict[int, int] = {}  # by block
        self.pages = pages

    def acquire(self, blocks: list[int]) -> list[int]:
        """Pages of the blocks, in their order; a block that has none gets one.

        Raises:
            RuntimeError: there are not enough pages.
        """
        missing = sum(block not in self._page for block in blocks)
        if missing > len(self._free):
            raise RuntimeError(f"The index has {len(self._free)} free pages and {missing} are wanted.")
        for block in blocks:
            if block not in self._page:
                self._page[block] = self._free.pop()
                self._holders[block] = 0
            self._holders[block] += 1
        return [self._page[block] for block in blocks]

    def release(self, blocks: list[int]) -> None:
        """Give back what one ``acquire`` of the same blocks took."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                del self._holders[block]
                self._free.append(self._page.pop(block))

    def check_integrity(self) -> None:
        """Raises ``AssertionError`` unless each page is free or belongs to exactly one block that is held."""
        pages = sorted([*self._free, *self._page.values()])
        assert pages == list(range(self.pages)), f"pages free or used more than once: {pages}"
        assert self._page.keys() == self._holders.keys(), "a page belongs to a block that nobody holds"
        assert all(count > 0 for count in self._holders.values()), "a block is held by no sequence"
