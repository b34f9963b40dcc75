"""From what a client wants its answer to look like to a grammar that a worker can follow."""

import asyncio
import importlib.util
import os
import sys
from collections import OrderedDict
from contextlib import suppress

import msgspec

from clo.runtime.machine.process import set_threads
from clo.runtime.wire.errors import InvalidRequest
from clo.runtime.wire.messages import StructuredOutputs

GRAMMAR_BYTES = 256 * 1024  # of one grammar
COMPILE_S = 5.0
MEMORY_BYTES = 2**31
_REMEMBERED = 64
_LINE_BYTES = 8 * GRAMMAR_BYTES
_REASON_CHARACTERS = 300


class Grammars:
    """Checks grammars in a process of its own, which is started for the first and may die of any: no grammar
    of a client ends or delays the server. One is checked at a time, for 5 s at most; the latest ones are
    remembered. To be used in one event loop, in the main thread."""

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, str] = OrderedDict()
        self._turn = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None

    async def compile(self, wanted: StructuredOutputs) -> str:
        """A grammar as ``Sampling.grammar`` takes it.

        Raises:
            InvalidRequest: it is not one, it is too large, or it asks for what is not supported.
        """
        given = [name for name, value in msgspec.structs.asdict(wanted).items() if value is not None]
        if len(given) != 1 or wanted.json_object is False:
            raise InvalidRequest(
                "structured_outputs takes one of json, json_object (true), regex, choice and grammar, and "
                f"not {' and '.join(given) or 'none'}."
            )
        if wanted.choice is not None and not all([wanted.choice, *wanted.choice]):
            raise InvalidRequest("structured_outputs choice needs at least one text, and none may be empty.")
        if importlib.util.find_spec("llguidance") is None:
            raise InvalidRequest(
                "Structured output needs the package llguidance on the server: "
                "pip install 'clo-llm[structured]'."
            )
        try:
            text = msgspec.json.encode(wanted)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequest(f"structured_outputs json is not JSON: {error}.") from None
        if len(text) > GRAMMAR_BYTES:
            raise InvalidRequest(
                f"structured_outputs takes {len(text)} bytes, and may take {GRAMMAR_BYTES}; shorten it."
            )
        if text in self._known:
            self._known.move_to_end(text)
            return self._known[text]
        async with self._turn:
            grammar = await self._check(text)
        self._known[text] = grammar
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return grammar

    async def close(self) -> None:
        """End the process."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
            self._process = None

    async def _check(self, text: bytes) -> str:
        if self._process is None or self._process.returncode is not None:  # killed between two grammars
            self._process = await _start()
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(text + b"\n")
            async with asyncio.timeout(COMPILE_S):
                line = await process.stdout.readline()
        except TimeoutError:
            await self.close()
            raise InvalidRequest(
                f"structured_outputs takes more than {COMPILE_S:g} s to compile; simplify it."
            ) from None
        except BaseException:  # what it answers now would be taken for the answer to the next
            await self.close()
            raise
        if not line:
            await self.close()
            raise InvalidRequest(
                f"structured_outputs is nested too deeply, or takes more than {MEMORY_BYTES >> 30} GiB to "
                "compile; simplify it."
            )
        answer = msgspec.json.decode(line)
        if answer["error"]:
            reason = " ".join(answer["error"].split())[:_REASON_CHARACTERS].rstrip(".")
            raise InvalidRequest(f"structured_outputs cannot be followed: {reason}.")
        return str(answer["grammar"])


async def _start() -> asyncio.subprocess.Process:
    environment = dict(os.environ)
    set_threads(environment, 1)
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "clo.runtime.grammar_checker", str(MEMORY_BYTES), str(os.getpid())),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
        limit=_LINE_BYTES,
        env=environment,
    )
