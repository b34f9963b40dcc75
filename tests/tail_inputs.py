"""Inputs for tests of the tail, and what it is by its definition."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from clo.kernels.encode import CODES_PER_BYTE, CodePages, encode, unpack
from clo.kernels.encode_values import (
    ValuePages,
    decode_values,
    encode_values,
    halves_of,
    pack_values,
)
from clo.kernels.limits import RUN
from clo.kernels.resident import ResidentSet
from clo.kernels.score import NEVER, Scores, sum_runs
from clo.kernels.update_resident import TailList
from tests.kernel_calls import Shape

BLOCK_TOKENS = 64


def empty_tail(batch: int, kv_heads: int, runs: int) -> TailList:
    """A tail of ``runs`` runs at most, with none."""
    numbers = torch.zeros(batch, kv_heads, runs, dtype=torch.int32)
    counts = torch.zeros(batch, kv_heads, dtype=torch.int32)
    return TailList(numbers, numbers.clone(), counts, counts.float())


def tokens_of(tail: TailList, tokens: int) -> Tensor:
    """[B, kv_heads, tokens] int64: how many times each token is in the tail."""
    batch, kv_heads, most = tail.runs.shape
    listed = (torch.arange(most) < tail.counts.cpu().unsqueeze(-1)).unsqueeze(-1)
    places = torch.arange(RUN)
    bits = tail.masks.cpu().unsqueeze(-1) >> places & listed
    positions = (tail.runs.cpu().unsqueeze(-1) * RUN + places).where(listed, 0)
    found = torch.zeros(batch, kv_heads, tokens + RUN, dtype=torch.int64)
    found.scatter_add_(2, positions.flatten(2).long(), bits.flatten(2).long())
    return found[..., :tokens]


def with_runs(rows: Tensor, lengths: Tensor, latest: int) -> Scores:
    """Scores [B, kv_heads, T] int16, of which those of the latest tokens say nothing, and their runs."""
    late = torch.arange(rows.shape[2], device=rows.device) >= lengths.view(-1, 1, 1) - latest
    return Scores(rows, sum_runs(rows.masked_fill(late, NEVER)))


def check_tail(
    tail: TailList,
    scores: Tensor,
    length: int,
    latest: int,
    before: Tensor,
    resident: ResidentSet,
    line: tuple[int, int],
) -> None:
    """Compare the tail of one sequence and head with its definition.

    Args:
        scores: [T] int16, those of the line.
        before: [C] the positions of its set before the selection.
        line: sequence and head.
    """
    runs = -(-len(scores) // RUN)
    weights = (scores.int() << 16).view(torch.float32).clone()
    weights[(scores <= 0) | (torch.arange(len(scores)) >= length - latest)] = 0
    all_weights = weights.clone()
    weights[before[before >= 0].long()] = 0
    sums = torch.nn.functional.pad(weights, (0, runs * RUN - len(scores))).view(runs, RUN).sum(1)
    count, most = int(tail.counts[line]), tail.runs.shape[2]
    listed = tail.runs[line][:count].long()
    assert count == min(most, int((sums > 0).sum()))
    assert (listed.diff() > 0).all(), "ascending, each once"
    if count < int((sums > 0).sum()):
        rest = sums.clone()
        rest[listed] = 0
        assert sums[listed].min() >= rest.max() * 0.99, "sums are rounded to 8 bits"
    positions = listed.unsqueeze(1) * RUN + torch.arange(RUN)
    wanted = (positions >= resident.sinks) & (positions < length - resident.recent)
    wanted &= ~torch.isin(positions, resident.positions[line])
    assert torch.equal(tail.masks[line][:count].unsqueeze(1) >> torch.arange(RUN) & 1, wanted.int())
    now = torch.nn.functional.pad(all_weights, (0, runs * RUN - len(scores))).view(runs, RUN)[listed]
    dropped = torch.ones(runs, dtype=torch.bool)
    dropped[listed] = False
    others, within = float(sums[dropped].sum()), float((now * wanted).sum())
    boost = math.log2(1 + min(others / within, 1e6)) if within else 0.0
    assert abs(float(tail.boosts[line]) - boost) < 0.03, "it stands for all others"


class Coded(NamedTuple):
    """An index with random keys and values of B sequences."""

    pages: CodePages
    values: ValuePages
    rotation: Tensor
    page_table: Tensor  # [B, blocks]
    keys: Tensor  # [B, kv_heads, T, head_dim] float32, as their codes say
    attended: Tensor  # the same of the values


def coded(shape: Shape, batch: int, tokens: int) -> Coded:
    """Random keys and values, encoded page by page."""
    dim, kv_heads = shape.head_dim, shape.kv_heads
    blocks = tokens // BLOCK_TOKENS
    table = torch.randperm(batch * blocks + 3)[: batch * blocks].view(batch, blocks)
    lines = (batch * blocks + 3, kv_heads)
    rotation = torch.linalg.qr(torch.randn(dim, dim)).Q.contiguous()
    centres = 0.3 * torch.randn(*lines, dim)
    keys = centres.unsqueeze(2) + torch.randn(*lines, BLOCK_TOKENS, dim)
    codes, scales = encode(keys, centres.unsqueeze(2), rotation)
    levels, value_scales = encode_values(torch.randn(*lines, BLOCK_TOKENS, dim))
    decoded = (unpack(codes).float() - 1.5) * scales.float().unsqueeze(-1) @ rotation.T + centres.unsqueeze(2)

    def by_sequence(pool: Tensor) -> Tensor:
        return pool[table].transpose(1, 2).flatten(2, 3)

    assert codes.shape[3] == dim // CODES_PER_BYTE
    packed = pack_values(levels)
    assert packed.shape[3] == halves_of(dim)
    return Coded(
        CodePages(codes, scales, centres), ValuePages(packed.contiguous(), value_scales), rotation, table,
        by_sequence(decoded), by_sequence(decode_values(levels, value_scales)),
    )  # fmt: skip


def random_tail(batch: int, kv_heads: int, runs: int, tokens: int) -> TailList:
    """Random runs with random masks, of every count from none to ``runs``, some of them empty."""
    drawn = torch.rand(batch, kv_heads, tokens // RUN).argsort(2)[..., :runs].sort(2).values.int()
    numbers = torch.zeros(batch, kv_heads, runs, dtype=torch.int32)
    numbers[..., : drawn.shape[2]] = drawn
    masks = torch.randint(0, 2**RUN, (batch, kv_heads, runs), dtype=torch.int32)
    masks[..., ::5] = 0
    counts = torch.randint(0, min(runs, tokens // RUN) + 1, (batch, kv_heads), dtype=torch.int32)
    counts[0], counts[1] = 0, min(runs, tokens // RUN)
    return TailList(numbers, masks, counts, torch.rand(batch, kv_heads))
