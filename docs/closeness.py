"""Draws docs/closeness.png from benchmarks/results: ``python docs/closeness.py``, with the extra "bench"."""

import json
from pathlib import Path

from matplotlib.figure import Figure

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER.parent / "benchmarks" / "results"
PANELS = {  # result: length, title
    "quality-smollm2-135m-instruct": (8192, "SmolLM2-135M-Instruct, 8,192 tokens"),
    "quality-smollm2-32k": (32768, "a 32K model of 135M parameters, 32,768 tokens"),
}
LABELS = {  # setting: text, colour, side of the point
    "exact top-k": ("exact top-k, nothing kept", "tab:orange", "left"),
    "paper's rule": ("the paper's cache", "tab:green", "right"),
    "closer, without a tail": ("CLO, 256 of 2,048, no tail", "tab:purple", "right"),
    "faster": ("CLO, 64 of 512", "tab:blue", "left"),
    "default": ("CLO, default", "tab:red", "left"),
    "closer": ("CLO, 256 of 2,048, tail 8,192", "tab:brown", "right"),
}
TICKS = (0.001, 0.003, 0.01, 0.03, 0.1)


def main() -> None:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axis, (name, (length, title)) in zip(figure.subplots(1, 2), PANELS.items(), strict=True):
        results = json.loads((RESULTS / f"{name}.json").read_text())["results"]
        values = {(result["case"], result["metric"]): result["value"] for result in results}
        for setting, (text, color, side) in LABELS.items():
            if setting == "faster" and length <= 8192:  # there it is the default
                continue
            case, metric = f"text/{length}/{setting}", "KL(full || cache)"
            kl, low, high = (values[case, metric + end] for end in ("", ", 95% low", ", 95% high"))
            point = values[case, "KiB moved"], kl
            axis.errorbar(*point, [[kl - low], [high - kl]], marker="o", capsize=3, color=color)
            shift, towards = (10, "left") if side == "right" else (-10, "right")
            axis.annotate(
                text, point, (shift, -3), textcoords="offset points", ha=towards, color=color, fontsize=9
            )
        axis.set(xscale="log", yscale="log", xlim=(40, 20_000), ylim=(0.0002, 0.15), title=title)
        axis.set(xlabel="KiB moved over PCIe for each token", ylabel="KL to full attention, nats")
        axis.set_xticks([100, 1000, 10_000], ["100", "1,000", "10,000"])
        axis.set_yticks(TICKS, [str(tick) for tick in TICKS])
        axis.grid(alpha=0.3)
    figure.savefig(FOLDER / "closeness.png", dpi=110)


if __name__ == "__main__":
    main()
