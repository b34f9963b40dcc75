"""Sample: from logits to tokens, repeatable for a seed in any batch."""

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 2**64 / golden ratio, as int64: SplitMix64's increment
_MIX1, _MIX2 = -4658895280553007687, -7723592293110705685


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # logical shift of int64


def uniform(seed: Tensor, position: Tensor) -> Tensor:
    """One number in [0, 1) for each (seed, position): SplitMix64 (Steele, Lea and Flood 2014).

    Args:
        seed, position: [B] int64.

    Returns:
        [B] float64.
    """
    x = seed + (position + 1) * _GOLDEN
    x = (x ^ _shift_right(x, 30)) * _MIX1
    x = (x ^ _shift_right(x, 27)) * _MIX2
    x = x ^ _shift_right(x, 31)
    return _shift_right(x, 11).double() * 2.0**-53


def sample(
    logits: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor, seed: Tensor, position: Tensor
) -> Tensor:
    """Draw one token a row: temperature, then top-k, then top-p, by inversion of the cumulative probability.

    Args:
        logits: [B, vocab] float32.
        temperature: [B] float32; 0 is greedy.
        top_p: [B] float32 in (0, 1]; top_k: [B] int64, 0 keeps all.
        seed, position: [B] int64, what the random number is drawn from.

    Returns:
        [B] int64 token ids.
    """
    greedy = logits.argmax(-1)
    scaled = logits.double() / temperature.double().clamp_min(1e-6).unsqueeze(1)
    weights, tokens = scaled.softmax(-1).sort(-1, descending=True)
    rank = torch.arange(weights.shape[1], device=weights.device)
    cut = top_k.where(top_k > 0, weights.shape[1]).unsqueeze(1)
    weights = weights.masked_fill_(rank >= cut, 0.0)
    weights /= weights.sum(-1, keepdim=True)
    before = weights.cumsum(-1) - weights
    kept = weights.masked_fill(before >= top_p.double().unsqueeze(1), 0.0)
    total = kept.cumsum(-1)
    target = uniform(seed, position).unsqueeze(1) * total[:, -1:]
    index = torch.searchsorted(total, target, right=True).clamp_max_(kept.shape[1] - 1)
    drawn = tokens.gather(1, index).squeeze(1)
    return torch.where(temperature == 0, greedy, drawn)
