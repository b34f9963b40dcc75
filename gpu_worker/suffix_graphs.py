"""Prefill of a few tokens behind others whose rows are in the arena: CUDA graphs of one layer each.

What few tokens take is launched in less time than it takes on the device only as a graph: a layer is some
sixty kernels. A graph of one layer leaves room for decode steps between two layers, as the units of
``clo.gpu_worker.prefill`` do. How many tokens there are is known to the device alone, so one graph serves
suffixes up to its size behind any number of others. On the CPU, and in 32-bit dtypes, there are no graphs.
"""

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from clo.gpu_worker.cache.kv_cache import KVCache
from clo.gpu_worker.cache.layer import PROMPT_QUERIES
from clo.gpu_worker.cache.prompt import LastTokens, Prompts
from clo.gpu_worker.graphs import capturing
from clo.gpu_worker.model.decoder import Decoder
from clo.gpu_worker.prompt_scores import PromptScores
from clo.gpu_worker.side_stream import DeviceEvent
from clo.kernels.attend_prompt import attend_suffix, suffix_lse
from clo.kernels.blocks import PromptBlocks
from clo.kernels.fill_resident import PromptSequences
from clo.kernels.quantize_query import Rope
from clo.runtime.model.kv_shape import KVShape

SIZES = (64, 256, 512, 1024, 2048)  # tokens of a suffix
# Of a whole prompt: the rows of a longer one take longer to read than a layer to launch, and so do the codes.
_MOST_TOKENS, _MOST_OF_CODES = 65_536, 2**17 + SIZES[-1]
_LEAST_TOKENS = 4096  # where less fits, the graphs are not worth their start
_QUERIES = 1024  # and more fill a device without cutting the rows before them into pieces


def most_tokens(shape: KVShape, max_tokens: int, spare: int | None, *, codes: bool) -> int:
    """Tokens of the longest prompt that the graphs take, suffix included; 0 where there is no room for them.

    Args:
        max_tokens: longest sequence.
        spare: bytes that the rows of two layers and activations may take, about; None for any number.
        codes: whether what is in the arena is taken from its codes.
    """
    most = min(max_tokens, _MOST_OF_CODES if codes else _MOST_TOKENS)
    if spare is None:
        return most
    token_bytes = shape.kv_heads * (2 * shape.row_bytes + 3 * PROMPT_QUERIES)
    activations = SIZES[-1] * (14 * shape.width_bytes + 4 * shape.hidden_bytes)
    fitting = (spare - activations) // token_bytes - SIZES[-1]
    return min(most, fitting) if fitting >= _LEAST_TOKENS else 0


