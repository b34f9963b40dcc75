"""What each layer selects and keeps, and a gate for each KV head, by what they cost the model's output.

    python -m benchmarks.calibrate profile.json --rows 3.5
    python launch.py --profile profile.json

A head keeps its rows while its query stays close to the one of its last selection, its label (arXiv
2511.14510). What that costs differs between heads, and so does what few rows cost. Here every threshold of
``GRID``, and every other pair of sizes of ``SIZES``, runs beside full attention on text that
``benchmarks.gates`` does not judge by: all of them see the queries and rows of full attention, so that the
errors of one head do not disturb another, and each head gets for each of them

- the rows that it moves per step;
- its error in nats: half the mean square of g . e, where e is the error of the head's attention output and g
  the gradient with respect to it of the log-probability of a token drawn from the model. To second order that
  is the KL divergence which the error causes in the same step (g g^T has the Fisher information as its mean).
  What an error does to later steps, and what errors of several heads do together, is left out.

Then a price of a moved row and one of a resident row are sought for all layers, and each layer takes the
sizes, and at its own sizes each head the threshold, at which error + prices x rows is least. The first price
meets the target, the second one keeps the resident rows of all layers together at those of equal sizes.

A selection is made with the real query, as with ``--prefetch off`` and ``verified``. Heads of a layer share
their sizes: one launch does them all.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor

from benchmarks.tasks import documents, make_item
from clo.gpu_worker.cache.batch import Batch
from clo.gpu_worker.cache.kv_cache import KVCache
from clo.gpu_worker.cache.prompt import LastTokens, one_prompt
from clo.gpu_worker.model.decoder import Decoder, load_decoder
from clo.kernels.attend_prompt import attend_prompt
from clo.runtime.config import CacheConfig, ModelConfig, Sizes
from clo.runtime.model.files import resolve
from clo.runtime.profile import Profile, ProfiledLayer, ProfiledModel
from clo.runtime.tokenizer import Tokenizer
from clo.runtime.wire.messages import Text

ALWAYS = 2.0  # selects in every step: above any cosine
GRID = (ALWAYS, 0.95, 0.9, 0.8, 0.7, 0.5)  # falling; a few hundred steps show no rarer selections
SIZES = ((0.25, 1), (0.5, 1), (2, 1), (0.5, 0.5), (1, 0.5), (0.25, 2), (0.5, 2))
"""Factors of the rows that are selected and kept, beside (1, 1), to which the thresholds belong."""
DOCUMENTS = (3, 4)  # of benchmarks.tasks; the others are for judging
DRAWS = 2  # tokens drawn at a step, each of which gives a gradient


class Costs(NamedTuple):
    """What each threshold of ``GRID``, then each pair of ``SIZES``, costs each head, per step: float64
    [options, layers, kv_heads]."""

    error: Tensor  # nats
    rows: Tensor  # moved
    selections: Tensor

    def __add__(self, other: "Costs") -> "Costs":  # type: ignore[override]
        return Costs(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def of(self, choice: Tensor) -> "Costs":
        """With the options of number ``choice`` [layers, kv_heads]: each [layers, kv_heads]."""
        return Costs(*(cost.gather(0, choice.unsqueeze(0)).squeeze(0) for cost in self))

    def summary(self) -> str:
        return (
            f"{float(self.error.sum()):.5f} nats, {float(self.rows.mean()):.2f} rows and "
            f"{float(self.selections.mean()):.0%} of a selection per step and head"
        )


class Bench:
    """One text, full attention and a cache for each option over one arena.

    Args:
        decoder: the model.
        sizes: the pair (1, 1).
        prompt, continuation: token ids; each token of the continuation is fed, the last one too.
    """

    def __init__(self, decoder: Decoder, sizes: Sizes, prompt: list[int], continuation: list[int]) -> None:
        decoder.differentiate()
        self._decoder, self._prompt, self._continuation = decoder, prompt, continuation
        self._shape, self._device = decoder.shape, decoder.device
        shape = self._shape
        total = len(prompt) + len(continuation)
        blocks = -(-total // shape.block_tokens)
        arena = torch.zeros(
            blocks, shape.layers, shape.kv_heads, shape.block_tokens, 2, shape.head_dim,
            dtype=shape.dtype, device=self._device,
        )  # fmt: skip
        self._table = torch.arange(blocks, device=self._device)  # of the blocks and of the index's pages

        def cache(config: CacheConfig) -> KVCache:
            return KVCache(shape, arena, config, 1, total, decoder.scale, self._device)

        self._full = cache(CacheConfig(attention="full"))
        for_all = [sizes] * len(GRID) + [scaled(sizes, factors) for factors in SIZES]
        self._caches = [cache(CacheConfig(select_k=k, resident=resident)) for k, resident in for_all]
        for gated, threshold in zip(self._caches, GRID, strict=False):
            gated.thresholds.fill_(threshold)

    def run(self) -> Costs:
        """Prefill and feed the continuation."""
        self._prefill()
        heads = (len(self._caches), self._shape.layers, self._shape.kv_heads)
        error = torch.zeros(heads, dtype=torch.float64, device=self._device)
        for length, token in enumerate(self._continuation, len(self._prompt) + 1):
            error += self._step(token, length)
        counters = torch.stack(
            [
                torch.stack([layer.state.counters[0] for layer in cache.sparse_layers])
                for cache in self._caches
            ]
        ).double()
        steps = len(self._continuation)
        return Costs(error.cpu() / steps, counters[..., 3].cpu() / steps, counters[..., 1].cpu() / steps)

    @torch.inference_mode()
    def _prefill(self) -> None:
        decoder = self._decoder
        hidden = decoder.embed(torch.tensor(self._prompt, device=self._device))
        rope = decoder.rope(torch.arange(len(self._prompt), device=self._device))
        normed = decoder.input_norm(0, hidden)
        table = self._table
        prompts = one_prompt(0, len(self._prompt), table.tolist(), table, table, self._shape.block_tokens)
        for layer in range(self._shape.layers):
            query, rows = decoder.qkv(layer, normed, rope)
            rows = rows.contiguous()
            attended, lse = attend_prompt(query, rows, decoder.scale)
            for cache in (self._full, *self._caches):
                cache.take_rows(layer, rows, prompts)
                cache.start_sets(layer, rows, prompts, lse[-1:], LastTokens(query, lse))
                cache.join_prompts()
            hidden, normed = decoder.add_mlp(layer, *decoder.add_attention(layer, hidden, attended))

    def _step(self, token: int, length: int) -> Tensor:
        """Errors in nats [options, layers, kv_heads] at one token, the last of ``length``."""
        decoder, shape = self._decoder, self._shape
        table = self._table.unsqueeze(0)
        batch = Batch(torch.tensor([length], device=self._device), table, table)
        probes = torch.zeros(
            shape.layers, shape.query_heads, shape.head_dim, dtype=shape.dtype, device=self._device,
            requires_grad=True,
        )  # fmt: skip
        hidden = decoder.embed(torch.tensor([token], device=self._device))
        rope = decoder.rope(batch.lengths - 1)
        normed = decoder.input_norm(0, hidden)
        errors = []
        for layer in range(shape.layers):
            query, kv = decoder.qkv(layer, normed, rope)
            kv = kv.detach()
            exact = self._full.attend(layer, query, kv, batch, None, select=True)
            with torch.no_grad():
                found = [
                    cache.attend(layer, query.detach(), kv, batch, None, select=True)
                    for cache in self._caches
                ]
                errors.append(torch.cat(found).float() - exact.float())
            hidden, normed = decoder.add_attention(layer, hidden, exact + probes[layer])
            hidden, normed = decoder.add_mlp(layer, hidden, normed)
        for cache in self._caches:
            cache.end_step()
        logprobs = decoder.logits(normed)[0].log_softmax(-1)
        error = torch.stack(errors, 1)  # [options, layers, query_heads, head_dim]
        total = torch.zeros(len(self._caches), shape.layers, shape.kv_heads, device=self._device)
        for drawn in logprobs.detach().exp().multinomial(DRAWS, replacement=True):
            (gradient,) = torch.autograd.grad(logprobs[drawn], probes, retain_graph=True)
            products = (error * gradient.float()).unflatten(2, (shape.kv_heads, -1)).sum((3, 4))
            total += products.square() / (2 * DRAWS)
        return total.double()


def scaled(sizes: Sizes, factors: tuple[float, float]) -> Sizes:
    """Sizes by their factors."""
    return Sizes(round(factors[0] * sizes.select_k), round(factors[1] * sizes.resident))


def smoothed(costs: Costs) -> Costs:
    """No threshold looks better than a higher one by chance: errors rise and rows fall along the grid."""
    gates, error, rows = len(GRID), costs.error.clone(), costs.rows.clone()
    error[:gates], rows[:gates] = error[:gates].cummax(0).values, rows[:gates].cummin(0).values
    return Costs(error, rows, costs.selections)


def solve(costs: Costs, rows: float | None, kl: float | None) -> Tensor:
    """The options' numbers [layers, kv_heads] that reach a target at the least cost of the other kind.

    Args:
        rows: most rows moved per step and head, on average over heads; or
        kl: largest sum of the errors, in nats.
    """
    kept = torch.tensor([resident for _, resident in SIZES], dtype=torch.float64)

    def at_prices(row: float, resident: float) -> Tensor:
        price = costs.error + row * costs.rows
        gates, thresholds = price[: len(GRID)].min(0)  # [layers, kv_heads]
        heads = costs.error.shape[2]
        others = price[len(GRID) :].sum(2) + heads * resident * (kept - 1).unsqueeze(1)  # [sizes, layers]
        least, size = others.min(0)
        own = (gates.sum(1) <= least).unsqueeze(1)
        return torch.where(own, thresholds, len(GRID) + size.unsqueeze(1))

    def choose(row: float) -> Tensor:
        if kept_by(at_prices(row, 0.0)) <= 1:
            return at_prices(row, 0.0)
        return at_prices(row, 10 ** bisect(lambda log: kept_by(at_prices(row, 10**log)) > 1)[1])

    def kept_by(choice: Tensor) -> float:
        return float(torch.cat((torch.ones(len(GRID), dtype=torch.float64), kept))[choice].mean())

    def cheap(log: float) -> bool:
        """Whether rows may cost more."""
        reached = costs.of(choose(10**log))
        if rows is not None:
            return float(reached.rows.mean()) > rows
        return float(reached.error.sum()) <= (kl or 0.0)

    low, high = bisect(cheap)
    return choose(10 ** (high if rows is not None else low))


def bisect(below: Callable[[float], bool]) -> tuple[float, float]:
    """Where ``below`` ends: the last value known to be below, and the first one known not to be."""
    low, high = -30.0, 10.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) else (low, middle)
    return low, high


def layer_of(heads: list[int], sizes: Sizes) -> ProfiledLayer:
    """A layer by the options' numbers of its heads."""
    if heads[0] < len(GRID):
        return ProfiledLayer(*sizes, tuple(GRID[number] for number in heads))
    return ProfiledLayer(*scaled(sizes, SIZES[heads[0] - len(GRID)]), (ALWAYS,) * len(heads))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibrate", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT.json", help="profile to write")
    parser.add_argument("--model", default=ModelConfig().model)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--select-k", type=int, help="as launch.py chooses it for such a text")
    parser.add_argument("--resident", type=int, help="likewise")
    parser.add_argument("--prompt", type=int, default=3500, help="tokens of a text before the first step")
    parser.add_argument("--steps", type=int, default=256, help="of a text, at most 256")
    parser.add_argument("--costs", type=Path, help="keep what was measured here, and use it if it is there")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--rows", type=float, help="most rows moved per step and head")
    target.add_argument("--kl", type=float, help="largest error, in nats")
    arguments = parser.parse_args()
    config = CacheConfig(select_k=arguments.select_k, resident=arguments.resident)
    (sizes,) = config.sizes(arguments.prompt + arguments.steps, 1)
    resolved = resolve(ModelConfig(model=arguments.model, device=arguments.device))
    decoder = load_decoder(resolved)

    if arguments.costs is not None and arguments.costs.exists():
        costs = Costs(*torch.load(arguments.costs))
    else:
        tokenizer = Tokenizer(resolved.folder, decoder.vocab)
        torch.manual_seed(0)

        def encode(text: str) -> list[int]:
            return tokenizer.encode(Text(text), limit=10**7, continues=True)

        every = documents(encode)
        parts = []
        for number in DOCUMENTS:
            item = make_item("text", every[number], arguments.prompt, number, encode)
            parts.append(Bench(decoder, sizes, item.prompt, item.answer[: arguments.steps]).run())
            print(f"measured document {number}", file=sys.stderr)
        costs = Costs(*(torch.stack(pieces).mean(0) for pieces in zip(*parts, strict=True)))
        if arguments.costs is not None:
            torch.save(tuple(costs), arguments.costs)

    names = [f"gate {threshold:4.2f}" for threshold in GRID] + [f"sizes x {factors}" for factors in SIZES]
    for number, name in enumerate(names):
        uniform = torch.full(costs.error.shape[1:], number)
        print(f"uniform {name:16}: {costs.of(uniform).summary()}")
    choice = solve(smoothed(costs), arguments.rows, arguments.kl)
    print(f"profile     : {costs.of(choice).summary()}")
    shape = decoder.shape
    model = ProfiledModel(shape.layers, shape.kv_heads, shape.head_dim)
    profile = Profile(model, tuple(layer_of(heads, sizes) for heads in choice.tolist()))
    arguments.out.write_bytes(msgspec.json.encode(profile))


if __name__ == "__main__":
    main()
