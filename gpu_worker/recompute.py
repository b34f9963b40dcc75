"""``python -m clo.gpu_worker.recompute``: computes the rows of blocks again, for ``clo.kvstore.check``.

An ``Examined`` comes through stdin; a list of ``Compared`` goes to stdout, both as MessagePack: JSON has no
infinity, which a difference may be.
"""

import os
import sys
from dataclasses import replace

import msgspec
import torch
from torch import Tensor

from clo.gpu_worker.cache.layer import EXACT_ROWS
from clo.gpu_worker.engine import Engine
from clo.gpu_worker.in_process import blocks_of, make_arena
from clo.gpu_worker.model.decoder import load_decoder
from clo.kvstore.arena import Arena
from clo.kvstore.check import Compared
from clo.kvstore.layout import arena_tensor, by_block
from clo.runtime.config import CacheConfig, ResolvedModel
from clo.runtime.machine.process import run_process
from clo.runtime.model.kv_shape import KVShape, kv_shape
from clo.runtime.wire.messages import Examined, PromptBlock, StoreExamined
from clo.runtime.wire.sockets import Decoder

_ALLOWED = {2: 0.5, 4: 0.01}
"""By bytes of a value: what another device and other chunks may change in a row, as a share of its length.
On one and the same CPU the worst of four blocks of SmolLM2-135M in bfloat16 differed by 0.11, through other
chunks. A row of zeros differs by 1, and a V of another token by more."""
_NICENESS = 10  # the server goes on beside it


def main() -> None:
    os.nice(_NICENESS)
    decode: Decoder[Examined] = Decoder(Examined)
    compared = compare(decode(sys.stdin.buffer.read()))
    sys.stdout.buffer.write(msgspec.msgpack.encode(compared))


def compare(examined: Examined) -> list[Compared]:
    """Compute the described blocks of all stores again, on the CPU, but those that attended to earlier ones
    from codes.

    Raises:
        ConfigError: the arena may not be opened, or the model cannot be loaded.
        WorkerDied: a store is gone.
    """
    model = replace(msgspec.json.decode(examined.model, type=ResolvedModel), device="cpu")
    shape = kv_shape(model.architecture, model.dtype)
    # Before the model is loaded, as blocks are taken for other tokens in time.
    found = [(store.store, block, rows) for store in examined.stores for block, rows in _rows(store, shape)]
    decoder = load_decoder(model)
    longest = max((len(block.tokens) for _, block, _ in found), default=1)
    arena = make_arena(decoder, 1, longest)
    engine = Engine(decoder, arena, CacheConfig(attention="full"), 1, longest)
    compared = []
    for store, block, rows in found:
        blocks = blocks_of(engine, 0, len(block.tokens))
        work = engine.prefill(0, block.tokens, blocks)
        while work.advance() is None:
            pass
        engine.cache.join_prompts()
        difference, where = _largest_difference(rows, arena[blocks[-1]], len(block.tokens))
        engine.retire(0)
        allowed = _ALLOWED[shape.dtype.itemsize]
        compared.append(Compared(store, block.name, block.block, difference, allowed, where))
    return compared


def _rows(store: StoreExamined, shape: KVShape) -> list[tuple[PromptBlock, Tensor]]:
    """Copies of the described blocks, each [layers, kv_heads, block_tokens, 2, head_dim]. Where blocks have
    codes, a prompt reads no more than ``EXACT_ROWS`` tokens before its own exactly: those that were behind
    more are left out."""
    arena = Arena.open(store.pid, store.fd, store.arena_bytes)
    shape = replace(shape, codes=store.block_bytes > shape.block_bytes)
    rows = by_block(arena_tensor(arena, shape, store.blocks))
    exact = [block for block in store.described if not shape.codes or block.behind <= EXACT_ROWS]
    return [(block, rows[block.block].clone()) for block in exact]


def _largest_difference(rows: Tensor, expected: Tensor, end: int) -> tuple[float, str]:
    """The largest difference between two K or V, as a share of the length of the right one, or of the mean
    length in its layer and head where that is larger: those of the first token may be tiny.

    Args:
        rows, expected: [layers, kv_heads, block_tokens, 2, head_dim].
        end: tokens of the prompt up to the end of the block.
    """
    length = expected.float().norm(dim=-1)  # [layers, kv_heads, block_tokens, 2]
    length = length.maximum(length.mean(2, keepdim=True)).clamp(min=1e-6)
    share = (rows.float() - expected.float()).norm(dim=-1) / length
    share = share.nan_to_num(torch.inf)  # what is no number is as wrong as can be
    place = int(share.argmax())
    layer, head, token, part = (int(index) for index in torch.unravel_index(torch.tensor(place), share.shape))
    where = f"{'KV'[part]} of token {end - rows.shape[2] + token} in layer {layer}, KV head {head},"
    return float(share.flatten()[place]), where


if __name__ == "__main__":
    run_process(main)
