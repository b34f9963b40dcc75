"""Attention of a prompt over chosen blocks on a GPU: the library's kernels against plain products."""

import pytest
import torch

from clo.kernels.attend_prompt import attend_prompt
from clo.kernels.sparse_prompt import (
    ChosenBlocks,
    attend_chosen,
    attend_prompt_sparse,
    choose_blocks,
)
from clo.kernels.weigh_blocks import BLOCK, weigh_blocks
from tests.cuda_tensors import error, random_prompt

pytestmark = pytest.mark.gpu

SCALE = 0.1
shapes = pytest.mark.parametrize(
    ("kv_heads", "group", "dim"), [(3, 3, 64), (8, 4, 128), (4, 1, 128), (1, 8, 64)]
)
counts = pytest.mark.parametrize(("count", "total"), [(512, 4096), (300, 2333), (1, 1000), (64, 64)])


@pytest.fixture(autouse=True)
def package() -> None:
    pytest.importorskip("cudnn", "1.32", reason="needs the package nvidia-cudnn-frontend, 1.32 or later")


@shapes
@counts
def test_all_blocks_are_exact(kv_heads: int, group: int, dim: int, count: int, total: int) -> None:
    query, rows = random_prompt(count, total, kv_heads, group, dim)
    found, found_lse = attend_prompt_sparse(query, rows, SCALE, float, dense_tokens=0, own_tokens=0)
    expected, lse = attend_prompt(query.float(), rows.float(), SCALE)
    assert found.dtype == query.dtype and error(found, expected) < 0.01
    torch.testing.assert_close(found_lse, lse, rtol=1e-3, atol=2e-3)


@shapes
@pytest.mark.parametrize("count", [512, 300])
def test_each_block_of_queries_attends_to_its_own_blocks(
    kv_heads: int, group: int, dim: int, count: int
) -> None:
    blocks = 40
    query, rows = random_prompt(count, blocks * BLOCK, kv_heads, group, dim)
    drawn = torch.rand(kv_heads * group, -(-count // BLOCK), blocks, device="cuda")
    numbers = drawn.argsort(-1).int()
    sizes = torch.randint(1, blocks + 1, drawn.shape[:2], dtype=torch.int32, device="cuda")
    behind = torch.arange(blocks, device="cuda") >= sizes.unsqueeze(2)
    chosen = ChosenBlocks(numbers.masked_fill(behind, 2**30), sizes)  # which must not be read
    out, lse = attend_chosen(query, rows, chosen, SCALE)
    expected, sums = attend_chosen(query.float(), rows.float(), chosen, SCALE)
    assert error(out, expected) < 0.01
    torch.testing.assert_close(lse, sums, rtol=1e-3, atol=2e-3)


@shapes
@pytest.mark.parametrize("count", [512, 300])
def test_weights_of_blocks(kv_heads: int, group: int, dim: int, count: int) -> None:
    blocks = 71  # more than a program takes
    query, rows = random_prompt(count, blocks * BLOCK, kv_heads, group, dim)
    own = torch.randn(count, kv_heads * group, device="cuda") + 5
    found = weigh_blocks(query, rows[:, :, 0], own, SCALE)
    expected = weigh_blocks(query.cpu().float(), rows[:, :, 0].cpu().float(), own.cpu(), SCALE)
    torch.testing.assert_close(found.cpu(), expected, rtol=0.02, atol=1e-5)


def test_nothing_waits_for_the_device() -> None:
    query, rows = random_prompt(512, 4096, 8, 4, 128)
    expected, _ = attend_prompt_sparse(query, rows, SCALE, dense_tokens=0, own_tokens=0)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        found, _ = attend_prompt_sparse(query, rows, SCALE, dense_tokens=0, own_tokens=0)
        _, own_lse = attend_prompt(query, rows[-512:], SCALE)
        choose_blocks(weigh_blocks(query, rows[:-512, :, 0], own_lse, SCALE), 9.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found, expected)
