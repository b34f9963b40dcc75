"""Gate: a head keeps its rows while its query stays similar to the query that selected them."""

import torch
from torch import Tensor

from clo.kernels.launch import ELEMENTS, launch


def gate(
    query: Tensor, selection_query: Tensor, threshold: Tensor, lengths: Tensor, counters: Tensor
) -> Tensor:
    """Find the heads that select again; their selection query becomes the current query, in place.

    The similarity is the cosine between the concatenated queries of a group (arXiv 2511.14510, head-wise
    approximate cache).

    Args:
        query: [B, query_heads, head_dim], those of a sequence contiguous.
        selection_query: [B, kv_heads, group * head_dim], query of the last selection; zeros before the first.
        threshold: [kv_heads] float32; above 1 a head selects at every step.
        lengths: [B] int64; 0 for a slot not in use, which never selects.
        counters: [B, kv_heads, 4] int64; the first counts checks, the second counts selections.

    Returns:
        [B, kv_heads] bool, True where the head selects.
    """
    if query.is_cuda:
        batch, kv_heads = selection_query.shape[:2]
        reselect = torch.empty(batch, kv_heads, dtype=torch.bool, device=query.device)
        launch(
            "gate.cu", "gate", (kv_heads, batch), 128,
            [query, query.stride(0), selection_query, threshold, lengths, counters, reselect],
            ELEMENT=ELEMENTS[query.dtype], DIM=query.shape[2], GROUP=query.shape[1] // kv_heads,
        )  # fmt: skip
        return reselect
    current = query.reshape(selection_query.shape).float()
    past = selection_query.float()
    norms = (current.square().sum(-1) * past.square().sum(-1)).sqrt().clamp_min_(1e-30)
    cosine = (current * past).sum(-1) / norms
    reselect = (cosine < threshold) & (lengths > 0).unsqueeze(1)
    selection_query.copy_(query.reshape(selection_query.shape).where(reselect.unsqueeze(-1), selection_query))
    counters[..., 0] += (lengths > 0).unsqueeze(1)
    counters[..., 1] += reselect
    return reselect
