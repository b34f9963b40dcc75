"""Sparse and dense attention of the last chunk of a prompt at the Llama-3-8B shape.

SYNTHETIC: queries and rows are random. Which blocks are chosen means nothing then, but they are as many as
those of a real prompt.
"""

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.gpu.ceilings import seconds
from benchmarks.gpu.synthetic import LLAMA_8B
from benchmarks.result import Result
from clo.kernels.attend_prompt import attend_prompt
from clo.kernels.sparse_prompt import (
    attend_chosen,
    attend_prompt_sparse,
    choose_blocks,
    default_budget,
)
from clo.kernels.weigh_blocks import BLOCK, weigh_blocks

CHUNK = 8192
LENGTHS = (32768, 131072, 1048576)


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
    size = total, shape.kv_heads, 2, shape.head_dim
    rows = torch.empty(size, dtype=shape.dtype, device="cuda").normal_()
    query = torch.randn(CHUNK, shape.query_heads, shape.head_dim, dtype=shape.dtype, device="cuda")
    past, own = rows[:-CHUNK], rows[-CHUNK:]
    budget = default_budget(len(past) // BLOCK)
    _, own_lse = attend_prompt(query, own, scale)
    weights = weigh_blocks(query, past[:, :, 0], own_lse, scale)
    chosen = choose_blocks(weights, budget)
    dense = seconds(partial(attend_prompt, query, rows, scale), 5)
    sparse = seconds(partial(attend_prompt_sparse, query, rows, scale))
    parts: dict[str, Callable[[], object]] = {
        "own square": partial(attend_prompt, query, own, scale),
        "weighing blocks": partial(weigh_blocks, query, past[:, :, 0], own_lse, scale),
        "choosing blocks": partial(choose_blocks, weights, budget),
        "chosen blocks": partial(attend_chosen, query, past, chosen, scale),
    }
    case = f"speed/{total // 1024}k"
    return [
        Result(case, "dense", dense * 1e3, "ms"),
        Result(case, "sparse", sparse * 1e3, "ms", dense * 1e3, sparse / dense),
        *(
            Result(case, name, took * 1e3, "ms", dense * 1e3, took / dense)
            for name, took in ((name, seconds(part)) for name, part in parts.items())
        ),
        Result(case, "blocks attended", float(chosen.counts.float().mean()) * BLOCK / len(past), "of all"),
    ]