class _Inputs:
    """What the graphs of a size read: views of one buffer, which one copy fills.

    Args:
        size: N, tokens of a suffix at most.
        most: tokens of a prompt at most.
        block_tokens: tokens of a block.
        device: that of the graphs.
        codes: whether what is in the arena is taken from its codes.

    Attributes:
        tokens, positions: [N] int64, of the suffix; the positions go on behind its end.
        pieces: [S + 1] int64, bounds of the rows before the suffix, see ``attend_suffix``; small_pieces: the
            same for the queries that choose rows, which are fewer.
        own: [2] int64, bounds of the suffix.
        last: [1] int64, the last token as a number of the suffix.
        ranking: [W] int64, the tokens whose queries choose rows: the last ones or, where what is in the arena
            is taken from its codes, some of all.
        lengths: [W] int64, the prompt's tokens.
        pages: [max_blocks] int64, pages of the prompt.
        prefix, suffix: which blocks and pages the rows before the suffix and its own ones have.
    """

    def __init__(self, size: int, most: int, block_tokens: int, device: torch.device, *, codes: bool) -> None:
        self.size, self._block_tokens, self._codes = size, block_tokens, codes
        parts, own_parts = -(-most // block_tokens), -(-size // block_tokens) + 1
        self._counts = max(1, _QUERIES // size), _QUERIES // PROMPT_QUERIES  # of pieces
        self._widths = [
            size, size, *(count + 1 for count in self._counts), 2, 1, PROMPT_QUERIES, PROMPT_QUERIES, parts,
            *[1] * 3, *[parts] * 4, *[own_parts] * 4,
        ]  # fmt: skip
        self._buffer = torch.zeros(sum(self._widths), dtype=torch.int64, device=device)
        (
            self.tokens, self.positions, self.pieces, self.small_pieces, self.own, self.last, self.ranking,
            self.lengths, self.pages, *fields,
        ) = self._buffer.split(self._widths)  # fmt: skip
        sequences = PromptSequences(*fields[:3])
        self.prefix, self.suffix = (
            Prompts(sequences, PromptBlocks(*part), None) for part in (fields[3:7], fields[7:])
        )
        sequences.lengths.fill_(1)  # of no prompt, while graphs are captured
        self.prefix.blocks.blocks.fill_(-1)  # and nothing is read

    def fill(self, slot: int, tokens: list[int], cached: int, blocks: list[int], pages: list[int]) -> None:
        """Describe the next prompt, of which the first ``cached`` tokens are in the arena."""
        total, count = len(tokens), self._block_tokens
        own, first = total - cached, cached // count
        step = max(1, own // PROMPT_QUERIES) if self._codes else 1
        parts = [
            (start, min(count, total - start), block, page)
            for start, block, page in zip(range(0, total, count), blocks, pages, strict=False)
        ]
        columns: list[list[int]] = [
            tokens[cached:],
            list(range(cached, cached + self.size)),
            *([cached * piece // count for piece in range(count + 1)] for count in self._counts),
            [cached, total],
            [own - 1],
            [max(0, own - 1 - step * number) for number in reversed(range(PROMPT_QUERIES))],
            [total] * PROMPT_QUERIES,
            pages[: len(parts)],
            [0], [total], [slot],
        ]  # fmt: skip
        # the rows of a part lie where its tokens do; one that is not in use has no tokens
        for some in (parts[:first], parts[first:]):
            columns += [[part[field] for part in some] for field in range(4)]
        unused = [0] * len(columns)
        unused[14] = unused[
            15
        ] = -1  # and before the suffix no block and page: ``load_blocks`` asks these alone
        values: list[int] = []
        for column, width, value in zip(columns, self._widths, unused, strict=True):
            values += column + [value] * (width - len(column))
        pinned = self._buffer.is_cuda
        self._buffer.copy_(torch.tensor(values, pin_memory=pinned), non_blocking=True)


class _State(NamedTuple):
    """What a layer leaves for the next one."""

    hidden: Tensor  # [N, hidden]
    normed: Tensor  # [N, hidden], after the next layer's norm
    rope: Rope  # of the suffix's positions


class SuffixGraphs:
    """Graphs of each layer for a few sizes of suffixes, in one pool of memory, for one prompt at a time.

    Args:
        decoder: the model.
        cache: takes the rows.
        max_tokens: longest sequence.
        spare: bytes that they may take; None for any number.
    """

    def __init__(self, decoder: Decoder, cache: KVCache, max_tokens: int, spare: int | None = None) -> None:
        self._decoder, self._cache, self._codes = decoder, cache, cache.least_prefix is not None
        self._most = most_tokens(decoder.shape, max_tokens, spare, codes=self._codes)
        self._rows: tuple[Tensor, ...] = ()
        self._inputs: dict[int, _Inputs] = {}
        self._graphs: dict[int, list[torch.cuda.CUDAGraph]] = {}
        self._logits: dict[int, Tensor] = {}
        self._user: Callable[[], SuffixPrefill | None] = lambda: None

    def capture(self) -> None:
        """Capture the graphs, before there is any sequence."""
        shape, device, fitting = self._decoder.shape, self._decoder.device, self._cache.fitting_tokens
        if device.type != "cuda" or shape.dtype == torch.float32 or not self._cache.ranks_codes:
            return
        if fitting is None or self._most <= fitting:
            return
        self.prepare()
        stream, pool = torch.cuda.Stream(device), None
        for size, inputs in tqdm(self._inputs.items(), desc="Capturing suffixes", disable=None):
            stream.wait_stream(torch.cuda.current_stream())
            state: _State | Tensor | None = None
            with torch.cuda.stream(stream):
                for layer in range(shape.layers):
                    state = self.forward(inputs, layer, state)  # compiles what is not yet compiled
            state, graphs = None, []
            for layer in range(shape.layers):
                graphs.append(torch.cuda.CUDAGraph())
                with capturing(graphs[-1], pool, stream):
                    state = self.forward(inputs, layer, state)
                pool = graphs[-1].pool()
            assert isinstance(state, Tensor)
            self._graphs[size], self._logits[size] = graphs, state
        torch.cuda.synchronize()

    def prepare(self) -> None:
        """Take the memory that the layers read and write; until ``capture`` they are run kernel by kernel."""
        shape, device = self._decoder.shape, self._decoder.device
        blocks = -(-self._most // shape.block_tokens)
        tokens = max(self._most + SIZES[-1], blocks * shape.block_tokens)
        size = tokens, shape.kv_heads, 2, shape.head_dim
        self._rows = tuple(torch.zeros(size, dtype=shape.dtype, device=device) for _ in range(2))
        # Largest first, so that the others fit into its memory.
        for count in SIZES[::-1]:
            self._inputs[count] = _Inputs(count, self._most, shape.block_tokens, device, codes=self._codes)

    def takes(self, total: int, cached: int) -> bool:
        """Whether the graphs take the last tokens of a prompt, and no other prompt uses them."""
        user, fitting = self._user(), self._cache.fitting_tokens
        if user is not None and user.remaining_flops > 0:
            return False
        if not self._cache.stores:  # which a graph does, once it is captured
            return False
        if fitting is None or not fitting < total <= self._most:
            return False
        return PROMPT_QUERIES <= total - cached <= max(self._inputs, default=0)

    def begin(
        self, slot: int, tokens: list[int], blocks: list[int], pages: list[int], cached: int
    ) -> "SuffixPrefill":
        """Begin the prefill of a prompt that ``takes`` has said yes to.

        Args:
            slot: the sequence's slot.
            tokens: the prompt.
            blocks, pages: those of the sequence.
            cached: first tokens whose rows are in their blocks already, whole blocks of them.
        """
        inputs = self._inputs[min(size for size in self._inputs if size >= len(tokens) - cached)]
        inputs.fill(slot, tokens, cached, blocks, pages)
        prefill = SuffixPrefill(self, inputs, len(tokens), cached)
        self._user = weakref.ref(prefill)
        return prefill

    @property
    def decoder(self) -> Decoder:
        return self._decoder

    def run(self, inputs: _Inputs, layer: int, state: _State | Tensor | None) -> _State | Tensor | None:
        """One layer, as a graph if there is one; returns the logits [1, vocab] float32 after the last one."""
        if inputs.size not in self._graphs:
            return self.forward(inputs, layer, state)
        graphs = self._graphs[inputs.size]
        graphs[layer].replay()
        return self._logits[inputs.size] if layer == len(graphs) - 1 else None

    def forward(self, inputs: _Inputs, layer: int, state: _State | Tensor | None) -> _State | Tensor:
        """One layer, kernel by kernel, given what the layer before it has returned; the last one returns the
        logits [1, vocab] float32."""
        decoder, cache, (rows, following) = self._decoder, self._cache, self._rows[:: 1 - 2 * (layer % 2)]
        prefix, last = inputs.prefix, layer == decoder.shape.layers - 1
        if not isinstance(state, _State):
            hidden = decoder.embed(inputs.tokens)
            state = _State(hidden, decoder.input_norm(0, hidden), decoder.rope(inputs.positions))
            self._load(layer, rows, prefix).wait()
        hidden, normed, rope = state
        loaded = None if last else self._load(layer + 1, following, prefix)
        query, own_rows = decoder.qkv(layer, normed, rope)
        rows.index_copy_(0, inputs.positions, own_rows)
        cache.take_rows(layer, rows, inputs.suffix)
        ranking, pieces, own = inputs.ranking, inputs.pieces.int(), inputs.own.int()
        by_prompt, asking = (inputs.lengths, inputs.pages), query[ranking]
        if self._codes:
            sums = suffix_lse(asking, ranking, own_rows, rows, inputs.small_pieces.int(), decoder.scale)
            by = LastTokens(asking, sums)
            chosen = cache.fetch_best_by_codes(layer, rows, prefix, by, *by_prompt, inputs.own)
            attended, lse = attend_suffix(query, rows, pieces, own, decoder.scale)
            cache.start_chosen(layer, rows, inputs.suffix, chosen, lse[inputs.last])
        else:
            attended, lse = attend_suffix(query, rows, pieces, own, decoder.scale)
            cache.index_rows(layer, rows, prefix)
            cache.start_sets_by_codes(
                layer, rows, inputs.suffix, LastTokens(asking, lse[ranking]), *by_prompt
            )
        if last:  # no other token's output is used
            hidden, attended = hidden[inputs.last], attended[inputs.last]
        hidden, normed = decoder.add_attention(layer, hidden, attended)
        hidden, normed = decoder.add_mlp(layer, hidden, normed)
        cache.join_prompts()
        if loaded is not None:
            loaded.wait()
        return decoder.logits(normed) if last else _State(hidden, normed, rope)

    def _load(self, layer: int, rows: Tensor, prefix: Prompts) -> DeviceEvent:
        size = len(prefix.blocks.blocks) * self._decoder.shape.block_tokens
        load = self._cache.load_codes if self._codes else self._cache.load_rows
        return load(layer, rows[:size], prefix, ())


class SuffixPrefill:
    """The prefill of one prompt by the graphs of its suffix's size, one layer at a time, with the methods of
    ``clo.gpu_worker.prefill.Prefill``.

    Args:
        graphs: run the layers.
        inputs: describe the prompt.
        total: tokens of the prompt.
        cached: of which are in the arena already.
    """

    scores: PromptScores | None = None  # a graph keeps the last token's logits alone

    def __init__(self, graphs: SuffixGraphs, inputs: _Inputs, total: int, cached: int) -> None:
        self._graphs, self._inputs, self.total, self._cached = graphs, inputs, total, cached
        self._layer, self._layers = 0, graphs.decoder.shape.layers
        self._state: _State | Tensor | None = None

    @property
    def done(self) -> int:
        """Work that is finished, as a number of prompt tokens out of ``total``, those cached included."""
        return self._cached + self._layer * (self.total - self._cached) // self._layers

    @property
    def remaining_flops(self) -> float:
        """Arithmetic that is left, about."""
        return (self._layers - self._layer) * self._layer_flops

    def unit(self, flops: float) -> tuple[int, float]:
        """Tokens of the next unit, which is a layer of all of them, and the arithmetic that it is."""
        return self.total - self._cached, self._layer_flops

    @property
    def _layer_flops(self) -> float:
        return self._graphs.decoder.layer_flops(self.total - self._cached, self._cached)

    @torch.inference_mode()
    def advance(self, tokens: int | None = None) -> Tensor | None:
        """One layer; returns the logits [1, vocab] after the last one, overwritten by the next prompt, else
        None."""
        self._state = self._graphs.run(self._inputs, self._layer, self._state)
        self._layer += 1
        return self._state if isinstance(self._state, Tensor) else None
