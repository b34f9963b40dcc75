"""Pages of the index: which block has which, counted by those who hold the block."""

import random

import pytest

from clo.gpu_worker.cache.pages import IndexPages


def test_a_block_keeps_its_page_until_its_last_holder_is_gone() -> None:
    pages = IndexPages(4)
    first = pages.acquire([70, 80])
    second = pages.acquire([80, 90])
    assert second[0] == first[1], "one block, one page"
    assert len({*first, *second}) == 3
    pages.release([70, 80])
    pages.check_integrity()
    assert pages.acquire([80]) == [first[1]]
    pages.release([80, 90])
    pages.release([80])
    pages.check_integrity()
    assert sorted(pages.acquire([1, 2, 3, 4])) == [0, 1, 2, 3], "all are free again"


def test_pages_that_are_exhausted_change_nothing() -> None:
    pages = IndexPages(3)
    held = pages.acquire([1, 2])
    with pytest.raises(RuntimeError, match="1 free pages and 2 are wanted"):
        pages.acquire([1, 3, 4])
    pages.check_integrity()
    assert pages.acquire([1, 2]) == held, "blocks that have pages want none"
    assert len(pages.acquire([2, 3])) == 2
    with pytest.raises(RuntimeError):
        pages.acquire([4])


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ("lost", "pages free or used more than once"),
        ("twice", "pages free or used more than once"),
        ("nobody's", "a page belongs to a block that nobody holds$"),
        ("not counted", "a block is held by no sequence$"),
    ],
)
def test_check_integrity_names_damage(damage: str, sentence: str) -> None:
    pages = IndexPages(3)
    pages.acquire([1])
    match damage:
        case "lost":
            pages._free.pop()
        case "twice":
            pages._free.append(pages._page[1])
        case "nobody's":
            del pages._holders[1]
        case "not counted":
            pages._holders[1] = 0
    with pytest.raises(AssertionError, match=f"^{sentence}"):
        pages.check_integrity()


@pytest.mark.parametrize("seed", range(5))
def test_random_holders_agree_on_the_page_of_every_block(seed: int) -> None:
    rng = random.Random(seed)
    pages = IndexPages(12)
    held: list[tuple[list[int], list[int]]] = []  # blocks and their pages
    for _ in range(500):
        if held and rng.random() < 0.5:
            blocks, _ = held.pop(rng.randrange(len(held)))
            pages.release(blocks)
        else:
            blocks = rng.sample(range(30), rng.randint(1, 4))
            used = {block for others, _ in held for block in others}
            if len(used | set(blocks)) > pages.pages:
                with pytest.raises(RuntimeError):
                    pages.acquire(blocks)
            else:
                held.append((blocks, pages.acquire(blocks)))
        pages.check_integrity()
        of_block: dict[int, int] = {}
        for blocks, found in held:
            for block, page in zip(blocks, found, strict=True):
                assert of_block.setdefault(block, page) == page, "two pages of one block"
        assert len(set(of_block.values())) == len(of_block), "two blocks in one page"
