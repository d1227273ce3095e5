"""The dense tensors of a model, each once, with all the names that it has."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from memtile.convert.kinds import kind_of
from memtile.geometry import Rect, Span
from memtile.layers import TiledModule, whole_shape
from memtile.optim import DenseParameter, Part, dense_parameters


@dataclass(frozen=True)
class ModelTensor:
    """One dense tensor of a model.

    Args:
        names: in the dense model; more than one where it is tied.
        dense: its shape and its parts.
        is_transposed: whether the dense tensor is the matrix transposed, as `Conv1D` keeps it.
    """

    names: tuple[str, ...]
    dense: DenseParameter
    is_transposed: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's tensor."""
        return self.dense.parts[0].parameter.dtype

    @property
    def matrix(self) -> DenseParameter:
        """The same with the shape (out, in) that tiles are cut from."""
        shape = self.dense.shape
        if len(shape) == 3:  # a stack: its matrices one below another
            return replace(self.dense, shape=torch.Size([shape[0] * shape[1], shape[2]]))
        if not self.is_transposed:
            return self.dense
        inside, out = shape
        whole = Rect(Span(0, inside), Span(0, out))
        parts = (
            Part(part.parameter, whole, True)
            if part.rect is None
            else Part(part.parameter, part.rect)
            for part in self.dense.parts
        )
        return DenseParameter(self.dense.name, torch.Size([out, inside]), tuple(parts))


def tensors_of(model: nn.Module) -> list[ModelTensor]:
    """The dense parameters of a model and its persistent buffers, each once, in its order."""
    names, transposed = _names(model)
    needed = []
    for dense in dense_parameters(model):
        first = dense.parts[0]
        if first.rect is None:  # ZeRO-3's partitions are empty
            dense = replace(dense, shape=torch.Size(whole_shape(first.parameter)))
        own_names = tuple(names[first.parameter])
        needed.append(ModelTensor(own_names, dense, first.parameter in transposed))
    buffers: dict[Tensor, list[str]] = defaultdict(list)
    for name, buffer in persistent_buffers(model):
        buffers[buffer].append(name)
    for buffer, found in buffers.items():
        part = Part(buffer)  # type: ignore[arg-type]  # values move alike
        needed.append(ModelTensor(tuple(found), DenseParameter(found[0], buffer.shape, (part,))))
    return needed


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that a state dict has, under every name."""
    return ((name, buffer) for name, buffer, kept in _buffers(model) if kept)


def computed_buffers(model: nn.Module) -> set[str]:
    """Names of the buffers that no state dict has."""
    return {name for name, _, kept in _buffers(model) if not kept}


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    for path, module in model.named_modules(remove_duplicate=False):
        for own, buffer in module._buffers.items():
            if buffer is not None:
                yield _join(path, own), buffer, own not in module._non_persistent_buffers_set


def _names(model: nn.Module) -> tuple[dict[Tensor, list[str]], set[Tensor]]:
    """Names of each dense tensor by its first part, and which of them are transposed."""
    names: dict[Tensor, list[str]] = defaultdict(list)
    transposed: set[Tensor] = set()
    tiles: set[Tensor] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, TiledModule):
            held = {own: [*module.tile_parameters(own).values()] for own in ("weight", "bias")}
            tiles.update(p for parts in held.values() for p in parts if p is not module.whole_bias)
        else:
            own_parameters = module._parameters.items()
            held = {own: [p] for own, p in own_parameters if p is not None and p not in tiles}
        for own, parts in held.items():
            if parts:
                is_tiled = isinstance(module, TiledModule)
                names[parts[0]].append((module.dense_name if is_tiled else _join)(path, own))
                if own == "weight" and _is_transposed(module):
                    transposed.add(parts[0])
    return names, transposed


def _is_transposed(module: nn.Module) -> bool:
    if isinstance(module, TiledModule):
        return module.weight_is_transposed
    kind = kind_of(module)
    return kind is not None and kind.matches(module) and kind.tiled.weight_is_transposed


def _join(path: str, own: str) -> str:
    return f"{path}.{own}" if path else own
