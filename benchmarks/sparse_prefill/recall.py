"""What each estimator's blocks hold of the attention that they are chosen from."""

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.result import Result
from benchmarks.sparse_prefill.context import Context
from benchmarks.sparse_prefill.estimators import ESTIMATORS
from clo.kernels.attend_prompt import attend_prompt
from clo.kernels.sparse_prompt import ChosenBlocks, choose_blocks
from clo.kernels.weigh_blocks import BLOCK

SHARES = (0.05, 0.1, 0.2, 0.3)  # of the blocks of a layer
_JUDGED = 6  # blocks of queries of a chunk


class Chosen(NamedTuple):
    """What the chosen blocks of a layer hold, mean over heads: each a float."""

    recall: float  # of the attention that goes to earlier chunks
    error: float  # |chosen - full|^2 / |full|^2 of the attention's output


class Judge:
    """An ``Attend`` of full attention that judges all estimators on some queries of the last chunk.

    The blocks of the largest estimated weight are chosen over all heads of a layer together, as a threshold
    chooses them.

    Args:
        context: whose attention it is.
        total: tokens of the prompt.
        scale: factor of the scores.

    Attributes:
        found: for each estimator and share the figures of each layer.
    """

    def __init__(self, context: Context, total: int, scale: float) -> None:
        self._dense, self._total, self._scale = context.dense, total, scale
        self.found: dict[tuple[str, float], list[Chosen]] = {}

    def __call__(self, layer: int, query: Tensor, rows: Tensor) -> Tensor:
        if len(rows) == self._total and len(rows) > len(query):
            self._judge(query, rows)
        return self._dense(layer, query, rows)

    def _judge(self, query: Tensor, rows: Tensor) -> None:
        past = rows[: (len(rows) - len(query)) // BLOCK * BLOCK]
        own, own_lse = attend_prompt(query, rows[len(past) :], self._scale)
        starts = torch.linspace(0, len(query) // BLOCK - 1, _JUDGED).round().long() * BLOCK
        judged = (starts.unsqueeze(1) + torch.arange(BLOCK)).flatten().to(query.device)
        query, own, own_lse = query[judged], own[judged].float(), own_lse[judged]
        keys, values = (part.transpose(0, 1).unsqueeze(1).float() for part in past.unbind(2))
        grouped = query.float().unflatten(1, (len(keys), -1)).permute(1, 2, 0, 3)
        scores = grouped @ keys.transpose(2, 3) * self._scale  # [kv_heads, group, N, T]
        own_lse_by_head = own_lse.T.view(scores.shape[:3])
        total = torch.logaddexp(scores.logsumexp(-1), own_lse_by_head).unsqueeze(-1)
        weights = scores.sub_(total).exp_()
        kept = (own_lse_by_head.unsqueeze(-1) - total).exp()
        base = kept * own.transpose(0, 1).view(*scores.shape[:3], -1)
        full = base + weights @ values
        size = full.square().sum((2, 3))
        everything = weights.sum((2, 3))
        by_block = weights.unflatten(2, (_JUDGED, BLOCK)).unflatten(4, (-1, BLOCK))
        for name, weigh in ESTIMATORS.items():
            for share in SHARES:
                estimated = weigh(query, past[:, :, 0], own_lse, self._scale)
                marks = _marked(choose_blocks(estimated, share * estimated.shape[2]), estimated.shape)
                marks = marks.view(*scores.shape[:2], _JUDGED, 1, -1, 1)
                chosen = (by_block * marks).view(scores.shape)
                mass = chosen.sum(-1, keepdim=True)
                out = (base + chosen @ values) / (kept + mass)
                error = ((out - full).square().sum((2, 3)) / size).mean()
                recall = (mass.sum((2, 3)) / everything).mean()
                self.found.setdefault((name, share), []).append(Chosen(float(recall), float(error)))


def _marked(chosen: ChosenBlocks, shape: torch.Size) -> Tensor:
    """[query_heads, Q, K] float32, 1 for the chosen blocks, else 0."""
    numbers, counts = chosen
    listed = torch.arange(numbers.shape[2], device=numbers.device) < counts.unsqueeze(2)
    marks = torch.zeros(*shape[:2], shape[2] + 1, device=numbers.device)
    marks.scatter_(2, torch.where(listed, numbers, shape[2]).long(), 1.0)
    return marks[..., : shape[2]]


def results_of(length: int, judges: list[Judge]) -> list[Result]:
    """Means over layers and prompts, and the layer that loses most."""
    results = []
    for name, share in judges[0].found:
        figures = torch.tensor([judge.found[name, share] for judge in judges]).mean(0)  # [layers, 2]
        case = f"recall/{length}/{name}, {share:.0%} of blocks"
        results += [
            Result(case, "attention held", float(figures[:, 0].mean()), "of that to earlier chunks"),
            Result(case, "attention held, least layer", float(figures[:, 0].min()), "likewise"),
            Result(case, "output error", float(figures[:, 1].mean()), "of its square"),
        ]
    return results
