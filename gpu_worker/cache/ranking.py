"""What the last queries of a prompt think of its keys: by this the rows are chosen that lie on the worker."""

from collections.abc import Callable

import torch
from torch import Tensor

_RANKED_TOKENS = 32768  # that are ranked at a time


class Ranking:
    """Attention weights of keys, as means over queries.

    Args:
        scale: factor of the scores.
        device: the device of queries and keys.
    """

    def __init__(self, scale: float, device: torch.device) -> None:
        self._scale = scale
        self._means: Callable[..., Tensor] = _mean_weights
        self._sums: Callable[..., Tensor] = _log_sums
        if device.type != "cpu":  # one pass over the scores
            self._means = torch.compile(_mean_weights, dynamic=True, fullgraph=True)
            self._sums = torch.compile(_log_sums, dynamic=True, fullgraph=True)

    def weights(self, keys: Tensor, queries: Tensor, lse: Tensor | None = None) -> Tensor:
        """The mean weight [kv_heads, T] float32 of each key, over all queries and the query heads that share
        its KV head.

        Args:
            keys: [T, kv_heads, head_dim].
            queries: [Q, query_heads, head_dim].
            lse: [Q, query_heads] float32, log-sum-exp of the queries' scores; None where they attend to
                nothing but these keys.
        """
        kv_heads = keys.shape[1]
        grouped = queries.unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(1, 2)
        parts = [part.permute(1, 2, 0) for part in keys.split(_RANKED_TOKENS)]
        if lse is None:  # a second product of matrices takes less than to keep the first one
            found = [self._sums(_products(grouped, part), self._scale) for part in parts]
            sums = torch.stack(found).logsumexp(0).unsqueeze(2)
        else:
            sums = lse.unflatten(1, (kv_heads, -1)).transpose(0, 1).reshape(kv_heads, -1, 1)
        return torch.cat([self._means(_products(grouped, part), sums, self._scale) for part in parts], 1)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Batched matrix products [B, M, K] x [B, K, N] in float32; 16-bit inputs are not copied on a GPU."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _log_sums(products: Tensor, scale: float) -> Tensor:
    """Log-sum-exps [H, Q] of the scores with products [H, Q, T]."""
    return (products * scale).logsumexp(2)


def _mean_weights(products: Tensor, lse: Tensor, scale: float) -> Tensor:
    """Attention weights averaged over queries: [H, T], of products [H, Q, T] and log-sum-exps [H, Q, 1]."""
    return (products * scale - lse).exp().mean(1)
