"""Gate: a head keeps its rows while its query stays similar to the query that selected them, or while they
are all that there is."""

import numpy as np
import torch
from torch import Tensor

from clo.kernels.arguments import ELEMENT, GROUPED, HEAD_DIM, Argument, Rule, Signature
from clo.kernels.compiled import Array, bits, compiled, floats
from clo.kernels.launch import ELEMENTS, launch

_SIGNATURE = Signature(
    "gate",
    (
        Argument("query", ELEMENT, "B query_heads head_dim", dense=2),
        Argument("selection_query", ELEMENT, "B kv_heads query_heads//kv_heads*head_dim"),
        Argument("threshold", torch.float32, "kv_heads"),
        Argument("lengths", torch.int64, "B"),
        Argument("counters", torch.int64, "B kv_heads 6"),
    ),
    (HEAD_DIM, GROUPED, Rule("whole >= 0", "it counts tokens")),
)


def gate(
    query: Tensor, selection_query: Tensor, threshold: Tensor, lengths: Tensor, whole: int, counters: Tensor
) -> Tensor:
    """Find the heads that select again; their selection query becomes the current query, in place.

    The similarity is the cosine between the concatenated queries of a group (arXiv 2511.14510, head-wise
    approximate cache).

    Args:
        query: [B, query_heads, head_dim], those of a sequence contiguous.
        selection_query: [B, kv_heads, group * head_dim], query of the last selection; zeros before the first.
        threshold: [kv_heads] float32; above 1 a head selects at every step, at 0 never unless queries oppose.
        lengths: [B] int64; 0 for a slot not in use, which never selects.
        whole: length up to which all rows of a sequence are resident, so that no head selects.
        counters: [B, kv_heads, 6] int64; the first counts checks, the second counts selections.

    Returns:
        [B, kv_heads] bool, True where the head selects.
    """
    _SIGNATURE.check(query, selection_query, threshold, lengths, counters, whole=whole)
    if not query.is_cpu:
        batch, kv_heads = selection_query.shape[:2]
        reselect = torch.empty(batch, kv_heads, dtype=torch.bool, device=query.device)
        launch(
            "gate.cu", "gate", (kv_heads, batch), 128,
            [query, query.stride(0), selection_query, threshold, lengths, whole, counters, reselect],
            ELEMENT=ELEMENTS[query.dtype], DIM=query.shape[2], GROUP=query.shape[1] // kv_heads,
        )  # fmt: skip
        return reselect
    grouped = query.reshape(selection_query.shape).contiguous()
    reselect = torch.empty(selection_query.shape[:2], dtype=torch.bool)
    _gate(
        floats(grouped), floats(selection_query), threshold.numpy(), lengths.numpy(), whole, counters.numpy(),
        reselect.numpy(), bits(grouped), bits(selection_query),
    )  # fmt: skip
    return reselect


def _loop(
    query: Array, past: Array, threshold: Array, lengths: Array, whole: int, counters: Array, reselect: Array,
    query_bits: Array, past_bits: Array,
) -> None:  # fmt: skip
    batch, kv_heads, entries = query.shape
    for sequence in range(batch):
        for head in range(kv_heads):
            now, then = query[sequence, head], past[sequence, head]
            product = norm = past_norm = np.float32(0)
            for entry in range(entries):
                product += now[entry] * then[entry]
                norm += now[entry] * now[entry]
                past_norm += then[entry] * then[entry]
            cosine = product / max(np.sqrt(norm * past_norm), np.float32(1e-30))
            active = lengths[sequence] > whole
            selects = active and cosine < threshold[head]
            reselect[sequence, head] = selects
            counters[sequence, head, 0] += active
            counters[sequence, head, 1] += selects
            if selects:
                for entry in range(entries):
                    past_bits[sequence, head, entry] = query_bits[sequence, head, entry]


_gate = compiled(_loop, any_order=True)
