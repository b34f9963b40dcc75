"""What is installed: one package, whole, that works from any folder and beside others of similar names."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.server import ROOT

STANDING = """
import sys
import kernels, clo, clo.kernels.launch, clo.gpu_worker.engine, clo.kvstore.server, clo.runtime.supervisor
import transformers
from clo import AsyncClient, Client
print(kernels.__file__, clo.__file__, clo.kernels.launch.__file__, sep="\\n")
"""


def run(*arguments: str | Path, cwd: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """A Python that finds what lies in ``site`` first."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env={"PYTHONPATH": str(site)}, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that the sdist makes."""
    folder = tmp_path_factory.mktemp("dist")
    command: list[str | Path] = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed wheel and another package named ``kernels``, as Hugging Face's is."""
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (site / "kernels").mkdir()
    (site / "kernels/__init__.py").write_text("def get_kernel(): ...\n")
    return site


def test_a_wheel_holds_one_package_and_all_of_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        scripts = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"clo", "clo_llm"}
    assert "clo = clo.__main__:main" in scripts
    sources = {
        f"clo/{path.relative_to(ROOT)}"
        for folder in ("runtime", "kvstore", "gpu_worker", "kernels")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".cu", ".cuh", ".html", ".css", ".js", ".svg")
    }
    assert sources | {"clo/__init__.py", "clo/__main__.py", "clo/launch.py", "clo/py.typed"} <= set(names)


def test_it_works_from_an_empty_folder_beside_a_package_named_kernels(site: Path, tmp_path: Path) -> None:
    done = run("-c", STANDING, cwd=tmp_path, site=site)
    assert done.returncode == 0, done.stderr
    expected = [site / "kernels/__init__.py", site / "clo/__init__.py", site / "clo/kernels/launch.py"]
    assert done.stdout.split() == [str(path) for path in expected]
    assert run("-m", "clo", "--version", cwd=tmp_path, site=site).stdout.startswith("clo ")
    refused = run("-m", "clo", "serve", "--port", "70000", cwd=tmp_path, site=site)
    assert (refused.returncode, refused.stderr) == (
        2,
        "error: --port is 70000; it must be from 0 to 65535.\n",
    )


def test_a_clone_does_not_hide_a_package_named_kernels(site: Path) -> None:
    done = run("-c", "import kernels; print(kernels.__file__)", cwd=ROOT, site=site)
    assert done.stdout.strip() == str(site / "kernels/__init__.py")
