"""Every kernel compiles for every supported generation of GPUs, at the tested shapes, and fits into it.

No GPU is needed: calls on the meta device say what would be launched, and NVRTC compiles just that. ptxas
reports registers, spills and shared memory.
"""

import io
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from torch import Tensor

from clo.kernels.launch import FOLDER, STANDARD, Launch, recorded
from clo.kernels.limits import SHARED_BYTES, UPDATE_STATIC_BYTES
from tests.kernel_calls import SHAPES, Shape, Sizes, calls

core = pytest.importorskip("cuda.core", reason="NVRTC compiles the kernels: pip install -e '.[test]'")

_REPLAY = Path(__file__).parents[1] / "benchmarks" / "gpu" / "replay.cu"
_REGISTERS = 65536  # of a multiprocessor
_SPILLED = 128  # bytes, by the one kernel that spills: attend_resident in float32 on sm_100
_SMALL = Sizes(batch=1, capacity=1, k=1, vocab=512)
_MIDDLE = Sizes(batch=4, capacity=100, k=60, block_tokens=256)
_LARGE = Sizes(batch=256, capacity=1024, k=128, block_tokens=512)  # fetches in bulk
_LONG = Sizes(batch=1, capacity=1024, k=128, block_tokens=512, max_blocks=300)

_REPORT = re.compile(
    r"Function properties for (?P<name>\w+)\s+ptxas\D*(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\s+"
    r"ptxas info\s*: Used (?P<registers>\d+) registers(?:.*?(?P<shared>\d+) bytes smem)?"
)


class Program(NamedTuple):
    """A source with its constants."""

    file: str
    defines: tuple[tuple[str, int], ...]


def launches(shapes: Iterable[Shape], all_sizes: Iterable[Sizes]) -> dict[Program, list[Launch]]:
    """What all operations would launch, by program."""
    all_sizes = list(all_sizes)
    with recorded() as found:
        for shape in shapes:
            for sizes in all_sizes:
                by_name = calls(shape, "meta", sizes)
                state = by_name["attend_resident"].run()
                by_name["merge_fetched"] = by_name["merge_fetched"].with_argument("state", state)
                for call in by_name.values():
                    call.run()
                by_name["quantize_query"].with_argument("rope", None).run()
    found.append(Launch(str(_REPLAY), "replay", (1,), 64, (), 0, ()))
    programs: dict[Program, list[Launch]] = {}
    for launch in found:
        programs.setdefault(Program(launch.file, launch.defines), []).append(launch)
    return programs


def compile_and_check(capability: int, program: Program, asked: list[Launch]) -> None:
    options = core.ProgramOptions(
        std=STANDARD,
        ftz=True,  # this and the next are CuPy's
        device_as_default_execution_space=True,
        arch=f"sm_{capability}",
        include_path=str(FOLDER),
        define_macro=[(name, str(value)) for name, value in program.defines] or None,
        ptxas_options=["-v"],
    )
    log = io.StringIO()
    core.Program((FOLDER / program.file).read_text(), "c++", options).compile("cubin", logs=log)
    reports = {report["name"]: report for report in _REPORT.finditer(log.getvalue())}
    for launch in asked:
        report, where = reports[launch.name], f"{launch.name} {dict(program.defines)} on sm_{capability}"
        static = int(report["shared"] or 0)
        spilled = max(int(report["stores"]), int(report["loads"]), int(report["stack"]))
        known = launch.name == "attend_resident" and ("ELEMENT", 2) in program.defines and capability == 100
        assert spilled <= (_SPILLED if known else 0), f"{where} spills {spilled} bytes"
        assert static + launch.shared <= SHARED_BYTES[capability], where
        assert static <= 48 * 1024, where
        assert int(report["registers"]) * launch.threads <= _REGISTERS, where
        if launch.name == "update_resident":
            assert static == UPDATE_STATIC_BYTES, "clo.kernels.limits counts on that"


def compile_all(capability: int, programs: dict[Program, list[Launch]]) -> None:
    with ThreadPoolExecutor(2) as threads:  # NVRTC leaves the interpreter to other threads
        for _ in threads.map(lambda item: compile_and_check(capability, *item), programs.items()):
            pass


@pytest.mark.parametrize(
    "capability",
    [number if number == 90 else pytest.param(number, marks=pytest.mark.slow) for number in SHARED_BYTES],
)
def test_every_kernel_fits(capability: int) -> None:
    """Every second shape is compiled for one generation, which are all types and head dims, and every third
    for each of the others; the next test compiles all."""
    first = list(SHARED_BYTES).index(capability)
    compile_all(capability, launches(SHAPES[::2] if capability == 90 else SHAPES[first::3], [_LARGE]))
    long = launches(SHAPES[:1], [_LONG])
    compile_all(capability, {program: long[program] for program in long if "update" in program.file})


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_kernel_fits_at_every_shape_and_size(shape: Shape, capability: int) -> None:
    compile_all(capability, launches([shape], [_SMALL, _MIDDLE, _LARGE]))


def test_every_source_is_compiled() -> None:
    sources = {path.name for path in FOLDER.glob("*.cu")}
    assert sources == {program.file for program in launches(SHAPES[:1], [_LARGE])} - {str(_REPLAY)}


def test_launches_give_every_parameter() -> None:
    """The driver reads as many arguments as a kernel has parameters, whatever it is given."""
    for program, asked in launches(SHAPES, [_LARGE]).items():
        if program.file == str(_REPLAY):  # which is not launched here
            continue
        source = (FOLDER / program.file).read_text()
        for launch in asked:
            found = re.search(rf"__global__[^;{{]*\b{launch.name}\(([^)]*)\)\s*{{", source)
            assert found, f"{launch.name} is not in {program.file}"
            wanted = [_kind(parameter) for parameter in found[1].split(",")]
            given = [
                "pointer" if argument is None or isinstance(argument, Tensor) else type(argument).__name__
                for argument in launch.args
            ]
            assert given == wanted, launch.name


def _kind(parameter: str) -> str:
    """What stands for a parameter in the arguments of a launch."""
    if "*" in parameter:
        return "pointer"
    return "float" if parameter.split()[0] == "float" else "int"
