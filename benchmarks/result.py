"""The one form of all results: what was measured, on what, by which command."""

import json
import platform
import subprocess
import sys
import textwrap
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Result:
    """One figure. ``ratio`` is value / reference, measured in the same run unless a note says otherwise."""

    case: str
    metric: str
    value: float
    unit: str
    reference: float | None = None
    ratio: float | None = None

    def __str__(self) -> str:
        ratio = "" if self.ratio is None else f"  ratio {self.ratio:.3f}"
        return f"{self.case:32} {self.metric:24} {self.value:10.4g} {self.unit}{ratio}"


def hardware() -> str:
    """The device that computes, by name."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
             if line.startswith("model name")]  # fmt: skip
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def write(name: str, results: list[Result], notes: list[str] | None = None) -> None:
    """Print the results and write ``benchmarks/results/NAME.json``.

    Args:
        notes: sentences without which the figures would be misread; printed and written with them.
    """
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    record = {
        "hardware": hardware(),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit.stdout.strip(),
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        **({"notes": notes} if notes else {}),
        "results": [asdict(result) for result in results],
    }
    for result in results:
        print(result)
    for note in notes or []:
        print(textwrap.fill(note, 110))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {path}")
