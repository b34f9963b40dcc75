"""The decode step: from the last tokens of all slots to the next ones."""

import torch
from torch import Tensor

from gpu_worker.cache import Batch, KVCache
from gpu_worker.model import Decoder
from gpu_worker.prefill import Prefill
from kernels.sample import sample
from runtime.config import CacheConfig
from runtime.messages import Logprob, Sampling


class Engine:
    """Model, cache and the state of every slot: length, blocks, current token, sampling parameters.

    Args:
        decoder: the model.
        arena: [blocks, layers, kv_heads, block_tokens, 2, head_dim].
        config: the knobs of the cache.
        slots: sequences at a time.
        max_tokens: longest sequence.
    """

    def __init__(
        self, decoder: Decoder, arena: Tensor, config: CacheConfig, slots: int, max_tokens: int
    ) -> None:
        self.decoder = decoder
        device = decoder.device
        self.cache = KVCache(decoder.shape, arena, config, slots, decoder.scale, device)
        prefetch = config.prefetch
        if prefetch == "auto":
            prefetch = "correct" if device.type == "cuda" else "off"
        self._first_prefetched = decoder.shape.layers if prefetch == "off" else config.prefetch_from
        self._first_accepted = config.prefetch_from if prefetch == "accept" else decoder.shape.layers
        if self.cache.full:
            self._first_prefetched = decoder.shape.layers

        max_blocks = -(-max_tokens // decoder.shape.block_tokens)
        self._table = torch.zeros(slots, max_blocks, dtype=torch.int64, device=device)
        self._lengths = torch.zeros(slots, dtype=torch.int64, device=device)
        self._tokens = torch.zeros(slots, dtype=torch.int64, device=device)
        self._temperature = torch.zeros(slots, device=device)
        self._top_p = torch.ones(slots, device=device)
        self._top_k = torch.zeros(slots, dtype=torch.int64, device=device)
        self._seed = torch.zeros(slots, dtype=torch.int64, device=device)
        self._greedy = [True] * slots

    @torch.inference_mode()
    def prefill(self, slot: int, tokens: list[int], blocks: list[int]) -> Prefill:
        """Begin the prefill of a sequence in a free slot."""
        self._table[slot] = 0
        self._table[slot, : len(blocks)] = torch.tensor(blocks)
        return Prefill(self.decoder, self.cache, slot, tokens, self._table[slot])

    def activate(self, slot: int, length: int, sampling: Sampling, seed: int) -> None:
        """The sequence of a slot, ``length`` tokens long, decodes from now on."""
        self._lengths[slot] = length
        self._temperature[slot] = sampling.temperature
        self._top_p[slot] = sampling.top_p
        self._top_k[slot] = sampling.top_k
        self._seed[slot] = seed
        self._greedy[slot] = sampling.temperature == 0

    def release(self, slot: int) -> None:
        """The slot is free again."""
        self._lengths[slot] = 0
        self.cache.reset_stats(slot)

    def feed(self, slot: int, token: int) -> None:
        """Replace the token that the next step reads (teacher forcing)."""
        self._tokens[slot] = token

    @torch.inference_mode()
    def forward(self, slots: int, longest: int) -> Tensor:
        """One decode step of slots 0 .. slots-1 with their current tokens.

        Args:
            slots: one more than the highest slot in use.
            longest: tokens of the longest sequence, the new one included.

        Returns:
            logits [slots, vocab] float32; rows of slots not in use are undefined.
        """
        decoder, cache = self.decoder, self.cache
        lengths = self._lengths[:slots]
        lengths += lengths > 0
        pages = -(-longest // decoder.shape.block_tokens)
        batch = Batch(lengths, self._table[:slots, :pages])
        hidden = decoder.embed(self._tokens[:slots])
        rope = decoder.rope((lengths - 1).clamp_min(0))
        for layer in range(decoder.shape.layers):
            following = layer + 1
            if self._first_prefetched <= following < decoder.shape.layers:
                cache.prefetch(following, decoder.query(following, hidden, rope), batch)
            query, kv = decoder.qkv(layer, hidden, rope)
            attended = cache.attend(layer, query, kv, batch, select=layer < self._first_accepted)
            hidden = decoder.finish(layer, hidden, attended)
        return decoder.logits(hidden)

    @torch.inference_mode()
    def sample(self, logits: Tensor, slots: list[int]) -> list[int]:
        """Draw the next token of each slot and make it current. Waits for the device.

        Args:
            logits: [len(slots), vocab] float32.
            slots: the slot of each row.
        """
        at = torch.tensor(slots, device=logits.device)
        if all(self._greedy[slot] for slot in slots):
            drawn = logits.argmax(-1)
        else:
            drawn = sample(
                logits,
                self._temperature[at],
                self._top_p[at],
                self._top_k[at],
                self._seed[at],
                self._lengths[at],
            )
        self._tokens[at] = drawn
        tokens: list[int] = drawn.tolist()
        return tokens


def logprob_of(logits: Tensor, token: int, top: int) -> Logprob:
    """Log-probabilities at one position, before temperature: of ``token`` and of the ``top`` most likely.

    Args:
        logits: [vocab] float32.
    """
    logprobs = logits.log_softmax(-1)
    values, tokens = logprobs.topk(top)
    return Logprob(token, float(logprobs[token]), list(zip(tokens.tolist(), values.tolist(), strict=True)))
