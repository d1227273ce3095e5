"""transformers: its transposed linear, its scaled embeddings, its dense checkpoints."""

import sys
import weakref
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from memtile.convert import Integration, Kind, dense_items
from memtile.geometry import Grid
from memtile.homes import Home
from memtile.layers import TiledEmbedding, TiledLinear, TiledModule


class TiledConv1D(TiledLinear):
    """The tiled form of transformers' `Conv1D`, a linear that keeps its weight as (in, out)."""

    weight_is_transposed: ClassVar[bool] = True

    @property
    def nf(self) -> int:
        """Output features, by their name in `Conv1D`."""
        return self.out_features

    @property
    def nx(self) -> int:
        """Input features, by their name in `Conv1D`."""
        return self.in_features

    def to_dense(self, weight: nn.Parameter | None = None) -> nn.Module:
        """The `Conv1D` that this layer stands for, with `weight` where it is tied."""
        with torch.device("meta"):
            dense: nn.Module = _loaded("pytorch_utils").Conv1D(self.out_features, self.in_features)
        self.hand_over(dense, weight)
        return dense


class TiledScaledWordEmbedding(TiledEmbedding):
    """The tiled form of an embedding whose rows are multiplied by `embed_scale` (Gemma, BART)."""

    dense_class: type[nn.Embedding]
    embed_scale: Tensor | float

    @classmethod
    def from_dense(
        cls,
        dense: nn.Module,
        grid: Grid,
        tied_to: TiledModule | None = None,
        home: Home | None = None,
    ) -> "TiledScaledWordEmbedding":
        """The tiled form of a transformers `…ScaledWordEmbedding`."""
        layer = super().from_dense(dense, grid, tied_to, home)
        layer.dense_class = type(dense)  # type: ignore[assignment]  # an embedding's
        _move_scale(dense, layer)
        return layer

    def to_dense(self, weight: nn.Parameter | None = None) -> nn.Module:
        """The embedding of the model's own class, with `weight` where it is tied."""
        with torch.device("meta"):
            dense = self.dense_class(self.num_embeddings, self.embedding_dim, self.padding_idx)
        _move_scale(self, dense)
        self.hand_over(dense, weight)
        return dense

    def forward(self, input: Tensor) -> Tensor:
        """The scaled rows of the ids."""
        rows = super().forward(input)
        scale = self.embed_scale
        return rows * (scale.to(self.weight.dtype) if isinstance(scale, Tensor) else scale)


def _move_scale(source: nn.Module, target: nn.Module) -> None:
    """Put the scale, a buffer or a number, where the other class keeps it."""
    for name in ("embed_scale", "scalar_embed_scale"):
        if name in source._buffers:
            target.register_buffer(name, source._buffers[name], persistent=False)
        elif hasattr(source, name):
            setattr(target, name, getattr(source, name))


class DensePretrained:
    """`save_pretrained` of a tiled model: the dense checkpoint, for plain transformers.

    It stands on the instance, where it may not hold the model: a cycle would keep all weights until
    the garbage collector runs. Copies and pickles of a model get one of their own.

    Args:
        model: a `PreTrainedModel` with tiled layers.
    """

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)

    def __reduce__(self) -> tuple[Any, ...]:
        return DensePretrained, (self._model(),)

    def __call__(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Write the folder. The dense weights exist for as long as transformers writes them.

        Args:
            save_directory: the folder.
            is_main_process: passed on to transformers.
            state_dict: tile names and others, as a trainer passes it; the model's own by default.
            *args: passed on to transformers.
            **kwargs: passed on to transformers.

        Raises:
            CannotTileError: a tile computes its weight, so that no dense checkpoint can say it.
        """
        model = self._model()
        assert model is not None  # who calls a method holds its model
        tiles = model.state_dict() if state_dict is None else state_dict
        dense: dict[str, Any] = {}
        known: dict[tuple[Any, ...], Any] = {}
        for name, tensor in dense_items(model, tiles):
            key = _tile_storages(model, name) or (id(tensor),)
            dense[name] = known.setdefault(key, tensor)
        save = type(model).save_pretrained
        return save(model, save_directory, is_main_process, dense, *args, **kwargs)


def _tile_storages(model: nn.Module, name: str) -> tuple[Any, ...]:
    """What tells a tied tiled weight from another: the identities of its tiles."""
    parent, _, own = name.rpartition(".")
    try:
        layer = model.get_submodule(parent)
    except AttributeError:
        return ()
    if not isinstance(layer, TiledModule):
        return ()
    return (own, layer.weight_is_transposed, *(id(p) for p in layer.tile_parameters(own).values()))


def _loaded(module: str) -> Any:
    """A module of transformers, when something has loaded it."""
    return sys.modules.get(f"transformers.{module}")


def _is_conv1d(module: nn.Module) -> bool:
    utils = _loaded("pytorch_utils")
    return utils is not None and type(module) is utils.Conv1D


def _derives_from_conv1d(module: nn.Module) -> bool:
    utils = _loaded("pytorch_utils")
    return utils is not None and isinstance(module, utils.Conv1D)


def _is_scaled_embedding(module: nn.Module) -> bool:
    """The family of classes that do `super().forward(ids) * embed_scale` and nothing else."""
    cls = type(module)
    return (
        isinstance(module, nn.Embedding)
        and cls.__name__.endswith("ScaledWordEmbedding")
        and cls.__module__.startswith("transformers.models.")
        and cls.__bases__ == (nn.Embedding,)
        and hasattr(module, "embed_scale")
    )


def _models(model: nn.Module) -> list[Any]:
    modeling = _loaded("modeling_utils")
    return [m for m in model.modules() if modeling and isinstance(m, modeling.PreTrainedModel)]


def _tiled(model: nn.Module) -> None:
    for found in _models(model):
        if any(isinstance(module, TiledModule) for module in found.modules()):
            found.save_pretrained = DensePretrained(found)


def _untiled(model: nn.Module) -> None:
    for found in _models(model):
        vars(found).pop("save_pretrained", None)


def _replaced(old: nn.Module, new: nn.Module) -> None:
    """Keep transformers' mark of what is initialised, so that `init_weights` draws nothing anew."""
    if getattr(old, "_is_hf_initialized", False):
        for module in new.modules():
            module._is_hf_initialized = True  # type: ignore[assignment]  # transformers' own mark


TRANSFORMERS = Integration(
    kinds=(
        Kind(
            name="transposed linear",
            matches=_is_conv1d,
            resembles=_derives_from_conv1d,
            tiled=TiledConv1D,
            shape=lambda module: (module.nf, module.nx),
        ),
        Kind(
            name="scaled embedding",
            matches=_is_scaled_embedding,
            resembles=_is_scaled_embedding,
            tiled=TiledScaledWordEmbedding,
            shape=lambda module: (module.num_embeddings, module.embedding_dim),
            rows_only=True,
        ),
    ),
    replaced=_replaced,
    tiled=_tiled,
    untiled=_untiled,
)
