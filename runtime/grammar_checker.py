"""``python -m clo.runtime.grammar_checker BYTES PARENT``: tries grammars in a process that may die of them.

A line of stdin is a ``StructuredOutputs`` in JSON, and a line of stdout the answer, a ``Checked``. The
process takes BYTES of memory at most, and its stack is smaller than a worker's, so that what it survives a
worker survives. It ends with the process PARENT.
"""

import json
import random
import resource
import sys
import threading

import llguidance
import msgspec

from clo.runtime.machine.process import die_with_parent
from clo.runtime.wire.messages import StructuredOutputs

_STACK_BYTES = 2**20
_STEPS = 64  # of a random walk through a grammar
_JSON = {"whitespace_pattern": r"(\n[ ]{0,40}| )"}  # small models may want white space without end
_END = 256  # after the tokens that are one byte each


class Checked(msgspec.Struct):
    """The grammar as llguidance takes it, or what is wrong with it."""

    grammar: str = ""
    error: str = ""


class _Bytes:
    """A tokenizer whose tokens are the bytes."""

    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")
    special_token_ids = (_END,)
    eos_token_id = _END
    bos_token_id = None

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def grammar_of(wanted: StructuredOutputs) -> str:
    """A grammar of llguidance.

    Raises:
        ValueError: says what is wrong.
    """
    matcher = llguidance.LLMatcher
    grammar: str
    if wanted.json is not None:
        schema = json.loads(wanted.json) if isinstance(wanted.json, str) else wanted.json
        if not isinstance(schema, dict):
            raise ValueError("the JSON schema is not an object")
        grammar = matcher.grammar_from_json_schema(schema, defaults=_JSON)
    elif wanted.json_object is not None:
        grammar = matcher.grammar_from_json_schema({"type": "object"}, defaults=_JSON)
    elif wanted.regex is not None:
        grammar = matcher.grammar_from_regex(wanted.regex)
    elif wanted.choice is not None:
        grammar = llguidance.grammar_from("choice", json.dumps(wanted.choice))
    else:
        grammar = llguidance.grammar_from("grammar", wanted.grammar or "")
    return grammar


def check(wanted: StructuredOutputs, tokenizer: llguidance.LLTokenizer) -> Checked:
    """Make a grammar, and follow it for a while."""
    try:
        grammar = grammar_of(wanted)
    except (ValueError, RecursionError) as error:
        return Checked(error=str(error))
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0)
    choose = random.Random(0)
    for _ in range(_STEPS):
        if matcher.is_error() or matcher.is_stopped():
            break
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        allowed = [token for token in range(_END) if mask >> token & 1]
        if not allowed:
            break
        matcher.consume_token(choose.choice(allowed))
    return Checked(error=matcher.get_error()) if matcher.is_error() else Checked(grammar)


def main() -> None:
    die_with_parent(int(sys.argv[2]))
    most = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Bytes()), n_vocab=_END + 1)

    def serve() -> None:
        for line in sys.stdin.buffer:
            checked = check(msgspec.json.decode(line, type=StructuredOutputs), tokenizer)
            sys.stdout.buffer.write(msgspec.json.encode(checked) + b"\n")
            sys.stdout.buffer.flush()

    threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(target=serve)
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
