"""What the loader refuses, and with which sentence; what it makes without weights."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor

from clo.gpu_worker.model.decoder import Decoder, load_decoder
from clo.runtime.config import ModelConfig
from clo.runtime.model import default_model, files
from clo.runtime.model.files import resolve
from clo.runtime.tokenizer import Tokenizer
from clo.runtime.wire.errors import ConfigError
from clo.runtime.wire.messages import Text

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SECOND = "second.safetensors"  # of two shards
NORM = "model.norm.weight"


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def named(folder: Path | str, **options: Any) -> ModelConfig:
    return ModelConfig(model=str(folder), device="cpu", **options)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def shard(folder: Path) -> dict[str, str]:
    """Split the weights into two files and an index; returns the index's weight map."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    files = {"first.safetensors": names[:10], SECOND: names[10:]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in files.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def hidden_states(decoder: Decoder) -> Tensor:
    """Something that depends on every weight."""
    tokens = torch.arange(50)
    hidden, rope = decoder.embed(tokens), decoder.rope(tokens)
    normed = decoder.input_norm(0, hidden)
    for layer in range(decoder.shape.layers):
        query, rows = decoder.qkv(layer, normed, rope)
        values = rows.sum(dim=2).repeat_interleave(decoder.shape.group, dim=1)
        hidden, normed = decoder.add_attention(layer, hidden, query + values)
        hidden, normed = decoder.add_mlp(layer, hidden, normed)
    return decoder.logits(normed)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"device": "cpu", "max_model_len": 4097}, "4097 exceeds the 4096 positions"),
        pytest.param(
            {"device": "cuda"},
            "--device cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_options_that_the_model_or_this_version_cannot_meet(
    tiny_model: Path, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        resolve(ModelConfig(model=str(tiny_model), **options))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "holds no config.json"),
        ("{", "cannot be read"),
        ("[]", "family 'None'"),
        ("\xff", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_a_missing_or_broken_config_file(folder: Path, text: str | None, sentence: str) -> None:
    path = folder / "config.json"
    path.unlink() if text is None else path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=sentence):
        resolve(named(folder))


@pytest.mark.parametrize("name", ["no-such-folder", "./no/folder", "/no/folder", "~/no-such-folder", "a/b/c"])
def test_a_name_that_cannot_be_on_the_hub_is_not_looked_up(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(ConfigError, match="neither a folder nor the name of a model on the hub"):
        resolve(named(name))


@pytest.mark.parametrize(
    ("adapter", "sentence"),
    [
        (
            {"peft_type": "LORA", "base_model_name_or_path": "a/base"},
            r"an adapter \(LoRA\).*merge it into a/base with",
        ),
        (
            {"peft_type": "IA3"},
            r"an adapter \(IA3\).*neither LoRA nor other adapters: merge it into its model",
        ),
        ([], r"an adapter \(LoRA\)"),
    ],
)
@pytest.mark.parametrize("alone", [True, False])
def test_an_adapter_is_refused_by_name_also_beside_a_model(
    folder: Path, adapter: Any, sentence: str, alone: bool
) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    if alone:
        (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=sentence):
        resolve(named(folder))


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_a_terminal_shows_how_many_bytes_are_loaded(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, load_format: Any
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal, nobody = Terminal(), io.StringIO()
    for stream in (terminal, nobody):
        monkeypatch.setattr("sys.stderr", stream)
        load_decoder(resolve(named(tiny_model, load_format=load_format)))
    size = sum(tensor.nbytes for tensor in load_file(tiny_model / WEIGHTS).values()) / 2**10
    shown = terminal.getvalue()
    assert "Loading weights: 100%" in shown and f"{size:.0f}k/{size:.0f}k" in shown, shown
    assert nobody.getvalue() == ""


def test_a_file_is_no_model(folder: Path) -> None:
    with pytest.raises(ConfigError, match="neither a folder"):
        resolve(named(folder / WEIGHTS))


def test_without_a_network_an_unknown_hub_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"the Hugging Face hub did not deliver it .*; give a local folder"):
        resolve(named("nobody/nothing"))


def test_what_the_hub_does_not_show_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, **_: object) -> str:
        raise RepositoryNotFoundError("404", response=Mock())

    monkeypatch.setattr(files, "snapshot_download", download)
    with pytest.raises(ConfigError, match="shows no model 'nobody/nothing'"):
        resolve(named("nobody/nothing"))


