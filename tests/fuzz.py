"""What the fuzz tests draw: values of any type that a message has, and values that are nearly so.

``python -m tests.fuzz --minutes 60`` runs the tests of ``tests/test_fuzz.py`` and of
``tests/test_pool_machine.py`` for that long, each time with other values, and ends with 1 at the first that
fails; else it writes ``benchmarks/results/fuzz.json``.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from msgspec import inspect

from benchmarks.result import Result, write
from tests.server import ROOT

MANY = 1500  # values in each test of a round
EXAMPLES = (
    "CLO_FUZZ_EXAMPLES"  # environment variable: values drawn in each test; else as many as take seconds
)

_scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(max_size=8),
    st.binary(max_size=8),
)  # fmt: skip
anything: st.SearchStrategy[Any] = st.recursive(
    _scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=8) | st.integers(0, 9), inner, max_size=4)
    ),
    max_leaves=6,
)
"""Whatever MessagePack can hold."""


def drawn(examples: int) -> settings:
    """Settings of a test: the same values in each run, or more and other ones where ``tests.fuzz`` runs
    it."""
    many = os.environ.get(EXAMPLES)
    return settings(
        max_examples=int(many) if many else examples,
        derandomize=many is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def values(kind: inspect.Type) -> st.SearchStrategy[Any]:
    """Values of a type, as they are on the wire, its bounds included."""
    match kind:
        case inspect.IntType():
            first = -(2**63) if kind.ge is None else kind.ge
            last = kind.le if kind.le is not None else (kind.lt or 2**63) - 1
            return st.integers(first, min(last, first + 9)) | st.integers(first, last)  # small ones often
        case inspect.FloatType():
            return st.floats(
                kind.ge, kind.le, exclude_min=False, allow_nan=kind.ge is None and kind.gt is None
            ).filter(lambda value: kind.gt is None or value > kind.gt)
        case inspect.StrType():
            return st.text(min_size=kind.min_length or 0, max_size=min(kind.max_length or 20, 20))
        case inspect.BytesType():
            return st.binary(min_size=kind.min_length or 0, max_size=kind.max_length or 20)
        case inspect.ListType():
            return st.lists(values(kind.item_type), min_size=kind.min_length or 0, max_size=4)
        case inspect.TupleType():
            return st.tuples(*map(values, kind.item_types)).map(list)
        case inspect.DictType():
            return st.dictionaries(values(kind.key_type), values(kind.value_type), max_size=3)
        case inspect.UnionType():
            return st.one_of(*map(values, kind.types))
        case inspect.LiteralType():
            return st.sampled_from(kind.values)
        case inspect.Metadata():
            return values(kind.type)
        case inspect.BoolType():
            return st.booleans()
        case inspect.NoneType():
            return st.none()
        case inspect.StructType() if kind.array_like:
            name = [] if kind.tag is None else [st.just(kind.tag)]
            return st.tuples(*name, *(values(field.type) for field in kind.fields)).map(list)
        case inspect.StructType():
            fields = {field.encode_name: values(field.type) for field in kind.fields}
            optional = {field.encode_name for field in kind.fields if not field.required}
            needed = {name: drawn for name, drawn in fields.items() if name not in optional}
            found = st.fixed_dictionaries(needed, optional={name: fields[name] for name in optional})
            return found if kind.tag is None else found.map(lambda value: {kind.tag_field: kind.tag} | value)
    return anything


@st.composite
def spoiled(draw: st.DrawFn, message: st.SearchStrategy[Any]) -> Any:
    """A message with anything in the place of some part of it."""
    whole = draw(message)
    place = [whole]
    key: Any = 0
    while isinstance(place[key], dict | list) and place[key] and draw(st.integers(0, 3)):
        place = place[key]
        key = draw(st.sampled_from(sorted(place, key=str) if isinstance(place, dict) else range(len(place))))
    place[key] = draw(anything)
    return whole if place[key] is not whole else place[key]


@st.composite
def damaged(draw: st.DrawFn, message: st.SearchStrategy[Any]) -> bytes:
    """The bytes of a message, some of them others, cut short or doubled."""
    data = bytearray(msgspec.msgpack.encode(draw(message)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=5))
    return bytes(data)


def frames(union: Any) -> st.SearchStrategy[bytes]:
    """What may arrive at a socket for one of the messages of a union."""
    message = values(inspect.type_info(union))
    encode = msgspec.msgpack.encode
    return st.one_of(
        message.map(encode), spoiled(message).map(encode), damaged(message), st.binary(max_size=60)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    began = time.monotonic()
    end = began + 60 * parser.parse_args().minutes
    rounds = tests = 0
    environment = os.environ | {EXAMPLES: f"{MANY}"}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        line = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "tests/test_fuzz.py",
            "tests/test_pool_machine.py",
        ]
        line += ["-p", "no:cacheprovider", "--timeout", "7200", "--junitxml", str(report)]
        while time.monotonic() < end:
            if subprocess.run(line, cwd=ROOT, env=environment).returncode:
                return 1
            rounds += 1
            tests = len(list(ElementTree.parse(report).iter("testcase")))
            print(f"{rounds} rounds, {(end - time.monotonic()) / 60:.1f} minutes left", flush=True)
    results = [
        Result("fuzz", "time", (time.monotonic() - began) / 60, "minutes"),
        Result("fuzz", "rounds", rounds, "rounds"),
        Result("fuzz", "tests", tests, "tests"),
        Result("fuzz", "values of each test", rounds * MANY, "values"),
        Result("fuzz", "values of all tests", rounds * MANY * tests, "values"),
        Result("fuzz", "failures", 0, "failures"),
    ]
    write("fuzz", results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
