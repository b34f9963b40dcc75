"""Groups of ranks without a server: each rank is a process that was forked from one with torch in memory."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from clo.gpu_worker.group import Group
from clo.runtime.model.ranks import Rank

_WAIT_S = 240  # only a failure takes as long
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["clo.gpu_worker.in_process", "transformers"])


def in_group(
    folder: Path, ranks: int, work: Callable[..., Any], *arguments: Any, device: str = "cpu"
) -> list[Any]:
    """What ``work(group, *arguments)``, a function of a module, returns at each rank.

    Args:
        folder: where the ranks meet; empty.
        device: "cpu", or "cuda" for a GPU each.
    """
    meeting = folder / "ranks"
    meeting.touch()
    pipes = [_context.Pipe(duplex=False) for _ in range(ranks)]
    processes = [
        _context.Process(
            target=_serve,
            args=(Rank(number, ranks), device, str(meeting), sender, work, arguments),
            daemon=True,
        )
        for number, (_, sender) in enumerate(pipes)
    ]
    try:
        for process in processes:
            process.start()
        results = []
        for receiver, sender in pipes:
            sender.close()
            assert receiver.poll(_WAIT_S), "a rank does not answer"
            results.append(receiver.recv())
        return results
    finally:
        for process in processes:
            process.kill()
            process.join()
        meeting.unlink()


def _serve(
    rank: Rank,
    device: str,
    meeting: str,
    answer: Connection,
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    own = torch.device(device, rank.number) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(own)
    group = Group(rank, own, os.open(meeting, os.O_RDWR))
    answer.send(work(group, *arguments))
    sys.stdout.flush()
    os._exit(0)  # no graph is destroyed after its group
