"""Drawing tokens from rows of logits, each with parameters of its own, on any device."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from clo.kernels.sample import BIASED, END, PROMPT, Adjustments, SamplingState, min_p_steps, sample

BIASES = 8  # of a slot, at most
NO_TOKEN = 2**31 - 1


@dataclass(frozen=True)
class Row:
    """What adjusts the logits of one row; names as in vLLM."""

    prompt: list[int] = field(default_factory=list)
    output: list[int] = field(default_factory=list)  # tokens drawn before
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    ends: list[int] = field(default_factory=list)
    min_tokens: int = 0
    allowed: list[int] | None = None  # all that a mask lets through, or None without a mask


def plain(slots: int, vocab: int) -> Adjustments:
    """Adjustments of slots of which none is active; what they hold besides is wrong."""
    return Adjustments(
        active=torch.zeros(slots, dtype=torch.bool),
        marks=torch.randint(-(2**15), 2**15, (slots, vocab), dtype=torch.int16),
        penalties=torch.rand(slots, 3) * 9,
        min_length=torch.full((slots,), 2**40),
        bias_tokens=torch.full((slots, BIASES), NO_TOKEN, dtype=torch.int32),
        biases=torch.full((slots, BIASES), 7.0),
        masked=torch.ones(slots, dtype=torch.bool),
        mask=torch.zeros(slots, -(-vocab // 32), dtype=torch.int32),
        mask_length=torch.zeros(slots, dtype=torch.int64),
    )


def write(adjustments: Adjustments, slot: int, row: Row, length: int) -> None:
    """Set what adjusts a slot, whose sequence has ``length`` tokens."""
    vocab = adjustments.marks.shape[1]
    marks = torch.zeros(vocab, dtype=torch.int16)
    marks[row.output] = torch.tensor([row.output.count(token) for token in row.output], dtype=torch.int16)
    for bit, tokens in ((PROMPT, row.prompt), (END, row.ends), (BIASED, list(row.logit_bias))):
        marks[tokens] |= bit
    adjustments.active[slot] = True
    adjustments.marks[slot] = marks
    adjustments.penalties[slot] = torch.tensor(
        [row.repetition_penalty, row.frequency_penalty, row.presence_penalty]
    )
    adjustments.min_length[slot] = length - len(row.output) + row.min_tokens
    for place, (token, bias) in enumerate(sorted(row.logit_bias.items())):
        adjustments.bias_tokens[slot, place], adjustments.biases[slot, place] = token, bias
    adjustments.masked[slot] = row.allowed is not None
    adjustments.mask_length[slot] = length
    bits = torch.zeros(adjustments.mask.shape[1] * 32, dtype=torch.bool)
    bits[row.allowed or []] = True
    weights = 2 ** torch.arange(32)
    words = (bits.view(-1, 32) * weights).sum(1)
    adjustments.mask[slot] = (words - (words >> 31) * 2**32).int()


def draw(
    logits: Tensor,
    temperature: Tensor,
    top_p: Tensor,
    top_k: Tensor,
    seed: Tensor,
    position: Tensor,
    min_p: Tensor | None = None,
    rows: list[Row] | Row | None = None,
    device: str = "cpu",
) -> Tensor:
    """``sample`` of rows [B, vocab] where row b is of slot B - 1 - b.

    Args:
        temperature, top_p, min_p: [B] float32; seed, top_k: [B] int64.
        position: [B] int64, lengths of the sequences.
        rows: what adjusts each of them, or all of them.
    """
    count, vocab = logits.shape
    steps = [0.0] * count if min_p is None else min_p.tolist()
    state = SamplingState(temperature, top_p, top_k, torch.tensor([min_p_steps(p) for p in steps]), seed)
    state = SamplingState(*(part.flip(0).to(device) for part in state))
    adjustments = plain(count, vocab)
    if isinstance(rows, Row):
        write(adjustments, 0, rows, int(position[0]))
        for part in adjustments:
            part[:] = part[0].clone()
    else:
        for place, row in enumerate(rows or []):
            write(adjustments, count - 1 - place, row, int(position[place]))
    slots = torch.arange(count).flip(0)
    adjustments = Adjustments(*(part.to(device) for part in adjustments))
    lengths = position.flip(0).to(device)
    return sample(logits.to(device), slots.to(device), lengths, state, adjustments).cpu()
