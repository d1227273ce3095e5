"""`Naming`: how the names of a library's checkpoints differ from those of its models."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from memtile.convert.streaming import TensorSource


@dataclass
class Renamed:
    """What a checkpoint has under a model's own names.

    Attributes:
        sources: the tensors, by the model's names; a checkpoint may hold more than the model.
        keys: the checkpoint's names that each of them is read from, by the same names.
        problems: what could not be given a name, or converted, a sentence each.
        loaded: to be called when the model has the values.
    """

    sources: dict[str, TensorSource] = field(default_factory=dict)
    keys: dict[str, list[str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    loaded: Callable[[], None] = lambda: None

    def add(self, name: str, key: str, source: TensorSource | None = None) -> None:
        """Note a tensor of the checkpoint under its name in the model; None: it has no values."""
        if name in self.sources:
            keys = ", ".join([*self.keys[name], key])
            self.problems.append(f"{name}: the checkpoint holds it twice, as {keys}; keep one")
            return
        self.keys.setdefault(name, []).append(key)
        if source is not None:
            self.sources[name] = source


def _as_they_are(stored: Mapping[str, TensorSource], wanted: object) -> Renamed:
    return Renamed(dict(stored), {key: [key] for key in stored})


@dataclass(frozen=True)
class Outward:
    """One dense tensor of a model that is to be written: its names, and its values."""

    names: tuple[str, ...]
    source: TensorSource


def _under_first_names(tensors: Sequence[Outward]) -> dict[str, TensorSource]:
    return {tensor.names[0]: tensor.source for tensor in tensors}


@dataclass(frozen=True)
class Naming:
    """How names in checkpoints of a library's models may differ from the model's own.

    Args:
        stored: the name, for `renamed`, of a name of the model.
        renamed: of the dense tensors of a checkpoint, and of the names that are looked for, each
            with a tensor on the meta device: what it has under the latter.
        written: of the model's dense tensors, in the order of its state dict, what its checkpoint
            has, by name, in its order.
        relevant: of the stored names that a checkpoint lacks and of those that it has besides, the
            ones that the library does not ignore.
        made: of stored names that a checkpoint lacks, those that no checkpoint of its class has
            and that the model initialises, as it does a new head.
        apart: whether a name of the model lies in a checkpoint of its own, as adapters do.
    """

    stored: Callable[[str], str] = str
    renamed: Callable[[Mapping[str, TensorSource], Mapping[str, Tensor]], Renamed] = _as_they_are
    written: Callable[[Sequence[Outward]], Mapping[str, TensorSource]] = _under_first_names
    relevant: Callable[[set[str], set[str]], tuple[set[str], set[str]]] = lambda *given: given
    made: Callable[[set[str]], set[str]] = lambda missing: set()
    apart: Callable[[str], bool] = lambda name: False
