"""Indexes at about equal bits: how many of a head's true top rows each one finds, and how well it weighs the
others, on a real model and real text.

    python -m benchmarks.indexes

Keys are those of prompts of 4,096 tokens of the default model, queries those of their last 32 tokens, over
all layers and heads. What a row is worth is its softmax weight, summed over the queries of a KV head, as in
``clo.kernels.score.score_products``; an index estimates the products of queries and keys that it follows
from. First and latest tokens, which are always attended, are left out. Every index has a code of 2 bits for
each entry of a key (128 at head_dim 64); "bits a key" adds scales and offsets. All but ``page`` and those by
channel centre the keys on the mean of their block of 512. The learned hash is trained, head by head, on a
document that no index is judged by.

"Error of the others" is what the tail lives on: the sum of what the weights of all but the true top rows are
off by, as a share of their sum, relative to the true log-sum-exp; 1 is what dropping them loses.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.quality.forcing import Reference
from benchmarks.result import Result, write
from benchmarks.tasks import documents, make_item
from clo.gpu_worker.model.decoder import load_decoder
from clo.kernels.blocks import gather_tokens
from clo.kernels.encode import encode, unpack
from clo.runtime.config import CacheConfig, ModelConfig
from clo.runtime.model.files import resolve
from clo.runtime.tokenizer import Tokenizer
from clo.runtime.wire.messages import Text

LENGTH, BLOCK = 4096, 512
TRAINING, JUDGED = 4, (0, 1)  # documents
K = CacheConfig().sizes(8192, 1)[0].select_k
PAGE = 16  # keys: two float16 an entry for each page are 2 bits an entry for each key
STEPS, RATE = 60, 0.01  # of training

Products = Callable[[Tensor], Tensor]
"""From queries [H, N, D] of H KV heads to estimates of query times key, [H, N, T]."""


class Index(NamedTuple):
    name: str
    bits: int  # of a key
    make: Callable[[Tensor], Products]  # from keys [H, T, D]


def exact(keys: Tensor) -> Products:
    return lambda queries: _dot(queries, keys)


def two_bit(keys: Tensor) -> Products:
    """Rotated 2-bit codes with one scale (``clo.kernels.encode``): what CLO uses."""
    rotation, (centres, _) = _rotation(keys.shape[2]), _centred(keys)
    codes, scales = encode(keys, centres, rotation)
    levels = (unpack(codes).float() - 1.5) * scales.float().unsqueeze(-1)

    def products(queries: Tensor) -> Tensor:
        return _dot(queries, centres) + _dot(queries @ rotation, levels)

    return products


def rabitq(keys: Tensor) -> Products:
    """RaBitQ (Gao and Long 2024): signs after a random rotation into twice the dimensions, unbiased by the
    product of each key with its own code; norm and that product are the scale."""
    centres, rest = _centred(keys)
    rotation = _rotation(2 * keys.shape[2])[: keys.shape[2]]
    rotated = rest @ rotation
    signs = rotated.sign()
    scales = rotated.square().sum(-1) / rotated.abs().sum(-1).clamp_min(1e-12)

    def products(queries: Tensor) -> Tensor:
        return _dot(queries, centres) + _dot(queries @ rotation, signs * scales.unsqueeze(-1))

    return products


def by_channel(tokens: int) -> Callable[[Tensor], Products]:
    """KIVI (Liu et al. 2024): 2 bits for each entry, between the least and the largest one of its channel
    among so many neighbours; both are float16."""

    def make(keys: Tensor) -> Products:
        groups = keys.unflatten(1, (-1, tokens))
        least, largest = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
        step = (largest - least).clamp_min(1e-12) / 3
        decoded = (((groups - least) / step).round() * step + least).flatten(1, 2)
        return lambda queries: _dot(queries, decoded)

    return make


def narrow(queries: Tensor) -> Callable[[Tensor], Products]:
    """ThinK (Xu et al. 2024): the half of the channels with the largest products of the norms of queries and
    keys, here in 4 bits, a scale for each key.

    Args:
        queries: [H, N, D], by which channels are chosen.
    """

    def make(keys: Tensor) -> Products:
        centres, rest = _centred(keys)
        kept = (queries.norm(dim=1) * rest.norm(dim=1)).topk(keys.shape[2] // 2).indices.unsqueeze(1)
        part = rest.gather(2, kept.expand(-1, rest.shape[1], -1))
        step = part.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 7.5
        decoded = ((part / step - 0.5).round().clamp(-8, 7) + 0.5) * step

        def products(queries: Tensor) -> Tensor:
            chosen = queries.gather(2, kept.expand(-1, queries.shape[1], -1))
            return _dot(queries, centres) + _dot(chosen, decoded)

        return products

    return make


def page(keys: Tensor) -> Products:
    """Quest (Tang et al. 2024): least and largest entries of a page bound the products of all its keys."""
    pages = keys.unflatten(1, (-1, PAGE))
    least, largest = pages.amin(2), pages.amax(2)

    def products(queries: Tensor) -> Tensor:
        bound = _dot(queries.clamp_min(0), largest) + _dot(queries.clamp_max(0), least)
        return bound.unsqueeze(-1).expand(-1, -1, -1, PAGE).flatten(2)

    return products


def sign_hash(directions: Tensor) -> Callable[[Tensor], Products]:
    """Signs of projections on ``directions`` [H or 1, D, 2D] (SimHash, Charikar 2002): their agreement gives
    the angle, and the key's norm is the scale."""

    def make(keys: Tensor) -> Products:
        centres, rest = _centred(keys)
        code, norms = (rest @ directions).sign(), rest.norm(dim=-1)

        def products(queries: Tensor) -> Tensor:
            agreement = _dot((queries @ directions).sign(), code) / code.shape[2]
            cosine = torch.sin(agreement * math.pi / 2)
            sizes: Tensor = norms.unsqueeze(1) * queries.norm(dim=-1, keepdim=True)
            return _dot(queries, centres) + cosine * sizes

        return products

    return make


