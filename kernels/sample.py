"""Sample: from logits to tokens, repeatable for a seed in any batch and on any device.

Names, meanings and the order of what happens to the logits are those of vLLM's sampler (vllm/v1/sample,
version 0.23).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from clo.kernels.arguments import Argument, Rule, Signature
from clo.kernels.launch import launch

PROMPT, END, BIASED = -(2**15), 2**14, 2**13
"""Bits of a mark: the token is in the prompt; it may end the answer; it has a bias."""
MOST_COUNTED = 2**13 - 1
"""The other bits of a mark count how often the token was drawn, up to this number."""
LATE = -1
"""What is drawn where a mask was not there in time."""

_GOLDEN = -7046029254386353131  # 2**64 / golden ratio, as int64: SplitMix64's increment
_MIX1, _MIX2 = -4658895280553007687, -7723592293110705685

_PART_BITS = 20  # a step is 2**-20 of a halving of the probability
_LIMIT = 41 << _PART_BITS  # from so many steps the weight is 0
_POWER = (2017903, 19743523, 118729907, 515776670, 1488514207, 1 << 31)
"""2**-x for x in [0, 1) to 1e-7 as a polynomial of alternating signs, highest power first, times 2**31."""

_THREADS = 1024
_BIN_BITS = 13  # the kernel searches the 26 bits of a step in two passes


class SamplingState(NamedTuple):
    """How each slot draws."""

    temperature: Tensor  # [S] float32; 0 is greedy
    top_p: Tensor  # [S] float32 in (0, 1]
    top_k: Tensor  # [S] int64, 0 keeps all
    min_p: Tensor  # [S] int64, see ``min_p_steps``
    seed: Tensor  # [S] int64


class Adjustments(NamedTuple):
    """What changes the logits of a slot before it draws. Of slots that are not ``active`` the rest may be
    anything, and costs nothing."""

    active: Tensor  # [S] bool
    marks: Tensor  # [S, vocab] int16, bits and count of each token
    penalties: (
        Tensor  # [S, 3] float32: of repetition, which divides and multiplies, of frequency, of presence
    )
    min_length: Tensor  # [S] int64, tokens that a sequence has to have before tokens marked END may be drawn
    bias_tokens: Tensor  # [S, biases] int32, those marked BIASED, ascending; larger than any token at the end
    biases: Tensor  # [S, biases] float32
    masked: Tensor  # [S] bool, whether the next two say what may be drawn
    mask: Tensor  # [S, ceil(vocab / 32)] int32, a bit for each token, low bits first
    mask_length: Tensor  # [S] int64, the tokens of the sequence for whose next token the mask is


STATE = (
    Argument("state.temperature", torch.float32, "S"),
    Argument("state.top_p", torch.float32, "S"),
    Argument("state.top_k", torch.int64, "S"),
    Argument("state.min_p", torch.int64, "S"),
    Argument("state.seed", torch.int64, "S"),
)
ACTIVE = Argument("adjustments.active", torch.bool, "S")
MARKS = Argument("adjustments.marks", torch.int16, "S vocab")
SLOTS = Argument("slots", torch.int64, "B")
LENGTHS = Argument("lengths", torch.int64, "S")

_SIGNATURE = Signature(
    "sample",
    (
        Argument("logits", torch.float32, "B vocab"),
        SLOTS, LENGTHS, *STATE, ACTIVE, MARKS,
        Argument("adjustments.penalties", torch.float32, "S 3"),
        Argument("adjustments.min_length", torch.int64, "S"),
        Argument("adjustments.bias_tokens", torch.int32, "S biases"),
        Argument("adjustments.biases", torch.float32, "S biases"),
        Argument("adjustments.masked", torch.bool, "S"),
        Argument("adjustments.mask", torch.int32, "S (vocab+31)//32", anywhere=True),
        Argument("adjustments.mask_length", torch.int64, "S", anywhere=True),
    ),
    (
        Rule("1 <= vocab < 2**23", "weights of up to 2**40 are summed in 63 bits"),
        Rule("biases >= 1", "it is searched"),
        Rule("vocab <= 2**19", "a block keeps its mask in shared memory", gpu=True),
    ),
)  # fmt: skip


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


def min_p_steps(min_p: float) -> int:
    """How many steps below the most likely token others are kept, where those less than ``min_p`` (0 to 1)
    times as likely are not. It is computed here once, because logarithms differ between devices."""
    if min_p <= 0:
        return _LIMIT - 1
    return min(_LIMIT - 1, math.floor(-math.log2(min_p) * (1 << _PART_BITS)))


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
    logits: Tensor, slots: Tensor, lengths: Tensor, state: SamplingState, adjustments: Adjustments
) -> Tensor:
    """Draw one token for each row: adjustments, temperature, min-p, top-k, top-p, then inversion of the
    cumulative sum.

    The adjustments of an active slot are, in this order: what its mask forbids has no probability, and
    neither has a token marked END while the sequence is too short; biases are added; tokens of the prompt and
    tokens drawn before are divided by the repetition penalty where their logit is above 0, else multiplied;
    from tokens drawn before the frequency penalty is taken as often as they were drawn, then the presence
    penalty once.

    A greedy row gives the most likely token, and of equals the one with the lowest id. Otherwise the logits,
    divided by the temperature, are rounded to steps of 7e-7 below the largest, and equal ones are treated
    alike: min-p keeps those at most ``min_p`` steps below the largest; top-k of them every token at least as
    likely as the k-th; top-p the fewest of the most likely tokens whose share of what is left reaches it, and
    all equals of the last of them; the draw goes through the kept tokens by id. A token 2**40 times less
    likely than the first is never drawn.

    Args:
        logits: [B, vocab] float32. A row may be anything if its token does not matter.
        slots: [B] int64, the slot of each row.
        lengths: [S] int64, tokens of each slot's sequence; with the seed they decide the random number.
        state, adjustments: of S slots.

    Returns:
        [B] int64 token ids, or ``LATE`` where the mask of a row is not for this length.
    """
    _SIGNATURE.check(logits, slots, lengths, *state, *adjustments)
    vocab = logits.shape[1]
    if not logits.is_cpu:
        aligned = vocab % 4 == 0 and logits.data_ptr() % 16 == 0
        drawn = torch.empty_like(slots)
        words = adjustments.mask.shape[1]
        launch(
            "sample.cu", "sample", (len(logits),), _THREADS,
            [logits, slots, lengths, *state, *adjustments, drawn, vocab, adjustments.biases.shape[1], words],
            shared=(8 << _BIN_BITS) + 4 * words,
            THREADS=_THREADS, WIDTH=4 if aligned else 1, PART_BITS=_PART_BITS, LIMIT=_LIMIT,
            BIN_BITS=_BIN_BITS,
        )  # fmt: skip
        return drawn
    active = adjustments.active[slots]
    late = active & adjustments.masked[slots] & (adjustments.mask_length[slots] != lengths[slots])
    rows = active.nonzero()[:, 0]
    if len(rows):
        logits = logits.index_copy(0, rows, _adjusted(logits[rows], slots[rows], lengths, adjustments))
    drawn = _draw(logits, lengths[slots], SamplingState(*(part[slots] for part in state)))
    return drawn.masked_fill_(late, LATE)


def _adjusted(logits: Tensor, slots: Tensor, lengths: Tensor, adjustments: Adjustments) -> Tensor:
    """Logits [N, vocab] of N active slots after everything that changes them."""
    marks, vocab = adjustments.marks[slots], logits.shape[1]
    repetition, frequency, presence = adjustments.penalties[slots].T.unsqueeze(-1)
    bits = adjustments.mask[slots].unsqueeze(2) >> torch.arange(32, dtype=torch.int32) & 1
    allowed = bits.flatten(1)[:, :vocab].bool() | ~adjustments.masked[slots].unsqueeze(1)
    early = lengths[slots] < adjustments.min_length[slots]
    forbidden = ~allowed | (marks & END != 0) & early.unsqueeze(1)
    biases = torch.zeros(len(logits), vocab + 1)
    biases.scatter_(1, adjustments.bias_tokens[slots].clamp_max(vocab).long(), adjustments.biases[slots])
    logits = logits.masked_fill(forbidden, -torch.inf) + biases[:, :vocab]
    counts = marks & MOST_COUNTED
    seen = (counts > 0) | (marks & PROMPT != 0)
    penalised = torch.where(logits > 0, logits / repetition, logits * repetition)
    adjusted: Tensor = penalised.where(seen, logits) - frequency * counts - presence * (counts > 0)
    return adjusted


def _draw(logits: Tensor, position: Tensor, state: SamplingState) -> Tensor:
    """[B] int64, a token for each row of logits [B, vocab] at its position [B], with the state of B rows."""
    temperature, top_p, top_k, min_p, seed = state
    vocab = logits.shape[1]
    greedy = logits.argmax(-1)
    if not temperature.any():
        return greedy
    rate = temperature.clamp_min(1e-6).reciprocal() * (2**_PART_BITS / math.log(2))
    below = (logits.amax(-1, keepdim=True) - logits) * rate.unsqueeze(1)
    steps = below.where(below < _LIMIT, _LIMIT).long()  # NaN too becomes the limit
    steps.masked_fill_(steps > min_p.unsqueeze(1), _LIMIT)
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
