"""Log-probabilities of a prompt's tokens, computed piece by piece while its last layer is."""

import torch
from torch import Tensor

from clo.runtime.wire.messages import Logprob

_ENTRIES = 2**23  # logits in memory at a time, 4 bytes each


class PromptScores:
    """What the model thought of each token of a prompt but the first.

    The logits of a whole prompt are never there at once, only those of some dozens or hundreds of tokens.

    Args:
        tokens: the prompt.
        ids: the same on the device, [T] int64.
        top: most likely tokens that are wanted at each position; of a smaller vocabulary, all.
    """

    def __init__(self, tokens: list[int], ids: Tensor, top: int) -> None:
        self._tokens, self._ids, self._top = tokens, ids, top
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []  # own values, top values, top tokens

    @staticmethod
    def rows(vocab: int) -> int:
        """Positions whose logits are to be computed at a time."""
        return max(1, _ENTRIES // vocab)

    def take(self, start: int, logits: Tensor) -> None:
        """Logits [N, vocab] float32 of the positions from ``start`` on, in order."""
        following = self._ids[start + 1 : start + 1 + len(logits)]
        logits = logits[: len(following)]  # nothing is known of the token that follows the prompt
        norm = logits.logsumexp(-1, keepdim=True)
        own = logits.gather(1, following.unsqueeze(1)) - norm
        values, tokens = logits.topk(min(self._top, logits.shape[1]))
        self._parts.append((_to_host(own), _to_host(values - norm), _to_host(tokens)))

    def read(self) -> list[Logprob]:
        """One for each token but the first, once the device has done the work."""
        if not self._parts:
            return []
        own, values, likely = (torch.cat(parts).tolist() for parts in zip(*self._parts, strict=True))
        return [
            Logprob(token, logprob, list(zip(top, logprobs, strict=True)))
            for token, (logprob,), top, logprobs in zip(self._tokens[1:], own, likely, values, strict=True)
        ]


def _to_host(tensor: Tensor) -> Tensor:
    """A copy that is complete when the work launched so far is."""
    if tensor.is_cpu:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
