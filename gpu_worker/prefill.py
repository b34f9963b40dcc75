"""Prefill, layer by layer: only one layer's KV is on the worker at a time; each row leaves it once."""

from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from clo.gpu_worker.cache.kv_cache import KVCache
from clo.gpu_worker.cache.layer import PROMPT_QUERIES
from clo.gpu_worker.cache.prompt import ExactRows, LastTokens, Prompts, one_prompt
from clo.gpu_worker.model.decoder import Decoder
from clo.gpu_worker.prompt_scores import PromptScores
from clo.gpu_worker.side_stream import DeviceEvent
from clo.kernels.attend_prompt import attend_prompt
from clo.kernels.decode_pages import TOKENS as DECODED_TOKENS
from clo.kernels.quantize_query import Rope
from clo.kernels.sparse_prompt import attend_prompt_sparse, chosen_bytes, equivalent_tokens
from clo.runtime.model.kv_shape import KVShape

CHUNK_TOKENS = {"cpu": 512, "cuda": 8192}  # at most; longer ones are no faster
_BUFFERS = {"cpu": 1, "cuda": 2}  # for rows: of this layer, and of the one that is being stored and indexed
LEAST_TOKENS = {"cpu": 64, "cuda": 256}  # shorter chunks waste the device
# And so do those of less arithmetic, which a device has done before the next unit is launched. A rate that is
# measured while it waits for its host is low, and would ask for ever smaller units.
LEAST_FLOPS = {"cpu": 0.0, "cuda": 4e11}
_STEP = {"cpu": 1, "cuda": 128}  # of which chunks are multiples: tiles of attention


class PromptAttention(NamedTuple):
    """How chunks of prompts attend."""

    attend: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]  # as ``attend_prompt`` does, or nearly
    equivalent_tokens: Callable[[int], float]  # so many earlier tokens of a dense chunk take as long


DENSE = PromptAttention(attend_prompt, float)
SPARSE = PromptAttention(attend_prompt_sparse, equivalent_tokens)


def prefill_bytes(shape: KVShape, tokens: int, *, sparse: bool, codes: bool) -> int:
    """About the most GPU memory that the prefill of a prompt takes, apart from its index pages.

    Args:
        sparse: whether it attends to chosen blocks.
        codes: whether it may attend to what it begins with from codes.
    """
    width = shape.query_heads * shape.head_dim * shape.dtype.itemsize
    rows = _BUFFERS["cuda"] * shape.kv_heads * shape.row_bytes
    ranking = PROMPT_QUERIES * shape.query_heads * 8 + shape.kv_heads * 8
    rope = 8 * shape.head_dim
    whole = tokens * (width + rows + rope + ranking) + CHUNK_TOKENS["cuda"] * 24 * width
    whole += codes * min(tokens, DECODED_TOKENS) * shape.kv_heads * shape.row_bytes // 2
    return whole + sparse * chosen_bytes(shape.query_heads, CHUNK_TOKENS["cuda"], tokens)


@torch.inference_mode()
def load_kernels(decoder: Decoder, longest: int) -> None:
    """Have CUDA load the matrix products of chunks of up to ``longest`` tokens.

    It loads a kernel when that is launched for the first time, which takes 20 ms, and cuBLAS has dozens for a
    product, by the number of tokens. In the midst of decode steps that would hold all streams up.
    """
    most = CHUNK_TOKENS["cuda"]
    for count in (*range(16, 2048, 16), *range(2048, most + 1, 64)):
        if count > longest:
            break
        hidden = decoder.embed(torch.zeros(count, dtype=torch.int64, device=decoder.device))
        rope = decoder.rope(torch.arange(count, device=decoder.device))
        query, _ = decoder.qkv(0, decoder.input_norm(0, hidden), rope)
        decoder.complete(0, hidden, query)


