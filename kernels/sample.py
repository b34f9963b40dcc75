"""Sample: from logits to tokens, repeatable for a seed in any batch and on any device."""

from math import log

import torch
from torch import Tensor

from clo.kernels.arguments import Argument, Rule, Signature
from clo.kernels.launch import launch

_GOLDEN = -7046029254386353131  # 2**64 / golden ratio, as int64: SplitMix64's increment
_MIX1, _MIX2 = -4658895280553007687, -7723592293110705685

_PART_BITS = 20  # a step is 2**-20 of a halving of the probability
_LIMIT = 41 << _PART_BITS  # from so many steps the weight is 0
_POWER = (2017903, 19743523, 118729907, 515776670, 1488514207, 1 << 31)
"""2**-x for x in [0, 1) to 1e-7 as a polynomial of alternating signs, highest power first, times 2**31."""

_THREADS = 1024
_BIN_BITS = 13  # the kernel searches the 26 bits of a step in two passes

_SIGNATURE = Signature(
    "sample",
    (
        Argument("logits", torch.float32, "B vocab"),
        Argument("temperature", torch.float32, "B"),
        Argument("top_p", torch.float32, "B"),
        Argument("top_k", torch.int64, "B"),
        Argument("seed", torch.int64, "B"),
        Argument("position", torch.int64, "B"),
    ),
    (Rule("1 <= vocab < 2**23", "weights of up to 2**40 are summed in 63 bits"),),
)


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


def _weight_of(steps: Tensor) -> Tensor:
    """2**40 halved once for every 2**20 steps; in integers only, so that every device finds the same.

    Args:
        steps: int64, 0 to ``_LIMIT``.
    """
    part = (steps << (32 - _PART_BITS)) & 0xFFFFFFFF
    power = torch.full_like(steps, _POWER[0])
    for coefficient in _POWER[1:]:
        power = coefficient - (power * part >> 32)
    return power << 9 >> (steps >> _PART_BITS)


def sample(
    logits: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor, seed: Tensor, position: Tensor
) -> Tensor:
    """Draw one token for each row: temperature, then top-k, then top-p, then inversion of the cumulative sum.

    A greedy row gives the most likely token, and of equals the one with the lowest id. Otherwise the logits,
    divided by the temperature, are rounded to steps of 7e-7 below the largest, and equal ones are treated
    alike: top-k keeps every token at least as likely as the k-th; top-p keeps the fewest of the most likely
    tokens whose share of what top-k has left reaches it, and all equals of the last of them; the draw goes
    through the kept tokens by id. A token 2**40 times less likely than the first is never drawn.

    Args:
        logits: [B, vocab] float32. A row may be anything if its token does not matter.
        temperature: [B] float32; 0 is greedy.
        top_p: [B] float32 in (0, 1]; top_k: [B] int64, 0 keeps all.
        seed, position: [B] int64, from which the random number is drawn.

    Returns:
        [B] int64 token ids.
    """
    _SIGNATURE.check(logits, temperature, top_p, top_k, seed, position)
    vocab = logits.shape[1]
    if not logits.is_cpu:
        aligned = vocab % 4 == 0 and logits.data_ptr() % 16 == 0
        drawn = torch.empty_like(seed)
        launch(
            "sample.cu", "sample", (len(logits),), _THREADS,
            [logits, temperature, top_p, top_k, seed, position, drawn, vocab], shared=8 << _BIN_BITS,
            THREADS=_THREADS, WIDTH=4 if aligned else 1, PART_BITS=_PART_BITS, LIMIT=_LIMIT,
            BIN_BITS=_BIN_BITS,
        )  # fmt: skip
        return drawn
    greedy = logits.argmax(-1)
    if not temperature.any():
        return greedy
    rate = temperature.clamp_min(1e-6).reciprocal() * (2**_PART_BITS / log(2))
    below = (logits.amax(-1, keepdim=True) - logits) * rate.unsqueeze(1)
    steps = below.where(below < _LIMIT, _LIMIT).long()  # NaN too becomes the limit
    weights = _weight_of(steps)

    ascending, order = steps.sort(-1)
    rank = top_k.where((top_k > 0) & (top_k < vocab), vocab)
    last = ascending.gather(1, rank.unsqueeze(1) - 1)
    total = weights.gather(1, order).masked_fill_(ascending > last, 0).cumsum(-1)
    whole = total[:, -1:]
    wanted = (top_p.unsqueeze(1).double() * whole).ceil().long().clamp_min(1)
    wanted = wanted.where(top_p.unsqueeze(1) < 1, whole)
    last = ascending.gather(1, torch.searchsorted(total, wanted).clamp_max_(vocab - 1))

    total = weights.masked_fill_(steps > last, 0).cumsum(-1)
    whole = total[:, -1:]
    target = (uniform(seed, position).unsqueeze(1) * whole).long().minimum(whole - 1)
    drawn = torch.searchsorted(total, target, right=True).squeeze(1)
    return torch.where((temperature == 0) | (whole == 0).squeeze(1), greedy, drawn)
