"""Gate: a head keeps its rows while its query stays similar to the one that chose them."""

from torch import Tensor


def gate(query: Tensor, label: Tensor, threshold: Tensor, lengths: Tensor) -> Tensor:
    """Which heads select anew; their labels become the current query, in place.

    The similarity is the cosine between the concatenated queries of a group (arXiv 2511.14510, head-wise
    approximate cache).

    Args:
        query: [B, query_heads, head_dim].
        label: [B, kv_heads, group * head_dim], query of the last selection; zeros where there is none.
        threshold: [kv_heads] float32; above 1 a head selects at every step.
        lengths: [B] int64; 0 for a slot not in use, which never selects.

    Returns:
        [B, kv_heads] bool, True where the head selects.
    """
    current = query.reshape(label.shape).float()
    past = label.float()
    norms = (current.square().sum(-1) * past.square().sum(-1)).sqrt().clamp_min_(1e-30)
    cosine = (current * past).sum(-1) / norms
    miss = (cosine < threshold) & (lengths > 0).unsqueeze(1)
    label.copy_(query.reshape(label.shape).where(miss.unsqueeze(-1), label))
    return miss
