"""How every slot draws its tokens: parameters, and what changes its logits before."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from clo.gpu_worker.group import Group
from clo.kernels.sample import (
    BIASED,
    END,
    MOST_COUNTED,
    PROMPT,
    Adjustments,
    SamplingState,
    min_p_steps,
    sample,
)
from clo.kernels.take import take
from clo.runtime.wire.messages import MAX_LOGIT_BIAS, Sampling

_NO_TOKEN = 2**31 - 1


def sampler_bytes(vocab: int) -> int:
    """Memory on the device for each slot; a thousandth of the resident rows of a large model."""
    return 2 * vocab + 8 * MAX_LOGIT_BIAS


class Sampler:
    """The sampling parameters of all slots, on the device.

    The masks of constrained slots are in memory of the host, which the device reads in place: one is written
    while the step for whose token it is already runs.

    Args:
        slots: sequences at a time.
        vocab: tokens of the model.
        device: the device that draws.
        group: draws together; its first rank alone decides, and it alone has to know the parameters.
    """

    def __init__(self, slots: int, vocab: int, device: torch.device, group: Group | None = None) -> None:
        def zeros(*size: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self._device, self._group = device, group
        self._pinned = pinned = device.type == "cuda"
        self._state = SamplingState(
            temperature=zeros(slots, dtype=torch.float32),
            top_p=zeros(slots, dtype=torch.float32) + 1,
            top_k=zeros(slots),
            min_p=zeros(slots) + min_p_steps(0.0),
            seed=zeros(slots),
        )
        mask = torch.zeros(slots, -(-vocab // 32), dtype=torch.int32, pin_memory=pinned)
        mask_length = torch.zeros(slots, dtype=torch.int64, pin_memory=pinned)
        self._adjustments = Adjustments(
            active=zeros(slots, dtype=torch.bool),
            marks=zeros(slots, vocab, dtype=torch.int16),
            penalties=zeros(slots, 3, dtype=torch.float32),
            min_length=zeros(slots),
            bias_tokens=zeros(slots, MAX_LOGIT_BIAS, dtype=torch.int32),
            biases=zeros(slots, MAX_LOGIT_BIAS, dtype=torch.float32),
            masked=zeros(slots, dtype=torch.bool),
            mask=mask,
            mask_length=mask_length,
        )
        self._adjusted: set[int] = set()  # slots that are active
        self._masks, self._mask_lengths = mask.numpy(), mask_length.numpy()

    def set(self, slot: int, sampling: Sampling, seed: int) -> None:
        """Parameters of a slot's next sequence, without adjustments."""
        state = self._state
        # an assignment of a number would wait for the device
        state.temperature[slot].fill_(sampling.temperature)
        state.top_p[slot].fill_(sampling.top_p)
        state.top_k[slot].fill_(sampling.top_k)
        state.min_p[slot].fill_(min_p_steps(sampling.min_p))
        state.seed[slot].fill_(seed)
        if slot in self._adjusted:
            self._adjustments.active[slot].fill_(False)
            self._adjusted.discard(slot)

    def adjust(
        self, slot: int, sampling: Sampling, prompt: list[int], ends: list[int], answer: Sequence[int] = ()
    ) -> None:
        """Adjust the logits of a slot from now on; after ``set``.

        Args:
            prompt: the tokens of its prompt.
            ends: tokens that end its answer.
            answer: the tokens that it has drawn already.
        """
        to = self._adjustments
        marks = to.marks[slot].zero_()
        if sampling.repetition_penalty != 1.0:
            marks.index_fill_(0, self._send(prompt, torch.int64), PROMPT)
        bias = sorted(sampling.logit_bias.items())
        tokens, biases = [token for token, _ in bias], [value for _, value in bias]
        for bit, those in ((END, ends if sampling.min_tokens else []), (BIASED, tokens)):
            if those:
                places = self._send(sorted(set(those)), torch.int64)
                marks.index_copy_(0, places, marks.index_select(0, places) | bit)
        if answer:
            drawn = Counter(answer)
            places = self._send(list(drawn), torch.int64)
            counts = self._send([min(count, MOST_COUNTED) for count in drawn.values()], torch.int16)
            marks.index_copy_(0, places, marks.index_select(0, places) | counts)
        if bias:
            rest = MAX_LOGIT_BIAS - len(bias)
            to.bias_tokens[slot].copy_(self._send(tokens + [_NO_TOKEN] * rest, torch.int32))
            to.biases[slot].copy_(self._send(biases + [0.0] * rest, torch.float32))
        else:
            to.bias_tokens[slot].fill_(_NO_TOKEN)
        penalties = (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty)
        to.penalties[slot].copy_(self._send(list(penalties), torch.float32))
        to.min_length[slot].fill_(len(prompt) + sampling.min_tokens)
        to.masked[slot].fill_(sampling.grammar is not None)
        to.active[slot].fill_(True)
        self._adjusted.add(slot)

    def constrain(self, slot: int, mask: np.ndarray, length: int) -> None:
        """See ``Engine.constrain``. The step that reads the mask looks for the length first."""
        self._masks[slot] = mask
        self._mask_lengths[slot] = length

    def draw(self, logits: Tensor, slots: Tensor, lengths: Tensor, tokens: Tensor) -> Tensor:
        """Draw a token for each row, and take it.

        Args:
            logits: [B, vocab] float32; slots: [B] int64, the slot of each row.
            lengths, tokens: [S] int64 of all slots, the latest token of each; both change in place.

        Returns:
            [B] int64; ``clo.kernels.sample.LATE`` where a slot's mask was not there.
        """
        if self._group is None or self._group.leads:
            drawn = sample(logits, slots, lengths, self._state, self._adjustments)
        else:
            drawn = torch.empty_like(slots)
        if self._group is not None:  # also as masks of grammars come late at one rank and not at another
            self._group.take_from_first(drawn)
        take(drawn, slots, lengths, tokens, self._adjustments)
        return drawn

    def _send(self, values: list[int] | list[float], dtype: torch.dtype) -> Tensor:
        """Values on the device; from pinned memory, or else the copy would wait for it."""
        return torch.tensor(values, dtype=dtype, pin_memory=self._pinned).to(self._device, non_blocking=True)
