"""Valid calls of every operation that has a kernel; tests of kernels, checks and compilation share them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clo.kernels.add_shares import add_shares
from clo.kernels.append import append
from clo.kernels.attend import AttentionState, attend_resident, merge_fetched
from clo.kernels.attend_tail import attend_tail, tail_parts
from clo.kernels.blocks import PromptBlocks
from clo.kernels.copy_codes import load_codes, store_codes
from clo.kernels.decode_pages import decode_pages
from clo.kernels.encode import CODES_PER_BYTE, CodePages, encode_new
from clo.kernels.encode_prompts import encode_prompts
from clo.kernels.encode_values import ValuePages, encode_new_values, encode_prompt_values, halves_of
from clo.kernels.fetch import fetch
from clo.kernels.fill_resident import PromptSequences, fill_resident
from clo.kernels.flag import wait
from clo.kernels.gate import gate
from clo.kernels.limits import RUN
from clo.kernels.load import load_blocks, load_rows
from clo.kernels.mailbox import post
from clo.kernels.meeting import MOST_BLOCKS, Meeting
from clo.kernels.quantize_query import QuantizedQuery, Rope, quantize_query
from clo.kernels.resident import ResidentSet
from clo.kernels.sample import Adjustments, SamplingState, sample
from clo.kernels.score import Scores, score_codes
from clo.kernels.store import store_new, store_prompts
from clo.kernels.take import take
from clo.kernels.take_shares import take_shares
from clo.kernels.update_resident import FetchList, TailList, update_resident


class Shape(NamedTuple):
    """The shape of a model's attention."""

    head_dim: int
    kv_heads: int
    group: int
    dtype: torch.dtype


SHAPES = [
    Shape(16, 2, 2, torch.float32),
    Shape(64, 3, 3, torch.float32),
    Shape(64, 3, 3, torch.bfloat16),
    Shape(64, 1, 16, torch.float16),
    Shape(80, 2, 1, torch.bfloat16),
    Shape(80, 2, 5, torch.float32),
    Shape(96, 2, 4, torch.float16),
    Shape(96, 1, 6, torch.float32),
    Shape(128, 8, 4, torch.bfloat16),
    Shape(128, 4, 7, torch.float16),
    Shape(128, 2, 12, torch.float32),
    Shape(128, 1, 16, torch.bfloat16),
    Shape(224, 1, 3, torch.float16),
    Shape(256, 2, 2, torch.bfloat16),
    Shape(256, 1, 8, torch.float32),
]
"""Those at which the kernels are compared with their references."""


_kept: list[Tensor] = []  # whose addresses are in calls


@dataclass(frozen=True)
class Sizes:
    """What a call has beside the shape of the model."""

    batch: int = 3
    capacity: int = 7
    k: int = 6
    sinks: int = 4
    recent: int = 9
    block_tokens: int = 64
    max_blocks: int = 5
    vocab: int = 50
    slots: int = 13
    biases: int = 8
    runs: int = 5


@dataclass(frozen=True)
class Call:
    """A call of an operation: its function and its arguments by name."""

    function: Callable[..., Any]
    arguments: dict[str, Any]

    def run(self) -> Any:
        return self.function(**self.arguments)

    def __getitem__(self, name: str) -> Any:
        """The argument ``scores``, or ``resident.rows`` of the argument ``resident``."""
        parameter, _, field = name.partition(".")
        value = self.arguments[parameter]
        return getattr(value, field) if field else value

    def with_argument(self, name: str, value: object) -> "Call":
        """The same call with another argument, or another field of one."""
        parameter, _, field = name.partition(".")
        if field:
            value = self.arguments[parameter]._replace(**{field: value})
        return replace(self, arguments={**self.arguments, parameter: value})


