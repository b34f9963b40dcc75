"""Pictures: error against bytes, error against length, and what each head does."""

from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.quality.forcing import Heads
from benchmarks.quality.report import Figures


def draw_settings(figures: list[Figures], path: Path) -> None:
    """KL of each setting on text: against KiB moved per token at the longest length, and against length."""
    text = [row for row in figures if row.kind == "text"]
    longest = max(row.length for row in text)
    names = list(dict.fromkeys(row.setting for row in text))[1:]  # but full attention by steps
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in names:
        rows = [row for row in text if row.setting == name]
        lengths, values = [row.length for row in rows], [row.kl.value for row in rows]
        low_high = [[row.kl.value - row.kl.low for row in rows], [row.kl.high - row.kl.value for row in rows]]
        right.errorbar(lengths, values, low_high, marker="o", capsize=3, label=name)
        last = next(row for row in rows if row.length == longest)
        bars = [[last.kl.value - last.kl.low], [last.kl.high - last.kl.value]]
        left.errorbar([last.kib], [last.kl.value], bars, marker="o", capsize=3)
    left.set_xscale("symlog", linthresh=10)  # a window moves nothing
    left.set(yscale="log", xlabel="KiB moved per token", title=f"text, {longest} tokens")
    right.set(yscale="log", xlabel="tokens", title="text")
    for axis in (left, right):
        axis.set_ylabel("KL(full || cache), nats")
        axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=100)


def draw_heads(heads: Heads, title: str, path: Path) -> None:
    """Heat maps of what each layer and KV head does."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    axes = figure.subplots(3, 1)
    names = ("hit rate", "|output - full attention's| / |full attention's|", "rows wanted too late")
    for axis, name, values in zip(axes, names, heads, strict=True):
        image = axis.imshow(values.T.numpy(), aspect="auto", cmap="viridis")
        axis.set(xlabel="layer", ylabel="KV head", yticks=range(values.shape[1]), title=f"{name} ({title})")
        figure.colorbar(image)
    figure.savefig(path, dpi=100)
