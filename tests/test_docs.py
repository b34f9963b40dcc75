"""What the documents show is true of the code."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from clo import launch
from clo.gpu_worker import outputs
from clo.gpu_worker.cache import staging
from clo.kvstore import disk
from clo.runtime import accounts, grammars
from clo.runtime.wire import liveness
from clo.runtime.wire.errors import CLOError, ConfigError, DeviceStuck
from clo.runtime.wire.messages import MAX_MESSAGE_BYTES

ROOT = Path(__file__).parent.parent
ERRORS = (ROOT / "docs/errors.md").read_text()
_KINDS: list[type[CLOError]] = [CLOError, *CLOError.__subclasses__()]
KINDS = {kind.__name__: kind.code for kind in _KINDS}


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_example_of_a_new_option_applies() -> None:
    example = re.search(r"```diff\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    assert example is not None
    command = ["git", "apply", "--check", "-"]
    checked = subprocess.run(command, cwd=ROOT, input=example[1], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize(
    "document", [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")], ids=lambda p: p.name
)
def test_links_lead_somewhere(document: Path) -> None:
    """To a file that is there and, where they name one, to a heading of it."""
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)", document.read_text()):
        name, _, anchor = target.partition("#")
        file = document.parent / name if name else document
        assert file.exists(), f"{document.name} links to {target}"
        assert not anchor or anchor in anchors(file.read_text()), f"{document.name} links to {target}"


def anchors(text: str) -> set[str]:
    """What GitHub calls the headings of a document in links to them."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_the_table_of_files_has_every_module_and_no_other_file() -> None:
    text = (ROOT / "docs/structure.md").read_text()
    table = text[text.index("## Files") : text.index("## Three walks")]
    listed: set[str] = set()
    folder = ""
    for row in re.findall(r"^\| ([^|]*`[^|]*|\*\*[^|]*) \|", table, re.MULTILINE):
        if room := re.match(r"\*\*(.*)\*\*", row):
            folder = f"{room[1]}/"
        else:
            listed |= {folder + name for name in re.findall(r"`([\w./]+)`", row)}
    for file in listed:
        assert (ROOT / file).exists(), file
    rooms = [ROOT / name for name in ("runtime", "kvstore", "kernels", "gpu_worker")]
    modules = {*(ROOT / "clo").glob("*.py"), *(ROOT / "clo/commands").glob("*.py"), ROOT / "launch.py"}
    modules = {file for file in modules if not file.is_symlink()}.union(
        *(room.rglob("*.py") for room in rooms)
    )
    named = {str(file.relative_to(ROOT)) for file in modules if file.name != "__init__.py"}
    assert named <= listed, named - listed


def errors_table() -> list[dict[str, str]]:
    """The rows of docs/errors.md that name a test, each by the titles of its columns."""
    rows: list[dict[str, str]] = []
    titles: list[str] = []
    for line in ERRORS.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if not line.startswith("|"):
            titles = []
        elif not titles:
            titles = cells
        elif "tested in" in titles and not line.startswith("| ---"):
            assert len(cells) == len(titles), line
            rows.append(dict(zip(titles, cells, strict=True)))
    return rows


def words(text: str) -> list[str]:
    """What is in backticks."""
    return re.findall(r"`(\w+)`", text)


def test_the_tests_that_produce_errors_are_there() -> None:
    rows = errors_table()
    assert len(rows) > 100
    for row in rows:
        names = words(row["tested in"])
        rest = re.sub(r"`\w+`|, ", "", row["tested in"])
        assert rest in ({"", "without a server"} if names else {"by hand", "not tested"}), row
        for name in names:
            assert (ROOT / f"tests/test_{name}.py").exists(), row


def test_errors_have_the_codes_that_the_table_says() -> None:
    """And each that a client can see is in it."""
    for row in errors_table():
        codes = words(row.get("code", "") + row.get("code and exit code", ""))
        raised = [KINDS[word] for word in words(row.get("what the user sees", "")) if word in KINDS]
        assert set(codes) <= set(KINDS.values()), row
        assert not codes or not raised or codes == raised, row
    missing = set(KINDS.values()) - set(words(ERRORS))
    assert missing == {ConfigError.code, DeviceStuck.code}, "these end a process, which prints them"


def test_options_in_the_table_of_errors_exist() -> None:
    known = launch.parser("launch.py")._option_string_actions
    commands = {"--input", "--output", "--log-level"}
    for option in re.findall(r"`(--[a-z-]+)", ERRORS):
        assert option in known or option in commands, option


def test_the_figures_in_the_table_of_errors_are_those_of_the_code() -> None:
    for figure in (
        f"`stalled` after {liveness.STALLED_S:g} s",
        f"more than {liveness.SERVING_S:g} s, or it is not ready within {liveness.STARTING_S:,.0f} s",
        f"does not finish a step within {outputs._STUCK_SECONDS:g} s",
        f"does not bring rows within {staging.STUCK_SECONDS:g} s",
        f"brings nothing for {disk.STUCK_S:g} s",
        f"the store writes them first, for {liveness.DRAIN_S:g} s at most",
        f"takes more than {grammars.COMPILE_S:g} s or {grammars.MEMORY_BYTES >> 30} GiB",
        f"More than {accounts.OPEN_REQUESTS:,} requests of one client open, or of more than "
        f"{accounts.OPEN_BYTES >> 20} MiB",
        f"A prompt of more than {MAX_MESSAGE_BYTES >> 20} MiB",
    ):
        assert figure in ERRORS, figure
