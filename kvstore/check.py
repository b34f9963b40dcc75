"""``python -m clo.kvstore.check``: are the books of a running server's KV stores right, and their rows?

The stores look into their books themselves, between two messages. With ``--recompute`` the rows of some
blocks of prompts are computed again on the CPU and compared with those in the arena. Only the server's own
user may ask, on its machine, as the answer has tokens of prompts.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import NoReturn

import msgspec

from clo.runtime.machine.control import ask
from clo.runtime.wire.errors import CLOError, ConfigError
from clo.runtime.wire.messages import Examine, Examined, StoreExamined
from clo.runtime.wire.sockets import encode

LONGEST = 16_384
"""Tokens of a prompt up to which blocks are recomputed: further ones may have been attended to sparsely."""

_ADDRESS = "tcp://127.0.0.1:5555"
_MOST = 1000  # blocks that are recomputed in one run


class Compared(msgspec.Struct, frozen=True):
    """A block whose rows were computed again. ``difference`` is the largest of a K or V of one token and KV
    head, as a share of its length, and ``where`` says which that is; ``allowed`` is what rounding may do."""

    store: str
    name: bytes
    block: int
    difference: float
    allowed: float
    where: str


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see '{self.prog} --help'.")


def parser() -> argparse.ArgumentParser:
    about = "Check the KV stores of a running server of this user and machine. Exits with 1 if one is wrong."
    root = _Parser(prog="python -m clo.kvstore.check", description=about)
    root.add_argument(
        "--server",
        default=os.environ.get("CLO_SERVER") or _ADDRESS,
        metavar="ADDRESS",
        help=f"where it listens, as its ready line says; CLO_SERVER does the same ({_ADDRESS})",
    )
    root.add_argument(
        "--recompute",
        type=int,
        default=0,
        metavar="N",
        help="compute the rows of so many blocks of each store again, on the CPU, which loads the model (0)",
    )
    return root


def main(argv: list[str]) -> int:
    """Returns the exit code: 0 where all is right, 1 where something is not or cannot be checked, 2 for a
    wrong option."""
    try:
        options = parser().parse_args(argv)
        if not 0 <= options.recompute <= _MOST:
            raise ConfigError(f"--recompute is {options.recompute}; it must be from 0 to {_MOST}.")
        return 0 if _check(options.server, options.recompute) else 1
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except CLOError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _check(server: str, sample: int) -> bool:
    """Whether all is right, after it was printed."""
    examined = _examine(server, Examine(sample, LONGEST))
    right = not any(store.wrong for store in examined.stores)
    for store in examined.stores:
        for line in _books(store):
            print(line, flush=True)
    if sample and not any(store.described for store in examined.stores):
        print(f"nothing to recompute: no block of the first {LONGEST} tokens of a prompt is there")
    elif sample:
        found = _recompute(examined)
        left_out = sum(len(store.described) for store in examined.stores) - len(found)
        compared = _still_there(server, found)
        wrong = [block for block in compared if not block.difference <= block.allowed]
        for block in wrong:
            print(
                f"WRONG: block {block.block} of KV store {block.store} has other rows than its tokens give: "
                f"{block.where} differs by {block.difference:.2g} of its length, where rounding may make "
                f"{block.allowed:g}."
            )
        most = max((block.difference for block in compared if block not in wrong), default=0.0)
        print(
            f"recomputed {len(compared)} blocks, {len(wrong)} of them wrong; the others differ by {most:.2g}"
        )
        if left_out:
            print(
                f"left out {left_out} blocks: with --prefix-attention sparse their rows may have been "
                "computed behind codes, so that others are right, too"
            )
        right = right and not wrong
    return right


def _books(store: StoreExamined) -> Iterator[str]:
    held = store.blocks - store.free_blocks - store.kept_blocks
    yield (
        f"KV store {store.store}: {store.blocks} blocks of {store.block_tokens} tokens: {store.free_blocks} "
        f"free, {store.kept_blocks} kept, {held} held by {store.sequences} sequences; "
        f"{store.committed_blocks} are of prompts; {store.waiting} sequences wait; "
        f"{len(store.wrong) or 'nothing'} wrong"
    )
    for sentence in store.wrong:
        yield f"WRONG: KV store {store.store}: {sentence}"


def _examine(server: str, message: Examine) -> Examined:
    return ask(server, message, Examined, lambda news: None)


def _recompute(examined: Examined) -> list[Compared]:
    """Have another process do it, which knows models.

    Raises:
        CLOError: it fails; it has said why.
    """
    done = subprocess.run(
        [sys.executable, "-m", "clo.gpu_worker.recompute"], input=encode(examined), stdout=subprocess.PIPE
    )
    if done.returncode:
        raise CLOError("The rows could not be computed again, see above.")
    return msgspec.msgpack.decode(done.stdout, type=list[Compared])


def _still_there(server: str, compared: list[Compared]) -> list[Compared]:
    """Those that have been in the same blocks all the time: where one was taken for other tokens meanwhile,
    its rows were compared with the wrong ones."""
    names = list({block.name for block in compared})
    now = _examine(server, Examine(names=names))
    there = {(store.store, found.name, found.block) for store in now.stores for found in store.described}
    return [block for block in compared if (block.store, block.name, block.block) in there]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
