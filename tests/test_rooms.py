"""The rooms of the code, and which of them may import which: the contracts in pyproject.toml."""

import shutil
import subprocess
import sys
from pathlib import Path

from tests.server import ROOT


def test_no_room_imports_from_a_higher_one_and_there_is_no_cycle(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "clo", tmp_path / "clo", ignore=shutil.ignore_patterns("__pycache__"))
    # A folder named "kernels" at the top of a clone must not hide Hugging Face's package of that name, so it
    # has no __init__.py; the tool reads regular packages only.
    (tmp_path / "clo/kernels/__init__.py").touch()
    command = "from importlinter.cli import lint_imports_command as main; main()"
    result = subprocess.run(
        [sys.executable, "-P", "-c", command, ROOT / "pyproject.toml", "--no-cache"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
