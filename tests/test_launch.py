"""The command line: what is accepted, what is refused and how, and the help."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from clo import launch
from clo.runtime.config import CacheConfig, EngineConfig, GatewayConfig, ModelConfig, ServerConfig
from tests.server import ROOT


def test_no_options_give_the_configured_defaults() -> None:
    assert launch.config_from([]) == ServerConfig()


def test_every_option_reaches_the_configuration() -> None:
    line = (
        "--model m --load-format dummy --device cpu --dtype bfloat16 --max-model-len 100 "
        "--max-num-seqs 3 --gpu-memory-utilization 0.5 --max-num-batched-tokens 700 "
        "--kv-size 1.5MiB --prefix-caching on --kv-disk d --kv-disk-size 2GiB --kv-disk-key k "
        "--kv-events-port 0 --kv-events-topic kv "
        "--workers 2 --tensor-parallel-size 4 --kvstore numa0,numa1 "
        "--attention topk --select-k 5 --resident 6 "
        "--tail 0 --gate 0.5 --prefetch predicted --prefill-attention sparse --prefix-attention exact "
        "--drift-check 9 --recovery off "
        "--host 127.0.0.2 "
        "--port 0 --seed 7 --log-level info --api-key k --http 1 --served-model-name a,b "
        "--tool-call-parser hermes --reasoning-parser none --ssl-certfile c --ssl-keyfile p "
        "--allowed-origins http://d,* --otlp-traces-endpoint http://e/v1/traces"
    )
    assert launch.config_from(line.split()) == ServerConfig(
        model=ModelConfig("m", "dummy", "cpu", "bfloat16", 100, 7),
        cache=CacheConfig("topk", 5, 6, 0, 0.5, "predicted", "sparse", "exact", drift_check=9),
        engine=EngineConfig(3, 0.5, 700),
        gateway=GatewayConfig(
            1, ("a", "b"), "hermes", "none", "c", "p", ("http://d", "*"), "http://e/v1/traces"
        ),
        workers=2,
        tensor_parallel_size=4,
        kvstore=("numa0", "numa1"),
        kv_size=3 * 2**19,
        prefix_caching="on",
        kv_disk="d",
        kv_disk_size=2**31,
        kv_disk_key="k",
        recovery="off",
        kv_events_port=0,
        kv_events_topic="kv",
        host="127.0.0.2",
        port=0,
        log_level="info",
        api_key="k",
    )
    options = set(launch.parser("launch.py")._option_string_actions) - {"-h", "--help"}
    options.remove("--profile")  # goes without --gate
    assert options == {word for word in line.split() if word.startswith("--")}


def test_the_key_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLO_API_KEY", "from there")
    assert launch.config_from([]).api_key == "from there"
    assert launch.config_from(["--api-key", "given"]).api_key == "given"
    monkeypatch.setenv("CLO_API_KEY", "")
    assert launch.config_from([]).api_key is None


def test_gate_and_model_length_can_be_switched_off_by_name() -> None:
    config = launch.config_from(["--gate", "off", "--max-model-len", "auto"])
    assert config.cache.gate is None
    assert config.model.max_model_len is None


WRONG_OPTIONS = {
    "unknown option": ("--kv-sise 8GiB", "unrecognized arguments: --kv-sise 8GiB"),
    "abbreviated option": ("--work 1", "unrecognized arguments: --work 1"),
    "unknown option value": ("--attention sparse", "invalid choice: 'sparse' (choose from"),
    "no value": ("--model", "--model: expected one argument"),
    "word for a number": ("--workers two", "--workers: 'two' is not a number"),
    "no workers": ("--workers 0", "--workers is 0; it must be at least 1."),
    "no GPU memory": (
        "--gpu-memory-utilization 0",
        "--gpu-memory-utilization is 0.0; it must be above 0 and at most 1.",
    ),
    "no sequences": ("--max-num-seqs 0", "--max-num-seqs is 0; it must be at least 1, or 'auto'."),
    "no rows selected": ("--select-k 0", "--select-k is 0; it must be at least 1."),
    "resident below select-k": ("--select-k 64 --resident 63", "--resident 63 is below --select-k 64"),
    "tail of less than nothing": ("--tail -1", "--tail is -1; it must be from 0 to 65536."),
    "tail of too many parts": ("--tail 65537", "--tail is 65537; it must be from 0 to 65536."),
    "tail of another attention": ("--attention topk --tail 16", "--tail is for --attention clo"),
    "codes of another attention": (
        "--attention full --prefix-attention sparse",
        "--prefix-attention sparse needs the codes of keys and values, and --attention is full",
    ),
    "codes without a tail": (
        "--tail 0 --prefix-attention sparse",
        "--prefix-attention sparse needs the codes of keys and values, and --tail is 0",
    ),
    "sparse attention to no prefix": (
        "--prefix-caching off --prefix-attention sparse",
        "--prefix-attention sparse is for --prefix-caching on",
    ),
    "gate that is no cosine": ("--gate 1.1", "--gate is 1.1; it is a cosine from 0 to 1"),
    "gate that is no number": ("--gate low", "--gate: 'low' is not a number or 'off'"),
    "gate that is not a number": ("--gate nan", "--gate is nan; it is a cosine from 0 to 1"),
    "drift_check of no steps": ("--drift-check 0", "--drift-check is 0; it must be at least 1"),
    "size without a number": ("--kv-size much", "--kv-size: 'much' is not a size; write for example 512MiB"),
    "empty size": ("--kv-size 0", "'0' is not a size"),
    "size beyond all machines": ("--kv-size " + "9" * 400, "is not a size; write for example 512MiB"),
    "size below a byte": ("--kv-size 0.001", "'0.001' is not a size"),
    "no tokens": ("--max-model-len 0", "--max-model-len is 0; it must be at least 1."),
    "negative seed": ("--seed -1", "--seed is -1"),
    "an endless key": ("--api-key " + "k" * 256, "--api-key has 256 bytes; it must have 1 to 255."),
    "port out of range": ("--port 65536", "--port is 65536; it must be from 0 to 65535."),
    "collector that is no URL": (
        "--http 0 --otlp-traces-endpoint localhost:4318",
        "--otlp-traces-endpoint 'localhost:4318' is no URL with a path; write for example http://127",
    ),
    "store that is no node": ("--kvstore gpu", "--kvstore 'gpu' is not of the form numa0"),
    "port of events": ("--kv-events-port 65536", "--kv-events-port is 65536; it must be from 0 to 65535"),
    "events of nothing": ("--kv-events-port 0 --prefix-caching off", "there is nothing to publish"),
    "disk without a size": ("--kv-disk d", "--kv-disk and --kv-disk-size go together; give both."),
    "size of no disk": ("--kv-disk-size 1GiB", "--kv-disk and --kv-disk-size go together; give both."),
    "key of no disk": ("--kv-disk-key k", "--kv-disk-key is for --kv-disk: there is nothing to encrypt."),
    "disk for nothing": (
        "--kv-disk d --kv-disk-size 1GiB --prefix-caching off",
        "--kv-disk is for --prefix-caching on: there is nothing to keep.",
    ),
    "same node twice": ("--kvstore numa0,numa0", "--kvstore names a node twice"),
}


@pytest.mark.parametrize(("line", "expected"), WRONG_OPTIONS.values(), ids=WRONG_OPTIONS)
def test_wrong_option(line: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence on stderr that names option and value; exit code 2."""
    assert launch.main(line.split()) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    assert expected in output.err


