"""transformers: its classes of linears and embeddings, names, ties, and models from its configs."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from memtile.convert import Integration, Kind, Naming, empty_model, in_own_names
from memtile.errors import ArgumentError
from memtile.geometry import Grid
from memtile.homes import Home
from memtile.integrations.configs import configs_of, made_from
from memtile.integrations.experts import stacks_of
from memtile.integrations.pretrained import (
    architecture,
    auto_class,
    check_files,
    code_of,
    dtype_of,
    heads_of,
    initialise,
    keep_in_float32,
    new_names,
    pretrained_models,
    refuse_quantized,
    relevant,
)
from memtile.integrations.resizing import patch_resizing
from memtile.integrations.saving import loaded_class, save_pretrained, with_tiles
from memtile.integrations.step_inputs import step_work
from memtile.integrations.weight_conversion import in_model_names, in_stored_names
from memtile.layers import TiledEmbedding, TiledLinear, TiledModule


class TiledConv1D(TiledLinear):
    """The tiled form of transformers' `Conv1D`, a linear that keeps its weight as (in, out)."""

    acts_as: ClassVar[type[nn.Module]] = TiledLinear
    weight_is_transposed: ClassVar[bool] = True

    @property
    def nf(self) -> int:
        """Output features, as `Conv1D` names them."""
        return self.out_features

    @property
    def nx(self) -> int:
        """Input features, as `Conv1D` names them."""
        return self.in_features

    def to_dense(self, weight: nn.Parameter | None = None) -> nn.Module:
        """The dense `Conv1D`, with `weight` where it is tied."""
        with torch.device("meta"):
            dense: nn.Module = _conv1d()(self.out_features, self.in_features)
        self.hand_over(dense, weight)
        return dense

    def forward(self, x: Any) -> Any:  # type: ignore[override]  # Conv1D has one name for it
        """(…, nf) of (…, nx)."""
        return super().forward(x)


class TiledFalconLinear(TiledLinear):
    """The tiled form of `FalconLinear`, an `nn.Linear` that adds its bias after the product."""

    acts_as: ClassVar[type[nn.Module]] = TiledLinear

    def to_dense(self, weight: nn.Parameter | None = None) -> nn.Module:
        """The dense `FalconLinear`, with `weight` where it is tied."""
        with torch.device("meta"):
            dense: nn.Module = _falcon()(self.in_features, self.out_features, self.use_bias)
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
        """The dense embedding, of the model's own class, with `weight` where it is tied."""
        with torch.device("meta"):
            dense = self.dense_class(self.num_embeddings, self.embedding_dim, self.padding_idx)
        _move_scale(self, dense)
        self.hand_over(dense, weight)
        return dense

    def forward(self, input_ids: Tensor) -> Tensor:
        """The scaled rows of the ids."""
        rows = super().forward(input_ids)
        scale = self.embed_scale
        return rows * (scale.to(self.weight.dtype) if isinstance(scale, Tensor) else scale)


def _move_scale(source: nn.Module, target: nn.Module) -> None:
    """Copy the scale, a buffer or a number."""
    for name in ("embed_scale", "scalar_embed_scale"):
        if name in source._buffers:
            target.register_buffer(name, source._buffers[name], persistent=False)
        elif hasattr(source, name):
            setattr(target, name, getattr(source, name))


def _conv1d() -> Any:
    return loaded_class("transformers.pytorch_utils", "Conv1D")


def _falcon() -> Any:
    return loaded_class("transformers.models.falcon.modeling_falcon", "FalconLinear")


def _is_scaled_embedding(module: nn.Module) -> bool:
    """Whether its class does `super().forward(ids) * embed_scale` and nothing else."""
    cls = type(module)
    return (
        isinstance(module, nn.Embedding)
        and cls.__name__.endswith("ScaledWordEmbedding")
        and cls.__module__.startswith("transformers.models.")
        and cls.__bases__ == (nn.Embedding,)
        and hasattr(module, "embed_scale")
    )


