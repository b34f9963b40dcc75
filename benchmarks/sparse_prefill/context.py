"""A model's context in one piece: prompts and continuations with any attention, without cache or worker."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.tasks import Item
from clo.gpu_worker.model.decoder import Decoder
from clo.kernels.attend_prompt import attend_prompt

Attend = Callable[[int, Tensor, Tensor], Tensor]
"""From the layer's number, queries [N, query_heads, head_dim] and rows [T, kv_heads, 2, head_dim], of which
the last N are the queries' own, to their attention [N, query_heads, head_dim]."""


class Context:
    """The rows of all layers of one sequence.

    Args:
        decoder: the model.
        tokens: most tokens of the sequence.
    """

    def __init__(self, decoder: Decoder, tokens: int) -> None:
        self._decoder, shape = decoder, decoder.shape
        self._rows = torch.empty(
            shape.layers, tokens, shape.kv_heads, 2, shape.head_dim, dtype=shape.dtype, device=decoder.device
        )
        self.length = 0  # may be lowered: what lay behind is forgotten

    def dense(self, layer: int, query: Tensor, rows: Tensor) -> Tensor:
        """Full attention, as an ``Attend``."""
        return attend_prompt(query, rows, self._decoder.scale)[0]

    @torch.inference_mode()
    def extend(self, tokens: list[int], attend: Attend) -> Tensor:
        """Compute tokens; returns the last hidden states [N, hidden], ready for ``Decoder.logits``."""
        decoder, device = self._decoder, self._decoder.device
        start, end = self.length, self.length + len(tokens)
        rope = decoder.rope(torch.arange(start, end, device=device))
        hidden = decoder.embed(torch.tensor(tokens, device=device))
        normed = decoder.input_norm(0, hidden)
        for layer in range(decoder.shape.layers):
            query, _ = decoder.qkv(layer, normed, rope, self._rows[layer, start:end])
            attended = attend(layer, query, self._rows[layer, :end])
            hidden, normed = decoder.add_mlp(layer, *decoder.add_attention(layer, hidden, attended))
        self.length = end
        return normed

    def prefill(self, prompt: list[int], chunk: int, attend: Attend) -> Tensor:
        """Compute a prompt from the start in equal chunks of at most ``chunk`` tokens, as
        ``clo.gpu_worker.prefill`` does; returns the logits [1, vocab] of its last token."""
        self.length = 0
        size = -(-len(prompt) // -(-len(prompt) // chunk))
        for start in range(0, len(prompt), size):
            normed = self.extend(prompt[start : start + size], attend)
        return self._decoder.logits(normed[-1:])

    def greedy(self, first: Tensor, count: int) -> list[int]:
        """The most likely tokens with full attention, after the logits [1, vocab] of the last token; they are
        not kept in the context."""
        prompt, found = self.length, [int(first.argmax())]
        while len(found) < count:
            found.append(int(self._decoder.logits(self.extend(found[-1:], self.dense)).argmax()))
        self.length = prompt
        return found

    def forced(self, first: Tensor, answer: list[int]) -> Tensor:
        """Log-probabilities [N, vocab] float32 at each token of an answer that follows with full attention,
        which is not kept in the context. first: logits [1, vocab] of the token before it."""
        prompt = self.length
        rest = self._decoder.logits(self.extend(answer[:-1], self.dense))
        self.length = prompt
        return torch.cat((first, rest)).log_softmax(-1)


def divergence(full: Tensor, other: Tensor) -> Tensor:
    """KL(full || other) in nats of log-probabilities [N, vocab]: [N]."""
    return (full.exp() * (full - other)).sum(-1).clamp_min(0)  # below 0 it is rounding


def continued(context: Context, item: Item, first: Tensor, count: int) -> Item:
    """The item with the greedy continuation of full attention for an answer."""
    return item._replace(answer=context.greedy(first, count), scored=[False] * count)
