"""``clo top``: what a server is doing, live."""

import argparse
import time

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from clo.commands.server import Parser, add_server, client
from clo.runtime.units import format_size
from clo.runtime.wire.errors import ConfigError
from clo.runtime.wire.messages import Info, StoreStats, WorkerStats

_BAR = 24  # characters


def parser() -> argparse.ArgumentParser:
    root = Parser(prog="clo top", description="Show what a server is doing, until Ctrl-C.")
    root.add_argument("--every", type=float, default=1.0, metavar="SECONDS", help="between two looks (1.0)")
    root.add_argument("--once", action="store_true", help="look once and leave (stay)")
    add_server(root)
    return root


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    options = parser().parse_args(argv)
    if not options.every > 0:
        raise ConfigError(f"--every is {options.every:g}; it must be above 0.")
    console = Console()
    with client(options) as connected:
        seen, before = time.monotonic(), connected.info()
        if options.once:
            console.print(page(before, before, 0.0))
            return 0
        try:
            with Live(page(before, before, 0.0), console=console, screen=console.is_terminal) as live:
                while True:
                    time.sleep(options.every)
                    now, info = time.monotonic(), connected.info()
                    live.update(page(info, before, now - seen))
                    seen, before = now, info
        except KeyboardInterrupt:
            return 0


def page(info: Info, before: Info, seconds: float) -> Group:
    """What is shown of a server, with rates since ``before``, so many seconds ago."""
    title = Text.assemble(
        (info.model, "bold"),
        f"  {info.attention}, up to {info.max_model_len} tokens a request, {info.capacity_tokens} in all",
        f"; {info.waiting} requests wait for a worker" if info.waiting else "",
    )
    return Group(title, _workers(info.workers, before.workers, seconds), _stores(info.stores))


def _workers(workers: list[WorkerStats], before: list[WorkerStats], seconds: float) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in (
        "worker",
        "running",
        "waiting",
        "tokens/s",
        "steps/s",
        "resident",
        "index",
        "GPU",
        "drift KL",
    ):
        table.add_column(name, justify="right", header_style="dim")
    former = {stats.worker: stats for stats in before}
    for stats in workers:
        last = former.get(stats.worker, stats)
        drift = stats.drift_check
        table.add_row(
            str(stats.worker),
            str(stats.running),
            str(stats.waiting),
            _rate(stats.generated_tokens - last.generated_tokens, seconds),
            _rate(stats.steps - last.steps, seconds),
            format_size(stats.resident_bytes),
            format_size(stats.index_bytes),
            format_size(stats.gpu_bytes) if stats.gpu_bytes else "-",
            "-" if drift is None or not drift.checks else f"{drift.mean_kl:.4f}",
        )
    return table


def _stores(stores: list[StoreStats]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("store", "used", "of", "", "sequences", "waiting"):
        table.add_column(name, justify="left" if name == "" else "right", header_style="dim")
    for stats in stores:
        used = stats.blocks - stats.free_blocks
        share = used / stats.blocks if stats.blocks else 0.0
        filled = round(share * _BAR)
        table.add_row(
            stats.store,
            format_size(used * stats.block_bytes),
            format_size(stats.arena_bytes),
            f"{'█' * filled}{'░' * (_BAR - filled)} {share:.0%}",
            str(stats.sequences),
            str(stats.waiting),
        )
    return table


def _rate(count: int, seconds: float) -> str:
    return f"{max(0, count) / seconds:.0f}" if seconds > 0 else "-"