def learned_directions(queries: Tensor, keys: Tensor) -> Tensor:
    """Directions [H, D, 2D] for ``sign_hash``, trained to give the softmax of the true products, as HATA
    (Gong et al. 2025) trains its hash: signs forward, and backward those of a soft sign.

    Args:
        queries: [H, N, D]; keys: [H, T, D].
    """
    dim = keys.shape[2]
    centres, rest = _centred(keys)
    target, base = (_dot(queries, keys) * dim**-0.5).softmax(-1), _dot(queries, centres)
    sizes = rest.norm(dim=-1).unsqueeze(1) * queries.norm(dim=-1, keepdim=True)
    directions = _gaussian(dim, 2 * dim).repeat(len(keys), 1, 1).requires_grad_()
    optimizer = torch.optim.Adam([directions], lr=RATE)

    def hard(x: Tensor) -> Tensor:
        soft = (x / x.detach().std()).tanh()
        return soft + (soft.sign() - soft).detach()

    for _ in range(STEPS):
        agreement = _dot(hard(queries @ directions), hard(rest @ directions)) / (2 * dim)
        estimate = base + torch.sin(agreement * math.pi / 2) * sizes
        loss = -(target * (estimate * dim**-0.5).log_softmax(-1)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return directions.detach()


def _dot(queries: Tensor, keys: Tensor) -> Tensor:
    """[H, N, D] times [H, T, D]: [H, N, T]."""
    return queries @ keys.transpose(1, 2)


def _gaussian(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def _rotation(dim: int) -> Tensor:
    rotation: Tensor = torch.linalg.qr(_gaussian(dim, dim)).Q
    return rotation.contiguous()


def _centred(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The centre of each key [H, T, D], and the keys without it."""
    means = keys.unflatten(1, (-1, BLOCK)).mean(2)
    centres = means.repeat_interleave(BLOCK, dim=1)
    return centres, keys - centres


def weights(products: Tensor, group: int, dim: int, against: Tensor | None = None) -> Tensor:
    """Softmax weights summed over a group: products [H, N * group, T] to [H, N, T]; sinks and the latest
    tokens, some of which come after some queries, are left out.

    Args:
        against: products whose log-sum-exp normalises them; their own if None.
    """
    config = CacheConfig()
    scores, reference = (
        (part * dim**-0.5)[..., config.sinks : -config.recent]
        for part in (products, products if against is None else against)
    )
    softmax: Tensor = (scores - reference.logsumexp(-1, keepdim=True)).exp()
    return torch.unflatten(softmax, 1, (-1, group)).sum(2)


def judge(index: Index, queries: Tensor, keys: Tensor, group: int) -> Tensor:
    """[4]: of the true top K those among K and among 2 K that the index selects, of the weight of all rows
    that of the K, and the error of the others' weights."""
    dim = keys.shape[2]
    exactly, estimates = exact(keys)(queries), index.make(keys)(queries)
    true = weights(exactly, group, dim)
    order = weights(estimates, group, dim).topk(2 * K).indices
    top = torch.zeros_like(true).scatter_(2, true.topk(K).indices, 1.0)
    found = top.gather(2, order)
    mass = true.gather(2, order[..., :K]).sum(-1) / true.sum(-1)
    others = 1 - top
    off = (weights(estimates, group, dim, exactly) - true).abs().clamp_max(1e6)
    error = (off * others).sum(-1) / (true * others).sum(-1)
    return torch.stack([found[..., :K].sum(-1) / K, found.sum(-1) / K, mass, error]).mean((1, 2))


class Prompt(NamedTuple):
    """One layer of a prompt."""

    queries: Tensor  # [H, N * group, D], of the last N tokens
    keys: Tensor  # [H, T, D]
    group: int  # query heads that share a KV head


def prompts() -> Iterator[list[Prompt]]:
    """For each layer the prompts ``JUDGED``, and behind them ``TRAINING``."""
    resolved = resolve(ModelConfig(device="cpu", dtype="float32"))
    decoder = load_decoder(resolved)
    shape = decoder.shape
    tokenizer = Tokenizer(resolved.folder, decoder.vocab)

    def encoded(text: str) -> list[int]:
        return tokenizer.encode(Text(text), limit=10**9, continues=True)

    texts = documents(encoded)
    items = [make_item("text", texts[number], LENGTH, number, encoded) for number in (*JUDGED, TRAINING)]
    reference = Reference(decoder, items, tokens=2)
    for layer in range(shape.layers):
        keys = gather_tokens(reference.arena[:, layer, :, :, 0], reference.table)[:, :, :LENGTH]
        queries = reference.queries[:, layer].unflatten(2, (shape.kv_heads, -1))
        grouped = queries.permute(0, 2, 1, 3, 4).flatten(2, 3)
        yield [Prompt(*item, shape.group) for item in zip(grouped, keys, strict=True)]


def main() -> None:
    totals: dict[str, Tensor] = {}
    bits: dict[str, int] = {}
    layers = 0
    for *judged, training in prompts():
        layers += 1
        dim = training.keys.shape[2]
        learned = learned_directions(training.queries, training.keys)
        for prompt in judged:
            for index in (
                Index("exact", 32 * dim, exact),
                Index("rotated 2-bit", 2 * dim + 16, two_bit),
                Index("RaBitQ", 2 * dim + 16, rabitq),
                Index("by channel, of 32 tokens", 3 * dim, by_channel(32)),
                Index("by channel, of 512 tokens", 2 * dim + dim // 16, by_channel(BLOCK)),
                Index("half of the channels", 2 * dim + 16, narrow(prompt.queries)),
                Index("page min/max", 2 * dim, page),
                Index("random sign hash", 2 * dim + 16, sign_hash(_gaussian(dim, 2 * dim))),
                Index("learned hash", 2 * dim + 16, sign_hash(learned)),
            ):
                bits[index.name] = index.bits
                total = totals.get(index.name, torch.zeros(4))
                totals[index.name] = total + judge(index, *prompt) / len(JUDGED)
    results = []
    for name, total in totals.items():
        found, wide, mass, error = total / layers
        results += [
            Result(name, "bits a key", bits[name], "bits"),
            Result(name, f"recall in {K}", float(found), f"of the top {K}"),
            Result(name, f"recall in {2 * K}", float(wide), f"of the top {K}"),
            Result(name, f"weight of {K}", float(mass), "of all rows'"),
            Result(name, "error of the others", float(error), "of their weight"),
        ]
    write("indexes", results)


if __name__ == "__main__":
    main()
