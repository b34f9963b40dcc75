"""How the ranks of a group stay together: the first one schedules, and tells the others what its engine does.

Every rank has an engine with the same slots, blocks and pages. The first one sends what it is about to do as
commands through a pair of sockets to each of the others, which do the same in the same order; nothing comes
back, as the ranks meet in their sums. Tokens are no part of a command: the first rank draws them, and they
get to the others on the device.

With each command goes a checksum of all commands so far and of the pages that slots have got. A rank whose
own is another one has strayed, and ends the group before it computes anything wrong.
"""

import socket
import struct
import zlib
from collections.abc import Sequence

from torch import Tensor

from clo.gpu_worker.drift_check import DriftCheck
from clo.gpu_worker.engine import Engine
from clo.gpu_worker.prefill import Prefill
from clo.gpu_worker.suffix_graphs import SuffixPrefill
from clo.runtime.machine.process import GroupEnded
from clo.runtime.wire.errors import ProtocolError, WorkerDied
from clo.runtime.wire.handlers import handlers_of
from clo.runtime.wire.messages import (
    Activate,
    Advance,
    BeginPrefill,
    Command,
    Compare,
    Extend,
    Feed,
    LeavePrompt,
    PrefillShort,
    Retire,
    Sampling,
    Start,
    TakeStep,
)
from clo.runtime.wire.sockets import Decoder, encode

_HEADER = struct.Struct("<II")  # bytes of a command, checksum
_READ = 2**18


class Leader:
    """The first rank's end: what is called with a command tells the others.

    Args:
        engine: that does the commands here.
        others: a socket to each of the other ranks, blocking.
    """

    def __init__(self, engine: Engine, others: Sequence[socket.socket]) -> None:
        self._engine, self._others, self._checksum = engine, others, 0

    def __call__(self, command: Command) -> None:
        """Raises ``GroupEnded`` where another rank is gone."""
        body = encode(command)
        self._checksum = _next(self._checksum, body, self._engine)
        frame = _HEADER.pack(len(body), self._checksum) + body
        try:
            for other in self._others:
                other.sendall(frame)
        except OSError as error:
            raise GroupEnded(f"A rank cannot be told anything any more: {error}.") from None


class Follower:
    """Another rank: does what the first one does.

    Args:
        name: of this rank, for users.
        engine: does the commands.
        drift_check: that of the engine, if it has one.
        first: the socket from the first rank.
    """

    def __init__(
        self, name: str, engine: Engine, drift_check: DriftCheck | None, first: socket.socket
    ) -> None:
        self._name, self._engine, self._drift_check, self._first = name, engine, drift_check, first
        self._decode: Decoder[Command] = Decoder(Command)
        self._received = bytearray()
        self._checksum = self._count = 0
        self._prefills: dict[int, Prefill | SuffixPrefill] = {}  # by slot
        self._logits: Tensor | None = None  # of the prompts that were completed last

    def follow(self) -> None:
        """Take what has come, which there has to be, and do all commands that are complete.

        Raises:
            GroupEnded: the first rank is gone.
            WorkerDied: this rank has strayed.
        """
        try:
            part = self._first.recv(_READ)
        except ConnectionError:  # there was something that it had not read
            part = b""
        if not part:
            raise GroupEnded("The first rank has ended.")
        self._received += part
        while (body := self._next_body()) is not None:
            message = self._decode(body)
            _HANDLERS[type(message)](self, message)

    def _next_body(self) -> bytes | None:
        """The next command, if all of it is there."""
        received = self._received
        if len(received) < _HEADER.size:
            return None
        size, checksum = _HEADER.unpack_from(received)
        if len(received) < _HEADER.size + size:
            return None
        body = bytes(received[_HEADER.size : _HEADER.size + size])
        del received[: _HEADER.size + size]
        self._checksum = _next(self._checksum, body, self._engine)
        self._count += 1
        if self._checksum != checksum:
            raise WorkerDied(
                f"{self._name} has strayed from the first rank at command {self._count}, so its worker ends; "
                "this is a fault of CLO."
            )
        return body

    def on_begin_prefill(self, message: BeginPrefill) -> None:
        self._prefills[message.slot] = self._engine.begin_prefill(
            message.slot, message.tokens, message.blocks, message.last, message.score, message.cached,
            graphs=message.graphs,
        )  # fmt: skip

    def on_advance(self, message: Advance) -> None:
        logits = self._prefills[message.slot].advance(message.tokens)
        if logits is not None:
            self._logits = logits
            del self._prefills[message.slot]

    def on_prefill_short(self, message: PrefillShort) -> None:
        self._logits = self._engine.prefill_short(message.slots, message.tokens, message.blocks)

    def on_leave_prompt(self, message: LeavePrompt) -> None:
        self._engine.leave_prompt()

    def on_activate(self, message: Activate) -> None:
        self._engine.activate(message.slot, message.length, _UNUSED, seed=0)

    def on_start(self, message: Start) -> None:
        if self._logits is None:
            raise ProtocolError("The first rank starts slots before any prompt is complete.")
        self._engine.start(message.slots, self._logits)

    def on_extend(self, message: Extend) -> None:
        self._engine.extend(message.slot, message.blocks)

    def on_feed(self, message: Feed) -> None:
        self._engine.feed(message.slot, message.token)

    def on_compare(self, message: Compare) -> None:
        if self._drift_check is None:
            raise ProtocolError("The first rank compares with full attention, and this one cannot.")
        self._drift_check.attend_fully(message.slot, message.length)

    def on_take_step(self, message: TakeStep) -> None:
        self._engine.step(message.slots, message.longest)

    def on_retire(self, message: Retire) -> None:
        self._prefills.pop(message.slot, None)
        self._engine.retire(message.slot)


_HANDLERS = handlers_of(Follower, Command)
_UNUSED = Sampling()  # the first rank draws


def _next(checksum: int, body: bytes, engine: Engine) -> int:
    """The checksum with one more command, which has not been carried out yet."""
    return zlib.crc32(body, zlib.crc32(engine.pages_checksum.to_bytes(4, "little"), checksum))
