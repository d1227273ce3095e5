"""Opening checkpoints: one safetensors file, or the shards that an index names."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from memtile.checkpoints.header import NO_GGUF, NO_PICKLES, parse_json
from memtile.checkpoints.stored import StoredFile, StoredTensor
from memtile.errors import ArgumentError, CheckpointError

OnePath = str | os.PathLike[str]
Paths = OnePath | Sequence[OnePath]
"""A checkpoint, or several without a common tensor name."""

SUFFIX: Final = ".safetensors"
INDEX_SUFFIX: Final = ".safetensors.index.json"
PARTIAL: Final = ".partial-"
_A_SOURCE: Final = "a folder or a .safetensors file, or a list of them"
_HUB_NAME: Final = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_SHARD: Final = re.compile(r".*-\d{5,}-of-\d{5,}" + re.escape(SUFFIX))
_PICKLES: Final = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
_WEIGHTS: Final = _PICKLES | {SUFFIX, ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".npz", ".tflite"}
_TEMPLATES: Final = "additional_chat_templates"  # the only folder in a checkpoint's folder
_OF_TOKENIZER: Final = (
    *("*token*.json", "tokenizer.*", "vocab*", "merges*", "*.model", "*.tiktoken", "*.spm"),
    *("*.jinja", "chat_template*", "*processor_config.json", "special_tokens_map.json"),
    *("*.py", "LICENSE*", "NOTICE*"),
)


class Checkpoint(dict[str, StoredTensor]):
    """The tensors of a checkpoint by their names; made by `Checkpoint.open` or `Checkpoint.of`.

    `paths` are those that were opened, `path` the first of them, `files` the files with tensors.
    """

    def __init__(self, paths: Sequence[Path], tensors: Iterable[StoredTensor]) -> None:
        super().__init__((tensor.entry.name, tensor) for tensor in tensors)
        self.path, self.paths = paths[0], tuple(paths)
        self.files = tuple(dict.fromkeys(tensor.file for tensor in self.values()))

    @classmethod
    def of(cls, paths: Paths) -> "Checkpoint":
        """All tensors of one checkpoint, or of several together; no name may be in two of them."""
        if isinstance(paths, str | bytes) or not isinstance(paths, Sequence):
            paths = [paths]
        opened = [cls.open(as_path("checkpoint", path, _A_SOURCE)) for path in paths]
        if not opened:
            raise CheckpointError("checkpoint=[] names no source: give a folder or a file")
        holders: dict[str, Path] = {}
        for checkpoint in opened:
            for name in checkpoint:
                if name in holders:
                    raise CheckpointError(
                        f"{name} is in {holders[name]} and in {checkpoint.path}; keep it in one"
                    )
                holders[name] = checkpoint.path
        tensors = (tensor for checkpoint in opened for tensor in checkpoint.values())
        return cls([checkpoint.path for checkpoint in opened], tensors)

    @classmethod
    def open(cls, path: OnePath, stem: str = "model") -> "Checkpoint":
        """The checkpoint in a folder, of one file, or of an index.

        Args:
            path: a folder, a `.safetensors` file or a `.safetensors.index.json`.
            stem: of the file's name in a folder; without such a file a single other one is taken.

        Raises:
            CheckpointError: there is none, more than one, or one that is not whole. Pickles are
                never loaded.
        """
        place = Path(path)
        try:
            found = _found_in(place, stem) if place.is_dir() else place
        except OSError as error:
            raise CheckpointError(f"{place} cannot be read ({error.strerror})") from error
        if found.name.endswith(INDEX_SUFFIX):
            return cls([place], _indexed(found))
        _check_suffix(found)
        file = StoredFile(found)
        return cls([place], (StoredTensor(file, entry) for entry in file.entries.values()))

    @property
    def where(self) -> str:
        """The paths, for messages."""
        return " and ".join(map(str, self.paths))

    def check_sums(self) -> int:
        """Verify every tensor that has a checksum, or raise; gives how many these are."""
        return sum(tensor.check_sum() for tensor in self.values())


def as_path(name: str, given: object, what: str = "a folder, such as 'out'") -> Path:
    """The path that was given; ArgumentError for what is none, and for "", Path's "."."""
    if not isinstance(given, str | os.PathLike) or given == "":
        raise ArgumentError(f"{name}={given!r} is no path; give that of {what}")
    return Path(given)