@pytest.mark.parametrize(("load_format", "weights"), [("auto", True), ("dummy", False)])
def test_a_hub_model_is_served_from_the_downloaded_folder(
    tiny_model: Path, load_format: str, weights: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted: list[str] = []

    def download(name: str, *, allow_patterns: list[str], **_: object) -> str:
        wanted.extend(allow_patterns)
        return str(tiny_model)

    monkeypatch.setattr(files, "snapshot_download", download)
    model = resolve(named("some/model", load_format=load_format))
    assert (model.name, model.folder) == ("some/model", tiny_model)
    assert ("*.safetensors" in wanted) is weights


def write_index(folder: Path, weight_map: object) -> int:
    return (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def cut(path: Path, by: int) -> int:
    """Take the last bytes off a file; returns how many are left."""
    return path.write_bytes(path.read_bytes()[:-by])


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: (folder / WEIGHTS).unlink(), "model.safetensors is missing"),
        (lambda folder: cut(folder / WEIGHTS, 1), "model.safetensors is damaged"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b""), "model.safetensors is damaged"),
        (
            lambda folder: (folder / WEIGHTS).write_text("version 1, a pointer"),
            "model.safetensors is damaged",
        ),
        (lambda folder: (shard(folder), cut(folder / INDEX, 1)), "index.json is damaged"),
        (lambda folder: (shard(folder), (folder / INDEX).write_text("[]")), "index.json is damaged"),
        (lambda folder: (shard(folder), write_index(folder, {})), "index.json is damaged"),
        (lambda folder: (shard(folder), write_index(folder, {NORM: 5})), "index.json is damaged"),
        (lambda folder: (shard(folder), write_index(folder, ["a"])), "index.json is damaged"),
        (lambda folder: (shard(folder), write_index(folder, {NORM: "x/y"})), "x/y is missing"),
        (lambda folder: (shard(folder), write_index(folder, {NORM: "."})), "is damaged"),
        (lambda folder: (shard(folder), write_index(folder, {NORM: "a\x00b"})), "is missing"),
        (lambda folder: (shard(folder), (folder / INDEX).write_text("[" * 10**5)), "index.json is damaged"),
        (lambda folder: (shard(folder), (folder / SECOND).unlink()), "second.safetensors is missing"),
        (lambda folder: (shard(folder), cut(folder / SECOND, 5000)), "second.safetensors is damaged"),
    ],
)
def test_damaged_files_are_refused_before_any_weight_is_read(
    folder: Path, damage: Callable[[Path], object], sentence: str
) -> None:
    damage(folder)
    with pytest.raises(ConfigError, match=sentence):
        resolve(named(folder))
    assert resolve(named(folder, load_format="dummy")).folder == folder, "dummy weights need no files"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop(NORM), f"lack {NORM}"),
        (lambda t: t.pop("lm_head.weight"), "lack lm_head.weight"),
        (lambda t: t.update(extra=torch.ones(1)), "have extra, which is not part of it"),
        (lambda t: t.update({NORM: torch.ones(32)}), rf"have {NORM} as \[32\] in place of \[64\]"),
        (lambda t: t.update({NORM: t[NORM].to(torch.int8)}), f"have {NORM} in the type int8"),
        (
            lambda t: t.update({NORM: t[NORM].to(torch.float8_e4m3fn)}),
            f"have {NORM} in the type float8_e4m3fn",
        ),
        (lambda t: t[NORM].__setitem__(3, float("nan")), f"{NORM} holds values that are not finite"),
        (lambda t: t["model.layers.2.mlp.up_proj.weight"].neg_().div_(0.0), "up_proj.weight holds values"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    folder: Path, change: Callable[[dict[str, Tensor]], object], sentence: str
) -> None:
    edit_weights(folder, change)
    model = resolve(named(folder))
    with pytest.raises(ConfigError, match=sentence):
        load_decoder(model)