class Prefill:
    """The prefill of one prompt, cut into units of one layer of one chunk, so that decode steps fit in
    between. In the last layer only the last tokens need more than their keys and values, unless the prompt is
    scored.

    Args:
        decoder: the model.
        cache: takes each layer's rows.
        slot: the sequence's slot.
        tokens: the prompt, at least one token.
        blocks: those of the sequence.
        block_table, page_table: [max_blocks] int64, those of the sequence, on the device.
        last: last tokens whose logits are wanted.
        attention: that of the last layer, where it is for a few tokens alone, is dense all the same.
        score: how many of the most likely tokens at each position are wanted with the log-probabilities of
            the prompt; None for no log-probabilities.
        cached: first tokens whose rows are in their blocks already, whole blocks of them; they are read and
            indexed, or taken from their codes where ``KVCache.least_prefix`` says so. So many of the last
            tokens are computed that their queries can choose the resident rows.

    Attributes:
        scores: those log-probabilities.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        slot: int,
        tokens: list[int],
        blocks: list[int],
        block_table: Tensor,
        page_table: Tensor,
        last: int = 1,
        attention: PromptAttention = DENSE,
        score: int | None = None,
        cached: int = 0,
    ) -> None:
        self._decoder, self._cache, self._last, self._attention = decoder, cache, last, attention
        self.total, self._cached = len(tokens), cached
        device, shape = block_table.device, decoder.shape
        self._prompts = one_prompt(slot, self.total, blocks, block_table, page_table, shape.block_tokens)
        # pinned, or else the copy would wait for the device
        ids = torch.tensor(tokens[cached:], pin_memory=device.type == "cuda")
        ids = ids.to(device, non_blocking=True)
        self.scores = None if score is None else PromptScores(tokens, ids, score)
        self._hidden = decoder.embed(ids)
        self._rope = decoder.rope(torch.arange(cached, self.total, device=device))
        # All at once: to ask CUDA for so much memory in the midst of decode steps would hold these up.
        size = self.total, shape.kv_heads, 2, shape.head_dim
        self._rows, *spare = (
            torch.empty(size, dtype=shape.dtype, device=device) for _ in range(_BUFFERS[device.type])
        )
        self._spare = deque[tuple[Tensor, tuple[DeviceEvent, ...]]]((rows, ()) for rows in spare)
        most, self._step = CHUNK_TOKENS[device.type], _STEP[device.type]
        own = self.total - cached
        even = -(-own // -(-own // most))
        self._chunk = -(-even // self._step) * self._step  # nearly equal chunks
        self._least, self._least_flops = LEAST_TOKENS[device.type], LEAST_FLOPS[device.type]
        self._layer = self._start = self._taken = 0
        self._loaded: DeviceEvent | None = None  # the rows of this layer that are in the arena already
        least = cache.least_prefix
        self._from_codes = least is not None and cached >= least
        self._exact: ExactRows | None = None  # of this layer
        self._begin_layer()

    @property
    def done(self) -> int:
        """Work that is finished, as a number of prompt tokens out of ``total``, those cached included."""
        own = self._layer * (self.total - self._cached) + self._start - self._cached
        return self._cached + own // self._decoder.shape.layers

    @property
    def remaining_flops(self) -> float:
        """Arithmetic that is left, about: as if all of it were dense."""
        decoder, whole = self._decoder, self._decoder.shape.layers - 1 - self._layer
        if self.scores is not None:
            logits = decoder.logits_flops(self.total - (self._start if whole == 0 else 0))
            return (
                (whole + 1) * decoder.layer_flops(self.total, 0)
                + logits
                - decoder.layer_flops(self._start, 0)
            )
        if whole == 0:
            return decoder.last_layer_flops(self.total - self._start)
        own, cached = self.total - self._cached, self._cached
        layers = whole * decoder.layer_flops(own, cached) + decoder.last_layer_flops(own)
        return layers - decoder.layer_flops(self._start - cached, cached)

    def unit(self, flops: float) -> tuple[int, float]:
        """Tokens of the next unit of at most so much arithmetic, or the least that is worth a launch, and the
        arithmetic that it is."""
        affordable = int(min(max(flops, self._least_flops), 1e18) / self._flops(1))
        tokens = min(self._chunk, max(self._least, affordable // self._step * self._step))
        left = self.total - self._start
        # the last chunk holds all queries that something is done with
        if left - tokens < PROMPT_QUERIES + self._last:
            tokens = left
        return tokens, self._flops(tokens)

    def _flops(self, tokens: int) -> float:
        """Arithmetic of the next tokens in this layer."""
        decoder, final = self._decoder, self._layer == self._decoder.shape.layers - 1
        if final and self.scores is None:
            return decoder.last_layer_flops(tokens)
        logits = decoder.logits_flops(tokens) if final else 0.0
        return decoder.layer_flops(tokens, self._attention.equivalent_tokens(self._start)) + logits

    @torch.inference_mode()
    def advance(self, tokens: int | None = None) -> Tensor | None:
        """One unit of work; returns the logits [last, vocab] after the last one, else None.

        Args:
            tokens: what ``unit`` returned; as many as a chunk may have if None.
        """
        if tokens is None:
            tokens, _ = self.unit(torch.inf)
        decoder, layer, start = self._decoder, self._layer, self._start
        end = start + tokens
        own = slice(start - self._cached, end - self._cached)
        rope = Rope(*(part[own] for part in self._rope))
        hidden = self._hidden[own]
        normed = decoder.input_norm(layer, hidden)
        query, _ = decoder.qkv(layer, normed, rope, self._rows[start:end])
        if self._from_codes and start == self._cached:
            self._exact = ExactRows(self._fetch_best(), self._cached)
        ending = end == self.total
        final = layer == decoder.shape.layers - 1
        self._start = end
        self._take_blocks()
        few = final and self.scores is None  # of this layer's outputs are needed
        if few and not ending:
            return None
        wanted = self._last if few else tokens
        ranking = PROMPT_QUERIES + self._last - 1  # from the first one whose logits are wanted
        if few:
            attended, lse = attend_prompt(query[-ranking:], self._rows[:end], decoder.scale)
        else:
            attended, lse = self._attention.attend(query, self._rows[:end], decoder.scale)
        if ending:
            last = LastTokens(query[-ranking:].clone(), lse[-ranking:])  # the clone lets go of the others
            self._cache.start_sets(layer, self._rows, self._prompts, lse[-1:], last, self._exact)
            self._change_rows()
            self._layer = layer + 1
            if not final:
                self._begin_layer()
        if not final:
            decoder.complete(layer, hidden, attended)
            return None
        hidden, normed = decoder.add_attention(layer, hidden[-wanted:], attended[-wanted:])
        _, normed = decoder.add_mlp(layer, hidden, normed)
        if self.scores is not None:
            rows = self.scores.rows(decoder.vocab)
            for first in range(0, tokens, rows):
                self.scores.take(start + first, decoder.logits(normed[first : first + rows]))
        return decoder.logits(normed[-self._last :]) if ending else None

    def _begin_layer(self) -> None:
        """The layer's rows begin with those that are in the arena already. Those of the next layer come
        meanwhile, where there is room for them."""
        self._start = self._taken = self._cached
        if not self._cached:
            return
        (self._loaded or self._load(self._layer, self._rows, ())).wait()
        if not self._from_codes:
            # Only now, as work on the side is done in the order in which it is asked for: the sets of the
            # layer before would wait for these rows, and then the rows of the next layer for those sets.
            self._cache.index_rows(self._layer, self._rows[: self._cached], self._cached_part)
        following, self._loaded = self._layer + 1, None
        if self._spare and following < self._decoder.shape.layers:
            self._loaded = self._load(following, *self._spare[0])

    def _load(self, layer: int, rows: Tensor, taken: Iterable[DeviceEvent]) -> DeviceEvent:
        load = self._cache.load_codes if self._from_codes else self._cache.load_rows
        return load(layer, rows[: self._cached], self._cached_part, taken)

    def _fetch_best(self) -> Tensor:
        """Make the rows exact that matter most of those that come from codes; their positions.

        The queries that choose are spread over all own tokens, since a long question may ask for many things,
        and are the same however the tokens are cut into units.
        """
        decoder, layer, own = self._decoder, self._layer, self.total - self._cached
        step = max(1, own // PROMPT_QUERIES)
        places = torch.arange(own - 1, -1, -step, device=self._hidden.device)[:PROMPT_QUERIES]
        rope = Rope(*(part[places] for part in self._rope))
        query, _ = decoder.qkv(layer, decoder.input_norm(layer, self._hidden[places]), rope)
        return self._cache.fetch_best(layer, self._rows[: self._cached], self._cached_part, query)

    @property
    def _cached_part(self) -> Prompts:
        return self._prompts.part(0, self._cached // self._decoder.shape.block_tokens)

    def _take_blocks(self) -> None:
        """The cache takes the blocks that have become complete: evenly over a layer, since decode steps share
        the device's link with these copies."""
        size = self._decoder.shape.block_tokens
        end = self._start if self._start == self.total else self._start // size * size
        if end > self._taken:
            part = self._prompts.part(self._taken // size, -(-end // size))
            self._cache.take_rows(self._layer, self._rows[self._taken : end], part)
            self._taken = end

    def _change_rows(self) -> None:
        """The next layer's rows do not overwrite those that are being stored and indexed."""
        if not self._spare:  # the device has done with them
            return
        self._spare.append((self._rows, self._cache.rows_taken()))
        self._rows, taken = self._spare.popleft()
        for event in taken:
            event.wait()