def patch_transformers() -> None:
    """Have models with tiles save and load dense checkpoints, be resized and keep their ties."""
    cls = loaded_class("transformers.modeling_utils", "PreTrainedModel")
    if cls != ():
        with_tiles(cls, "save_pretrained", save_pretrained)
        with_tiles(cls, "load_state_dict", _load_state_dict)
        patch_resizing()


def _load_state_dict(
    original: Callable[..., Any], model: Any, state_dict: Any, *args: Any, **kwargs: Any
) -> Any:
    """Load also what `save_pretrained` writes, which is how the Trainer resumes."""
    return original(model, in_own_names(model, state_dict), *args, **kwargs)


def _naming(model: nn.Module) -> Naming | None:
    """`from_pretrained`'s and `save_pretrained`'s rules for names and layouts."""
    if model not in pretrained_models(model):
        return None
    found: Any = model  # a PreTrainedModel, which is not imported here
    return Naming(
        renamed=partial(in_model_names, found),
        written=partial(in_stored_names, found),
        relevant=partial(relevant, found),
        made=partial(new_names, found),
    )


def _replaced(old: nn.Module, new: nn.Module) -> None:
    """Keep transformers' mark of initialised modules, so that `init_weights` skips them."""
    if getattr(old, "_is_hf_initialized", False):
        for module in new.modules():
            module._is_hf_initialized = True  # type: ignore[assignment]  # transformers' own mark


def _empty(source: object, dtype: torch.dtype | None) -> nn.Module | None:
    """The model of a config or a folder, without values."""
    try:
        import transformers
    except ImportError:
        return None
    config: Any = source
    folder = Path(source) if isinstance(source, str | Path) else None
    if folder is not None:
        try:
            config = transformers.AutoConfig.from_pretrained(
                source, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArgumentError(_why_no_config(folder, error)) from error
    if not isinstance(config, transformers.PretrainedConfig):
        return None
    refuse_quantized(config.to_dict(), type(config).__name__ if folder is None else folder)
    try:
        model: nn.Module = empty_model(_factory(config, dtype or dtype_of(config, folder)))
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise ArgumentError(f"no model can be made of {type(config).__name__}: {error}") from error
    return model


def _why_no_config(folder: Path, error: Exception) -> str:
    code = code_of(folder)
    if code and "trust_remote_code" in str(error):
        return (
            f"{str(folder)!r} needs Python code from that folder, and none is run here: {code}; "
            "read it, and give memtile.plan the model that memtile.empty_model makes of it: "
            "AutoConfig.from_pretrained and AutoModel….from_config, with trust_remote_code=True"
        )
    return (
        f"{str(folder)!r}: transformers cannot read its config.json "
        f"({str(error).partition(chr(10))[0]}): take another copy of it"
    )


def _factory(config: Any, dtype: torch.dtype) -> Callable[[], nn.Module]:
    """Makes the class that the config names, or else one that writes text where possible."""
    import transformers

    named = architecture(config)
    if named is not None:
        return lambda: named._from_config(config, dtype=dtype)
    kind: Any = auto_class(config) or transformers.AutoModel
    return lambda: kind.from_config(config, dtype=dtype, trust_remote_code=False)


TRANSFORMERS = Integration(
    library="transformers",
    kinds=(
        Kind(
            name="transposed linear",
            matches=lambda module: type(module) is _conv1d(),
            resembles=lambda module: isinstance(module, _conv1d()),
            tiled=TiledConv1D,
            shape=lambda module: (module.nf, module.nx),
        ),
        Kind(
            name="Falcon linear",
            matches=lambda module: type(module) is _falcon(),
            resembles=lambda module: isinstance(module, _falcon()),
            tiled=TiledFalconLinear,
            shape=lambda module: (module.out_features, module.in_features),
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
    stacks=stacks_of,
    replaced=_replaced,
    naming=_naming,
    beside=configs_of,
    read_from=made_from,
    empty=_empty,
    check_files=check_files,
    initialise=initialise,
    emptied=keep_in_float32,
    heads=heads_of,
    work=step_work,
)