def test_other_systems_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert launch.main([]) == 1
    assert capsys.readouterr().err == "error: CLO runs on Linux only, and this is darwin.\n"


@pytest.mark.parametrize("package", ["msgspec", "zmq", "tokenizers"])
def test_a_package_that_is_missing_is_named(tmp_path: Path, package: str) -> None:
    """One sentence on stderr and exit code 1, also for what is imported only after the options were read."""
    done = run_without(package, tmp_path, "launch.py", "--model", "no-such-model")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", lacks(package))


def test_a_server_whose_workers_could_not_load_torch_says_so_itself(tmp_path: Path) -> None:
    """The launcher does not import it."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['torch'] = None\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "launch.py", "--model", "no-such-model"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", lacks("torch"))


def test_a_python_without_any_package_says_so() -> None:
    """As the machine's own does where somebody forgets the virtual environment."""
    command = [sys.executable, "-S", "-E", "launch.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", lacks("msgspec"))


def test_too_few_open_files_are_one_sentence() -> None:
    """Its own processes would be turned away by the router, and it would wait for them for long."""
    command = ["bash", "-c", 'ulimit -n 255; exec "$0" launch.py --device cpu', sys.executable]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: A process may have 255 files open here, and a server needs 256: ")


@pytest.mark.parametrize("module", ["msgspec", "tokenizers"])
def test_a_missing_module_of_its_own_is_no_package_to_install(tmp_path: Path, module: str) -> None:
    done = run_without(module, tmp_path, "launch.py", "--model", "no-such-model", name="clo.kernels")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "pip install" not in done.stderr


def run_without(
    module: str, folder: Path, *arguments: str, name: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run Python; importing ``module`` fails there because there is no ``name``, by default itself."""
    (folder / f"{module}.py").write_text(f"raise ModuleNotFoundError(name={name or module!r})\n")
    environment = os.environ | {"PYTHONPATH": str(folder)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def lacks(package: str) -> str:
    return (
        f"error: {sys.executable} has no package '{package}'; run 'make setup' once and start with "
        ".venv/bin/python, or install CLO there with 'pip install -e .'.\n"
    )


def test_help_fits_100_columns_and_states_every_default() -> None:
    """Each option's help ends with its default, in words that the option itself takes."""
    output = subprocess.run([sys.executable, "launch.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert output.returncode == 0
    assert output.stderr == ""
    assert all(len(line) <= 100 for line in output.stdout.splitlines())
    shown = " ".join(output.stdout.split())
    for action in launch.parser("launch.py")._actions[1:]:
        (name,) = action.option_strings
        text = action.help
        assert text is not None and len(text.split()) > 3, f"{name} is not explained"
        assert text.endswith(")"), f"the default of {name} is not stated"
        assert " ".join(text.split()) in shown
        default = text.rpartition("(")[2].removesuffix(")")
        assert launch.config_from([name, default]) == ServerConfig(), f"{name} {default}"