def files_beside(folder: Path) -> dict[str, Path]:
    """The files of a checkpoint's folder without weights, by their names in it."""
    places = [*folder.iterdir(), *(folder / _TEMPLATES).glob("*.jinja")]
    return {
        str(path.relative_to(folder)): path
        for path in sorted(places)
        if path.is_file()
        and path.suffix not in _WEIGHTS
        and not path.name.endswith(".index.json")
        and not path.name.startswith(".")
        and PARTIAL not in path.name
    }


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """The files of the tokenizer, the processor and the model's own code."""
    return {
        name: path
        for name, path in files_beside(folder).items()
        if any(fnmatchcase(path.name, pattern) for pattern in _OF_TOKENIZER)
    }


def _found_in(folder: Path, stem: str) -> Path:
    for name in (stem + SUFFIX, stem + INDEX_SUFFIX):
        if (folder / name).exists():
            return folder / name
    indices = sorted(folder.glob("*" + INDEX_SUFFIX))
    files = sorted(folder.glob("*" + SUFFIX))
    lost = [path for path in files if _SHARD.fullmatch(path.name)]
    if lost and not indices:
        raise CheckpointError(
            f"{folder} holds {lost[0].name}, a shard, and no index that says what belongs to it: "
            "the checkpoint is not complete; copy or download its index, or save it again"
        )
    others = indices or files
    if len(others) == 1:
        return others[0]
    if others:
        raise CheckpointError(
            f"{folder} holds {len(others)} checkpoints, {others[0].name} and {others[1].name} "
            "among them; give the file that is meant"
        )
    raise CheckpointError(_why_none(folder))


def _why_none(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    partial = [name for name in names if PARTIAL in name]
    if partial:
        return f"{folder} holds {partial[0]}, half-written, and no checkpoint: save it again"
    pickles = [name for name in names if Path(name).suffix in _PICKLES]
    if pickles:
        return f"{folder} holds {pickles[0]} and no .safetensors: {NO_PICKLES}"
    packed = [name for name in names if Path(name).suffix == ".gguf"]
    if packed:
        return f"{folder} holds {packed[0]} and no .safetensors: {NO_GGUF}"
    return (
        f"{folder} holds no .safetensors file; give a folder that save_pretrained or "
        "memtile.save_checkpoint wrote"
    )


def way_to(path: Path, otherwise: str = "give a folder or a .safetensors file") -> str:
    """What to do where nothing is at a path: a name on the Hub may be meant."""
    if not _HUB_NAME.fullmatch(str(path)):
        return otherwise
    return (
        "nothing is downloaded here: if it is a name on the Hub, call "
        f"hf download {path} --local-dir {path.name}, and give that folder"
    )


def _check_suffix(path: Path) -> None:
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; {way_to(path)}")
    if path.suffix in _PICKLES:
        raise CheckpointError(f"{path} may be a pickle: {NO_PICKLES}")
    if path.suffix == ".gguf":
        raise CheckpointError(f"{path} is a GGUF file, and safetensors are read here: {NO_GGUF}")


def _indexed(index: Path) -> Iterator[StoredTensor]:
    places = _weight_map(index)
    files = {name: _shard(index, name) for name in sorted(set(places.values()))}
    for name, shard in places.items():
        entry = files[shard].entries.get(name)
        if entry is None:
            raise CheckpointError(
                f"{index} says that {shard} holds {name!r}, and it does not: index and shards are "
                "not of one checkpoint; take another copy of all of them"
            )
        yield StoredTensor(files[shard], entry)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        places = parse_json(index.read_bytes())["weight_map"]
        if not all(isinstance(word, str) for pair in places.items() for word in pair):
            raise TypeError("its weight_map must name a file for each tensor")
    except OSError as error:
        raise CheckpointError(f"{index} cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{index} is no index of a checkpoint ({type(error).__name__}: {error}); take another "
            "copy of it"
        ) from error
    return dict(places)


def _shard(index: Path, name: str) -> StoredFile:
    path = index.parent / name
    if Path(name).name != name:
        raise CheckpointError(f"{index} names {name!r}: a shard must lie in the index's own folder")
    if not path.exists():
        raise CheckpointError(
            f"{index} names {name}, which is not there: the checkpoint is not complete; copy or "
            "download the missing shard"
        )
    return StoredFile(path)
