"""transformers: its classes of linears and embeddings, names, ties, and models from its configs."""

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from memtile.convert import Integration, Kind, Naming, Work, empty_model
from memtile.errors import ArgumentError
from memtile.geometry import Grid
from memtile.homes import Home
from memtile.integrations.configs import configs_of, made_from
from memtile.integrations.experts import stacks_of
from memtile.integrations.pretrained import (
    architecture,
    check_files,
    dtype_of,
    initialise,
    keep_in_float32,
    new_names,
    pretrained_models,
    refuse_quantized,
    relevant,
)
from memtile.integrations.resizing import patch_resizing
from memtile.integrations.saving import loaded_class, save_pretrained, with_tiles
from memtile.layers import TiledEmbedding, TiledLinear, TiledModule


class TiledConv1D(TiledLinear):
    """The tiled form of transformers' `Conv1D`, a linear that keeps its weight as (in, out)."""

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
    """Have models with tiles in them save dense checkpoints, be resized and keep their ties."""
    cls = loaded_class("transformers.modeling_utils", "PreTrainedModel")
    if cls != ():
        with_tiles(cls, "save_pretrained", save_pretrained)
        patch_resizing()


def _naming(model: nn.Module) -> Naming | None:
    """`from_pretrained`'s rules for names: the base's prefix, what may be missing or unexpected."""
    if model not in pretrained_models(model):
        return None
    found: Any = model  # a PreTrainedModel, which is not imported here
    return Naming(
        prefix=found.base_model_prefix or "",
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
            raise ArgumentError(
                f"{str(source)!r}: transformers cannot read its config.json "
                f"({str(error).partition(chr(10))[0]}); code of a folder is never run: make the "
                "model by yourself, on the meta device, and give memtile.plan that"
            ) from error
    if not isinstance(config, transformers.PretrainedConfig):
        return None
    refuse_quantized(config.to_dict(), type(config).__name__ if folder is None else folder)
    try:
        model: nn.Module = empty_model(_factory(config, dtype or dtype_of(config, folder)))
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise ArgumentError(f"no model can be made of {type(config).__name__}: {error}") from error
    return model


def _factory(config: Any, dtype: torch.dtype) -> Callable[[], nn.Module]:
    """Makes the class that the config names, or else a causal language model where possible."""
    import transformers

    named = architecture(config)
    if named is not None:
        return lambda: named._from_config(config, dtype=dtype)
    causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    kind: Any = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    return lambda: kind.from_config(config, dtype=dtype, trust_remote_code=False)


def _work(model: nn.Module, tokens: int, batch: int, trains: bool) -> Work | None:
    """One step of a language model: its loss, or the prompt's forward with a cache."""
    found = pretrained_models(model)
    if not found or not found[0].can_generate():
        return None
    config = found[0].config
    longest = getattr(config, "max_position_embeddings", None) or tokens
    if tokens // batch > longest:
        raise ArgumentError(
            f"tokens={tokens} in batch={batch}: sequences of {tokens // batch}, and "
            f"{type(found[0]).__name__} reads {longest} at once; give fewer tokens or more batch"
        )
    vocabulary = config.get_text_config().vocab_size
    last = "logits_to_keep" in inspect.signature(found[0].forward).parameters

    outputs: list[Any] = []  # their cache stays in memory while text is generated

    def forward(meta_copy: Any) -> Tensor | None:
        ids = (torch.arange(tokens) * max(1, vocabulary // tokens) % vocabulary).view(batch, -1)
        if trains:
            loss: Tensor = meta_copy(input_ids=ids, labels=ids, use_cache=False).loss
            return loss
        keep = {"logits_to_keep": 1} if last else {}
        outputs[:] = [meta_copy(input_ids=ids, use_cache=True, **keep)]
        return None

    return forward


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
    work=_work,
)
