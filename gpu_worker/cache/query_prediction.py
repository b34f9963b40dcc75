"""Which layers' queries can be predicted a layer early: prefetching relies on it, so it is measured."""

import logging
from enum import Enum

import torch
from torch import Tensor

from clo.gpu_worker.model.decoder import Decoder
from clo.kernels.attend_prompt import attend_prompt
from clo.kernels.quantize_query import Rope
from clo.runtime.config import CacheConfig

logger = logging.getLogger(__name__)

_TOKENS, _QUERIES, _SELECTED = 1024, 64, 64
_MOST_LOST = 0.0125  # share of a head's attention
_ALWAYS = CacheConfig.sinks + CacheConfig.recent  # tokens that need no selection


class QuerySource(Enum):
    """The query that a layer selects with."""

    OWN = "its own"
    MIDDLE = "predicted between attention and MLP of the layer before"
    INPUT = "predicted from the input of the layer before"


@torch.inference_mode()
def measure_query_sources(decoder: Decoder) -> tuple[QuerySource, ...]:
    """The earliest query of each layer whose selection loses little against that of the layer's own query.

    The loss is measured in attention: the weight, by the layer's own query, of the keys that this query
    selects, less the weight of the keys that the predicted query selects. It depends on the weights more than
    on the text: random tokens single out the same layers as documents, so that no text is needed. The tokens
    come twice, since a wrong guess harms copying most, and heads that copy respond to a repeated random
    sequence (Olsson et al. 2022, "In-context Learning and Induction Heads").
    """
    shape, device = decoder.shape, decoder.device
    drawn = torch.randint(decoder.vocab, (_TOKENS // 2,), generator=torch.Generator().manual_seed(0))
    rope = decoder.rope(torch.arange(_TOKENS, device=device))
    last = Rope(*(part[-_QUERIES:] for part in rope))
    hidden = decoder.embed(drawn.repeat(2).to(device))
    normed = decoder.input_norm(0, hidden)
    sources = []
    earlier: list[tuple[QuerySource, Tensor]] = []
    for layer in range(shape.layers):
        query, rows = decoder.qkv(layer, normed, rope)
        real = _weights(query[-_QUERIES:], rows[:, :, 0], decoder.scale)
        found = QuerySource.OWN
        for source, entering in earlier:
            predicted = decoder.query(layer, decoder.input_norm(layer, entering), last)
            chosen = _weights(predicted, rows[:, :, 0], decoder.scale).topk(_SELECTED).indices
            lost = real.topk(_SELECTED).values.sum(-1) - real.gather(-1, chosen).sum(-1)
            mean = float(lost.mean())  # over the heads of this rank
            if (mean if decoder.group is None else decoder.group.mean(mean)) <= _MOST_LOST:
                found = source
                break
        sources.append(found)
        attended, _ = attend_prompt(query, rows, decoder.scale)
        middle, normed = decoder.add_attention(layer, hidden, attended)
        earlier = [(QuerySource.INPUT, hidden[-_QUERIES:]), (QuerySource.MIDDLE, middle[-_QUERIES:])]
        hidden, normed = decoder.add_mlp(layer, middle, normed)
    for source in QuerySource:
        layers = [layer for layer, found in enumerate(sources) if found is source]
        logger.info("layers that select with a query %s: %s", source.value, layers)
    return tuple(sources)


def _weights(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Attention of the last tokens' queries [W, query_heads, D] to keys [T, kv_heads, D], averaged over a
    query group, for the keys among which a head selects: [kv_heads, W, any] float32."""
    count, kv_heads = len(queries), keys.shape[1]
    grouped = queries.float().view(count, kv_heads, -1, queries.shape[-1]).permute(1, 2, 0, 3)
    scores = grouped @ keys.float().permute(1, 2, 0).unsqueeze(1) * scale  # [kv_heads, group, W, T]
    number = torch.arange(len(keys), device=keys.device)
    later = number > number[-count:, None]
    weights = scores.masked_fill(later, -torch.inf).softmax(-1).mean(1)
    return weights[..., : len(keys) - count - _ALWAYS]