def calls(shape: Shape, device: str, sizes: Sizes | None = None) -> dict[str, Call]:
    """A valid call of every operation, by name, with tensors of zeros on the CPU or the meta device."""
    sizes = sizes or Sizes()
    head_dim, kv_heads, group, dtype = shape
    batch, capacity, k, blocks = sizes.batch, sizes.capacity, sizes.k, sizes.batch * sizes.max_blocks
    tokens = sizes.max_blocks * sizes.block_tokens

    def zeros(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=device)

    heads = batch, kv_heads
    positions = zeros(*heads, capacity, dtype=torch.int32)
    rows = zeros(*heads, sizes.sinks + sizes.recent + capacity, 2, head_dim)
    resident = ResidentSet(rows, positions, positions.clone(), sizes.sinks, sizes.recent)
    fetch_list = FetchList(zeros(*heads, k, dtype=torch.int32), zeros(*heads, dtype=torch.int32))
    pages = CodePages(
        zeros(blocks, kv_heads, sizes.block_tokens, head_dim // CODES_PER_BYTE, dtype=torch.uint8),
        zeros(blocks, kv_heads, sizes.block_tokens, dtype=torch.float16),
        zeros(blocks, kv_heads, head_dim, dtype=torch.float32),
    )
    words = sizes.block_tokens // RUN, halves_of(head_dim), 32, 4
    values = ValuePages(
        zeros(blocks, kv_heads, *words, dtype=torch.int16),
        zeros(blocks, kv_heads, sizes.block_tokens, dtype=torch.float16),
    )
    scores = Scores(
        zeros(*heads, tokens, dtype=torch.int16), zeros(*heads, -(-tokens // RUN), 2, dtype=torch.int16)
    )
    met, width = min(batch, MOST_BLOCKS), 4 * head_dim
    places = [zeros(2, dtype=torch.int64) for _ in range(2)]
    if device == "cpu":  # where the reference reads what is at an address; the other rank has been there
        memory = zeros(met, width), zeros(met, 2, dtype=torch.int32) + 2**30
        places = [torch.tensor([tensor.data_ptr()] * 2) for tensor in memory]
        _kept.extend(memory)
    meeting = Meeting(places[0], places[1], zeros(met, dtype=torch.int32))
    runs = zeros(*heads, sizes.runs, dtype=torch.int32)
    tail = TailList(runs, runs + 1, zeros(*heads, dtype=torch.int32), zeros(*heads, dtype=torch.float32))
    queries = *heads, 1, group  # attended in one part, as the reference does
    state = AttentionState(
        zeros(*queries, head_dim, dtype=torch.float32),
        zeros(*queries, dtype=torch.float32),
        zeros(*queries, dtype=torch.float32),
    )
    with_tail = *heads, 1 + tail_parts(tail), group
    state_with_tail = AttentionState(
        zeros(*with_tail, head_dim, dtype=torch.float32),
        zeros(*with_tail, dtype=torch.float32),
        zeros(*with_tail, dtype=torch.float32),
    )
    quantized = QuantizedQuery(
        zeros(batch, kv_heads * group, head_dim, dtype=torch.int8),
        zeros(batch, kv_heads * group, dtype=torch.float32),
        zeros(*heads, sizes.max_blocks, group, dtype=torch.float32),
    )
    projected = zeros(
        batch, (group + 2) * kv_heads, head_dim
    )  # as the model projects queries, keys and values
    query, kv = projected[:, : group * kv_heads], projected[:, group * kv_heads :].unflatten(1, (kv_heads, 2))
    arena = zeros(kv_heads, blocks, sizes.block_tokens, 2, head_dim).transpose(0, 1)
    token_bytes = head_dim // CODES_PER_BYTE + 2 + 16 * halves_of(head_dim) + 2
    code_bytes = sizes.block_tokens * token_bytes + 4 * head_dim
    codes = zeros(kv_heads, blocks, code_bytes, dtype=torch.uint8).transpose(0, 1)
    lengths = torch.full((batch,), tokens, dtype=torch.int64, device=device)
    table = zeros(batch, sizes.max_blocks + 1, dtype=torch.int64)[:, : sizes.max_blocks]
    counters = zeros(*heads, 6, dtype=torch.int64)
    reselect = zeros(*heads, dtype=torch.bool)
    lse = zeros(batch, kv_heads * group, dtype=torch.float32)
    rotation = zeros(head_dim, head_dim, dtype=torch.float32)
    rope = Rope(zeros(batch, head_dim), zeros(batch, head_dim))
    numbers = zeros(batch, dtype=torch.int64)
    many = max(sizes.slots, batch)
    of_slots, shares = zeros(many, dtype=torch.int64), zeros(many, dtype=torch.float32)
    state_of_slots = SamplingState(shares, shares + 1, of_slots, of_slots, of_slots)
    adjustments = Adjustments(
        zeros(many, dtype=torch.bool), zeros(many, sizes.vocab, dtype=torch.int16),
        zeros(many, 3, dtype=torch.float32), of_slots,
        zeros(many, sizes.biases, dtype=torch.int32), zeros(many, sizes.biases, dtype=torch.float32),
        zeros(many, dtype=torch.bool), zeros(many, -(-sizes.vocab // 32), dtype=torch.int32), of_slots,
    )  # fmt: skip
    prompts = zeros(tokens, kv_heads, 2, head_dim)
    parts = torch.arange(sizes.max_blocks, device=device)
    prompt_blocks = PromptBlocks(
        parts * sizes.block_tokens, torch.full_like(parts, sizes.block_tokens), parts, parts.flip(0)
    )
    slots = torch.arange(batch + 2, device=device) % batch  # more than there are: some are filled twice
    sequences = PromptSequences(torch.zeros_like(slots), torch.full_like(slots, tokens), slots)
    found = [
        Call(append, {"kv": kv, "lengths": lengths, "resident": resident}),
        Call(store_prompts, {"rows": prompts, "prompt_blocks": prompt_blocks, "arena": arena}),
        Call(load_blocks, {"rows": prompts[: sizes.block_tokens], "blocks": parts[:1], "arena": arena}),
        Call(
            load_rows,
            {
                "rows": prompts, "positions": zeros(kv_heads, k, dtype=torch.int32), "blocks": parts,
                "arena": arena,
            },
        ),
        Call(
            store_codes,
            {"pages": pages, "values": values, "prompt_blocks": prompt_blocks, "arena": codes},
        ),
        Call(
            load_codes,
            {"pages": pages, "values": values, "prompt_blocks": prompt_blocks, "arena": codes},
        ),
        Call(
            decode_pages,
            {
                "rows": prompts, "numbers": parts, "pages": pages, "values": values, "rotation": rotation,
            },
        ),
        Call(store_new, {"kv": kv, "lengths": lengths, "block_table": table, "arena": arena}),
        Call(
            encode_new,
            {
                "keys": kv[:, :, 0], "lengths": lengths, "page_table": table, "pages": pages,
                "rotation": rotation,
            },
        ),
        Call(
            encode_prompts,
            {
                "keys": prompts[:, :, 0], "prompt_blocks": prompt_blocks, "pages": pages,
                "rotation": rotation,
            },
        ),
        Call(
            encode_new_values,
            {"values": kv[:, :, 1], "lengths": lengths, "page_table": table, "pages": values},
        ),
        Call(
            encode_prompt_values,
            {"values": prompts[:, :, 1], "prompt_blocks": prompt_blocks, "pages": values},
        ),
        Call(
            fill_resident,
            {
                "rows": prompts, "sequences": sequences,
                "chosen": zeros(len(slots), kv_heads, capacity, dtype=torch.int32), "resident": resident,
            },
        ),
        Call(
            gate,
            {
                "query": query, "selection_query": zeros(*heads, group * head_dim),
                "threshold": zeros(kv_heads, dtype=torch.float32), "lengths": lengths, "whole": 0,
                "counters": counters,
            },
        ),
        Call(
            quantize_query,
            {
                "query": query, "pages": pages, "rotation": rotation, "lse": lse, "lengths": lengths,
                "page_table": table, "scale": 0.3, "rope": rope,
            },
        ),
        Call(
            score_codes,
            {
                "quantized": quantized, "pages": pages, "reselect": reselect, "lengths": lengths,
                "page_table": table, "sinks": sizes.sinks, "latest": sizes.recent, "scale": 0.3,
            },
        ),
        Call(
            update_resident,
            {
                "scores": scores, "reselect": reselect, "lengths": lengths,
                "latest": sizes.recent, "resident": resident, "counters": counters, "k": k, "tail": tail,
                "successors": True,
            },
        ),
        Call(
            fetch,
            {"fetch_list": fetch_list, "resident": resident, "block_table": table, "arena": arena},
        ),
        Call(
            attend_resident,
            {
                "query": query, "kv": kv, "resident": resident, "lengths": lengths,
                "fetch_list": fetch_list, "scale": 0.3,
            },
        ),
        Call(
            attend_tail,
            {
                "state": state_with_tail, "quantized": quantized, "pages": pages, "values": values,
                "tail": tail, "lengths": lengths, "page_table": table, "lse": lse, "scale": 0.3,
            },
        ),
        Call(
            merge_fetched,
            {
                "state": state, "query": query, "resident": resident, "lengths": lengths,
                "fetch_list": fetch_list, "lse": lse, "scale": 0.3, "counters": counters,
            },
        ),
        Call(
            sample,
            {
                "logits": zeros(batch, sizes.vocab, dtype=torch.float32), "slots": slots[:batch],
                "lengths": of_slots, "state": state_of_slots, "adjustments": adjustments,
            },
        ),
        Call(
            take,
            {
                "drawn": numbers, "slots": slots[:batch], "lengths": of_slots, "tokens": of_slots,
                "adjustments": adjustments,
            },
        ),
        Call(
            post,
            {
                "tokens": numbers, "counter": zeros(1, dtype=torch.int64),
                "mailbox": zeros(4, 1 + batch, dtype=torch.int64),
            },
        ),
        Call(
            wait,
            {
                "flag": zeros(1, dtype=torch.int64) + 1, "number": 1, "timeout_ns": 0,
                "status": zeros(1, dtype=torch.int64),
            },
        ),
        Call(
            add_shares,
            {
                "hidden": zeros(met, width), "weight": zeros(width), "meeting": meeting, "rank": 1,
                "eps": 1e-5,
            },
        ),
        Call(
            take_shares,
            {"taken": zeros(2, 4, dtype=torch.int64), "meeting": meeting, "rank": 1},
        ),
    ]  # fmt: skip
    return {call.function.__name__: call for call in found}


def prompt_blocks_of(lengths: list[int], block_tokens: int) -> PromptBlocks:
    """How prompts that lie behind each other fill blocks and pages, of which there are 3 more than parts.

    There are a part between them and one at the end that are not in use; what these say besides is wrong.
    """
    parts, start = [], 0
    for length in lengths:
        firsts = range(start, start + length, block_tokens)
        parts += [(first, min(block_tokens, start + length - first)) for first in firsts]
        start += length
    parts = [*parts[:1], (2**40, 0), *parts[1:], (2**40, 0)]
    starts, counts = torch.tensor(parts).T.contiguous()
    blocks, pages = (torch.randperm(len(parts) + 3)[: len(parts)].where(counts > 0, 2**40) for _ in range(2))
    return PromptBlocks(starts, counts, blocks, pages)
