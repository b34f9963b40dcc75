"""Which tokens of a prompt each KV head keeps at the end of an answer: found in this process, and drawn."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from clo.gpu_worker.in_process import blocks_of, make_engine
from clo.gpu_worker.model.decoder import load_decoder
from clo.runtime.config import CacheConfig, ResolvedModel
from clo.runtime.tokenizer import Tokenizer
from clo.runtime.wire.messages import Sampling, Text

_BLOCKS = " ▁▂▃▄▅▆▇█"
_WIDTH = 90  # characters of a line
_LAYERS = 8  # of the model, on the terminal
_BINS = 400  # columns of the whole prompt in the picture
_AROUND = 16  # tokens shown on both sides of the passage


def tokens_between(tokenizer: Tokenizer, text: str, start: int, stop: int) -> range:
    """Positions of the tokens that hold the characters from ``start`` to ``stop`` of a text."""
    first, end = (len(tokenizer.encode(Text(text[:at]), limit=at)) for at in (start + 1, stop))
    return range(first - 1, end)


def resident_after(
    model: ResolvedModel, prompt: list[int], answer: list[int], on_progress: Callable[[int, int], None]
) -> Tensor:
    """Feed an answer to an engine with CLO's defaults and look at what is resident at its end.

    Args:
        model: where the weights lie, and the device.
        prompt, answer: token ids.
        on_progress: called with the tokens of the prompt that are done, and all of them.

    Returns:
        [layers, kv_heads, T] bool, T counting prompt and answer without its last token, which is not fed.
    """
    total = len(prompt) + len(answer)
    engine = make_engine(load_decoder(model), CacheConfig(), slots=1, max_tokens=total)
    work = engine.prefill(0, prompt, blocks_of(engine, 0, total))
    while work.advance() is None:
        on_progress(work.done, work.total)
    engine.activate(0, len(prompt), Sampling(temperature=0.0), seed=0)
    for length, token in enumerate(answer[:-1], len(prompt) + 1):
        engine.feed(0, token)
        engine.forward(1, length)
    shape = engine.decoder.shape
    resident = torch.zeros(shape.layers, shape.kv_heads, total - 1, dtype=torch.bool)
    for layer, cache in enumerate(engine.cache.sparse_layers):
        for head, tokens in enumerate(cache.resident.tokens(0, total - 1).cpu()):
            resident[layer, head, tokens[tokens >= 0]] = True
    return resident


def overview(resident: Tensor, passage: range) -> str:
    """The whole text as lines of a terminal, for a few layers: the higher a block, the more is kept there.

    Args:
        resident: [layers, kv_heads, T] bool.
        passage: positions of tokens, marked above the lines.
    """
    tokens = resident.shape[2]
    marked = {position * _WIDTH // tokens for position in passage}
    marks = "".join("▼" if place in marked else " " for place in range(_WIDTH))
    shares = _binned(resident.float().mean(1), _WIDTH)
    return _lines(marks, [_blocks(shares[layer]) for layer in _shown(resident)], resident)


def close_up(resident: Tensor, passage: range, words: list[str]) -> str:
    """One line of the text around a passage, above blocks that say for each token how many heads keep it.

    Args:
        resident: [layers, kv_heads, T] bool.
        passage: positions of tokens, marked below the text.
        words: text of each of the T tokens.
    """
    first, end = passage.start, passage.stop
    while len("".join(words[first - 1 : end + 1])) <= _WIDTH:
        first, end = first - 1, end + 1
    lengths = [len(word) for word in words[first:end]]
    marks = ["▼" if position in passage else " " for position in range(first, end)]
    layers = [_blocks(resident[layer, :, first:end].float().mean(0)) for layer in _shown(resident)]

    def spread(symbols: Iterable[str]) -> str:
        return "".join(symbol * length for symbol, length in zip(symbols, lengths, strict=True))

    text = "".join(letter if letter.isprintable() else " " for letter in "".join(words[first:end]))
    return f"{'':9}{text}\n{_lines(spread(marks), [spread(blocks) for blocks in layers], resident)}"


def _shown(resident: Tensor) -> list[int]:
    """A few layers, from the first to the last."""
    shown: list[int] = torch.linspace(0, len(resident) - 1, _LAYERS).round().int().tolist()
    return shown


def _lines(marks: str, layers: list[str], resident: Tensor) -> str:
    named = [f"layer {number:2} {blocks}" for number, blocks in zip(_shown(resident), layers, strict=True)]
    return "\n".join([f"{'':9}{marks}".rstrip(), *named])


def _blocks(shares: Tensor) -> str:
    """One block for each of [N] shares from 0 to 1."""
    return "".join(_BLOCKS[height] for height in (shares * (len(_BLOCKS) - 1)).round().int().tolist())


def draw(resident: Tensor, passage: range, words: list[str], title: str, path: Path) -> None:
    """Write a picture: how many heads keep each token, what each head keeps, and the passage close up.

    Args:
        resident: [layers, kv_heads, T] bool.
        passage: positions of the tokens that hold the answer.
        words: text of each of the T tokens.
        path: of the PNG file.
    """
    layers, kv_heads, tokens = resident.shape
    heads = resident.flatten(0, 1).float()
    figure = Figure(figsize=(13, 13), layout="constrained")
    figure.suptitle(title)
    above, whole, close = figure.subplots(3, 1, height_ratios=(1, 2.5, 3))

    binned = _binned(heads, _BINS)
    extent = (0, tokens, layers, 0)  # in the units of both axes: tokens and layers
    above.fill_between(torch.linspace(0, tokens, _BINS), 100 * binned.mean(0), alpha=0.6, linewidth=0)
    above.set(xlim=(0, tokens), ylim=(0, 100), ylabel="% of the heads", title="heads that keep a token")
    whole.imshow(binned, aspect="auto", cmap="magma", vmin=0, vmax=1, extent=extent)
    whole.set(ylabel="layer", xlabel="token", title=f"what each of {kv_heads} KV heads in each layer keeps")
    for axis in (above, whole):
        axis.axvspan(passage.start, passage.stop, color="red", alpha=0.5, linewidth=1)
    above.annotate(
        "the answer stands here", (passage.start, 100), (passage.start, 88), color="red", ha="right"
    )

    first, end = max(0, passage.start - _AROUND), min(tokens, passage.stop + _AROUND)
    close.imshow(heads[:, first:end], aspect="auto", cmap="magma", extent=(first, end, layers, 0))
    close.set(ylabel="layer", title="the passage close up: bright where a head keeps the token")
    close.set_xticks([position + 0.5 for position in range(first, end)], words[first:end], rotation=90)
    for position, label in zip(range(first, end), close.get_xticklabels(), strict=True):
        label.set_color("red" if position in passage else "black")
    for edge in (passage.start, passage.stop):
        close.axvline(edge, color="red")
    figure.savefig(path, dpi=100)


def _binned(values: Tensor, bins: int) -> Tensor:
    """Means of [N, T] over equal parts of T: [N, bins]."""
    return torch.nn.functional.adaptive_avg_pool1d(values, bins)
