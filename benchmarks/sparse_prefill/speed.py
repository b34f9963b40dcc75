"""Sparse and dense attention of a chunk at the Llama-3-8B shape, on random queries and rows.

Random queries look everywhere alike, so the blocks that are attended are drawn at random too, in a given
number; what choosing them costs does not depend on what is chosen.
"""

from functools import partial

import torch

from benchmarks.gpu.ceilings import seconds
from benchmarks.gpu.synthetic import LLAMA_8B
from benchmarks.result import Result
from clo.kernels.attend_prompt import attend_prompt
from clo.kernels.sparse_prompt import BLOCK, ChosenBlocks, attend_chosen, choose_blocks, weigh_blocks

CHUNK = 8192
LENGTHS = (32768, 131072, 1048576)
SHARES = (0.05, 0.1, 0.2)


@torch.inference_mode()
def measure() -> list[Result]:
    results = []
    for total in LENGTHS:
        results += measure_length(total)
        torch.cuda.empty_cache()
    return results


def measure_length(total: int) -> list[Result]:
    """The last chunk of a prompt of so many tokens."""
    shape = LLAMA_8B.shape
    scale = shape.head_dim**-0.5
    rows = torch.empty(
        total, shape.kv_heads, 2, shape.head_dim, dtype=shape.dtype, device="cuda"
    ).normal_()  # fmt: skip
    query = torch.randn(CHUNK, shape.query_heads, shape.head_dim, dtype=shape.dtype, device="cuda")
    past = rows[:-CHUNK]
    _, own_lse = attend_prompt(query, rows[-CHUNK:], scale)
    weights = weigh_blocks(query, past[:, :, 0], own_lse, scale)
    dense = seconds(partial(attend_prompt, query, rows, scale), 5)
    own = seconds(partial(attend_prompt, query, rows[-CHUNK:], scale))
    weigh = seconds(partial(weigh_blocks, query, past[:, :, 0], own_lse, scale))
    choose = seconds(partial(choose_blocks, weights, 0.5))
    case = f"speed/{total // 1024}k"
    results = [
        Result(case, "dense", dense * 1e3, "ms"),
        Result(case, "own square", own * 1e3, "ms", dense * 1e3, own / dense),
        Result(case, "weighing blocks", weigh * 1e3, "ms", dense * 1e3, weigh / dense),
        Result(case, "listing blocks", choose * 1e3, "ms", dense * 1e3, choose / dense),
    ]
    for share in SHARES:
        chosen = drawn(len(past) // BLOCK, share)
        sparse = seconds(partial(attend_chosen, query, past, chosen, scale))
        took = own + weigh + choose + sparse
        results += [
            Result(case, f"chosen {share:.0%}", sparse * 1e3, "ms", dense * 1e3, sparse / dense),
            Result(case, f"dense / all with {share:.0%}", dense / took, "times faster"),
        ]
    return results


def drawn(blocks: int, share: float) -> ChosenBlocks:
    """Random lists of so large a share of the blocks, in rising order."""
    heads, per_chunk, count = LLAMA_8B.query_heads, CHUNK // BLOCK, round(share * blocks)
    numbers = torch.rand(heads, per_chunk, blocks, device="cuda").topk(count).indices.sort(-1).values.int()
    counts = torch.full((heads, per_chunk), count, dtype=torch.int32, device="cuda")
    return ChosenBlocks(numbers, counts)
