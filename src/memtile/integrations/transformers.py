"""transformers: its transposed linear, its scaled embeddings, its dense checkpoints."""

import copy
import inspect
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from memtile.convert import Integration, Kind, Naming, Work, empty_model
from memtile.errors import ArgumentError
from memtile.geometry import Grid
from memtile.homes import Home
from memtile.integrations.dense_pretrained import DensePretrained
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


def _naming(model: nn.Module) -> Naming | None:
    """What `from_pretrained` knows of names: the base's prefix, what may be missing or extra."""
    if model not in _models(model):
        return None
    found: Any = model  # a PreTrainedModel, which is not imported here
    return Naming(
        prefix=found.base_model_prefix or "",
        optional=tuple(found._keys_to_ignore_on_load_missing or ()),
        ignored=tuple(found._keys_to_ignore_on_load_unexpected or ()),
    )


def _texts(model: nn.Module) -> dict[str, str]:
    """`config.json` and what else `save_pretrained` writes beside the weights."""
    if model not in _models(model):
        return {}
    found: Any = model  # a PreTrainedModel, which is not imported here
    config = copy.deepcopy(found.config)  # save_pretrained sets these on the model's own
    config.dtype = str(found.dtype).removeprefix("torch.")
    config.architectures = [type(found).__name__]
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        if found.can_generate():
            found.generation_config.save_pretrained(folder)
        return {path.name: path.read_text(encoding="utf-8") for path in Path(folder).iterdir()}


def _replaced(old: nn.Module, new: nn.Module) -> None:
    """Keep transformers' mark of what is initialised, so that `init_weights` draws nothing anew."""
    if getattr(old, "_is_hf_initialized", False):
        for module in new.modules():
            module._is_hf_initialized = True  # type: ignore[assignment]  # transformers' own mark


def _empty(source: object, dtype: torch.dtype | None) -> nn.Module | None:
    """The model of a config or a folder: a causal language model where it can be one."""
    try:
        import transformers
    except ImportError:
        return None
    config: Any = source
    if isinstance(source, str | Path):
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
    chosen = dtype or getattr(config, "dtype", None) or torch.float32
    try:
        model: nn.Module = empty_model(_factory(config, chosen))
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise ArgumentError(f"no model can be made of {type(config).__name__}: {error}") from error
    return model


def _factory(config: Any, dtype: torch.dtype) -> Callable[[], nn.Module]:
    """What makes the class that the config names, or a causal language model where it can be."""
    import transformers

    names = getattr(config, "architectures", None) or []
    named = getattr(transformers, str(names[0]), None) if names else None
    # What `AutoModel.from_config` calls has no public name.
    make: Any = getattr(named, "_from_config", None)
    if make is not None:
        return lambda: make(config, dtype=dtype)
    causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    kind: Any = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    return lambda: kind.from_config(config, dtype=dtype, trust_remote_code=False)


def _work(model: nn.Module, tokens: int, batch: int, trains: bool) -> Work | None:
    """A step of a language model: its loss, or the prompt's pass with a cache for what follows."""
    found = _models(model)
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

    def forward(twin: Any) -> Tensor | None:
        ids = (torch.arange(tokens) * max(1, vocabulary // tokens) % vocabulary).view(batch, -1)
        if trains:
            loss: Tensor = twin(input_ids=ids, labels=ids, use_cache=False).loss
            return loss
        keep = {"logits_to_keep": 1} if last else {}
        kept[:] = [twin(input_ids=ids, use_cache=True, **keep)]
        return None

    kept: list[Any] = []  # the cache lives on while text is generated
    return forward


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
    naming=_naming,
    texts=_texts,
    empty=_empty,
    work=_work,
)