def test_a_weight_that_its_own_index_forgets_is_refused(folder: Path) -> None:
    weight_map = shard(folder)
    tensors = load_file(folder / SECOND)
    del tensors[NORM], weight_map[NORM]
    save_file(tensors, folder / SECOND, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    model = resolve(named(folder))
    with pytest.raises(ConfigError, match=f"lack {NORM}"):
        load_decoder(model)


def test_weights_too_large_for_float16_are_refused(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors[NORM].fill_(1e5))
    load_decoder(resolve(named(folder, dtype="float32")))
    with pytest.raises(ConfigError, match=r"not finite in float16; .*another --dtype"):
        load_decoder(resolve(named(folder, dtype="float16")))


def test_files_that_vanish_after_the_check_are_refused(folder: Path) -> None:
    model = resolve(named(folder))
    (folder / WEIGHTS).unlink()
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_decoder(model)


def test_shards_load_like_one_file_and_stay_untouched(
    folder: Path, tiny_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shard(folder)
    decoder = load_decoder(resolve(named(folder)))
    expected = hidden_states(load_decoder(resolve(named(tiny_model))))
    for file in folder.glob("*.safetensors"):
        with open(file, "r+b") as mapped:  # a replaced file must not reach the running model
            mapped.write(b"\xff" * file.stat().st_size)
    assert torch.equal(hidden_states(decoder), expected)
    assert capfd.readouterr().err == "", "no progress bar where no one looks"


@pytest.mark.parametrize("eps", [float("nan"), float("inf"), -1e-6, "1e-6"])
def test_a_norm_that_cannot_be_computed_is_refused(folder: Path, eps: float | str) -> None:
    """Before a worker is told of it."""
    edit_config(folder, rms_norm_eps=eps)
    with pytest.raises(ConfigError, match="rms_norm_eps"):
        resolve(named(folder))


def test_files_may_have_what_old_ones_had(folder: Path, tiny_model: Path) -> None:
    """RoPE's frequencies, which are computed; weights in another type."""
    expected = hidden_states(load_decoder(resolve(named(tiny_model))))
    old = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in range(4)}
    edit_weights(folder, lambda tensors: tensors.update(old))
    assert torch.equal(hidden_states(load_decoder(resolve(named(folder)))), expected)
    edit_weights(folder, lambda tensors: tensors.update({n: t.double() for n, t in tensors.items()}))
    assert torch.equal(hidden_states(load_decoder(resolve(named(folder)))), expected)


def test_a_tied_head_that_is_in_the_file_as_well_is_left_alone(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=True)
    weights = load_decoder(resolve(named(folder)))._weights
    assert weights.head is weights.embedding


def test_tied_weights_are_held_once(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=True)
    edit_weights(folder, lambda tensors: tensors.pop("lm_head.weight"))
    weights = load_decoder(resolve(named(folder)))._weights
    assert weights.head is weights.embedding


def test_dummy_weights_are_those_of_the_seed_and_need_no_files(folder: Path) -> None:
    (folder / WEIGHTS).unlink()

    def made(**options: Any) -> Tensor:
        return hidden_states(load_decoder(resolve(named(folder, load_format="dummy", **options))))

    first = made(seed=7)
    assert first.isfinite().all()
    assert torch.equal(made(seed=7), first)
    assert not torch.allclose(made(seed=8), first)
    assert made(seed=7, dtype="bfloat16").isfinite().all()


def test_the_default_model_resolves_without_a_network(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    model = resolve(ModelConfig(device="cpu", max_model_len=2048))
    assert model.folder == smollm2
    assert model.max_model_len == 2048
    tokenizer = Tokenizer(model.folder, model.vocab_size)
    text = "Der Käse kostet 3 €. 🧀\n    def f(x): ..."
    assert tokenizer.decode(tokenizer.encode(Text(text), 100)) == text
    assert tokenizer.decode(tokenizer.eos) == ""


def test_without_its_package_the_default_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_model, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"not installed; run `make setup` or .* --model"):
        resolve(ModelConfig(device="cpu"))


@pytest.mark.usefixtures("smollm2")
def test_a_cache_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CLO_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ConfigError, match="set CLO_CACHE to a folder"):
        resolve(ModelConfig(device="cpu"))
