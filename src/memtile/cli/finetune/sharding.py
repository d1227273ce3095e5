"""A model in tiles that an engine holds as shards, with its optimizer, for a run over ranks."""

import logging
import math
import os
import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import CosineAnnealingLR

import memtile
from memtile.cli.errors import CommandError
from memtile.cli.finetune.settings import Settings
from memtile.engines.dense_files import load_checkpoint
from memtile.engines.torch_fsdp2 import shard
from memtile.engines.zero3_config import check_installed
from memtile.errors import ArgumentError, NotFiniteError
from memtile.optim import is_finite
from memtile.planning import format_byte_size


class Sharded(ABC):
    """What a rank trains.

    Args:
        model: of transformers, in tiles, its parameters on the meta device.

    Attributes:
        model: with values, in shards.
        optimizer: AdamW; what steps the shards.
        scheduler: down to 0 along a cosine.
        device: that the rank works on.
        saved_dtype: that the model's checkpoint had.
    """

    scheduler: CosineAnnealingLR

    def __init__(self, model: Any) -> None:
        self.model = model
        self.saved_dtype: torch.dtype = next(model.parameters()).dtype
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.optimizer: Any = None  # torch's, or DeepSpeed's around it

    @abstractmethod
    def loss(self, ids: Tensor) -> Tensor:
        """Of the sequences (batch, tokens), which are their own labels."""

    @abstractmethod
    def update(self, loss: Tensor) -> None:
        """One step along the mean of all ranks' losses.

        Raises:
            NotFiniteError: a gradient is not finite, on every rank; nothing was stepped.
        """


class Fsdp2(Sharded):
    """Under PyTorch's FSDP2: weights, gradients and moments are float32.

    What has 16 bits in the checkpoint is worked on in 16 bits.
    """

    def __init__(self, model: Any, settings: Settings, *, offload: bool, strict: bool) -> None:
        super().__init__(model.float())
        dtype: torch.dtype = model.config.dtype or torch.float32
        self.saved_dtype = dtype
        mixed = MixedPrecisionPolicy(
            param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32
        )
        pinned = CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
        shard(model, mp_policy=mixed, offload_policy=pinned if offload else OffloadPolicy())
        device = "cpu" if offload else self.device
        load_checkpoint(model, Path(settings.model), device=device, strict=strict)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr)
        self.scheduler = CosineAnnealingLR(self.optimizer, settings.steps)
        model.train()

    def loss(self, ids: Tensor) -> Tensor:
        """Of the model itself."""
        self.optimizer.zero_grad()
        loss: Tensor = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        return loss

    def update(self, loss: Tensor) -> None:
        """Backward and step, as of any model."""
        loss.backward()
        _check_shards(self.model)
        self.optimizer.step()
        self.scheduler.step()


class Zero3(Sharded):
    """Under DeepSpeed's ZeRO-3: in the checkpoint's dtype, with float32 masters of 16 bits."""

    def __init__(self, model: Any, settings: Settings, *, offload: bool, strict: bool) -> None:
        super().__init__(model.to(next(model.parameters()).dtype))  # DeepSpeed takes one dtype
        import deepspeed

        from memtile.engines.deepspeed_zero3 import config, from_checkpoint, hold

        place = "cpu" if offload else None
        given = config(model, offload_param=place, offload_optimizer=place)
        from_checkpoint(model, Path(settings.model), given, strict=strict)
        adamw = torch.optim.AdamW(model.parameters(), lr=settings.lr)
        model.train()
        self._engine = hold(deepspeed.initialize(model=model, optimizer=adamw, config=given)[0])
        self.optimizer = self._engine.optimizer
        self.scheduler = CosineAnnealingLR(adamw, settings.steps)

    def loss(self, ids: Tensor) -> Tensor:
        """Of the engine, which prepares its backward."""
        loss: Tensor = self._engine(input_ids=ids, labels=ids, use_cache=False).loss
        return loss

    def update(self, loss: Tensor) -> None:
        """Backward and step of the engine, which skips gradients that are not finite."""
        self._engine.backward(loss)
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        if self.saved_dtype != torch.float16 and norm is not None and not math.isfinite(norm):
            raise NotFiniteError("the norm of the gradients is not finite; nothing was stepped")
        self.scheduler.step()


def _check_shards(model: nn.Module) -> None:
    """Look at the gradients that all ranks are about to step with."""
    bad = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not is_finite(_local(parameter.grad))
    ]
    count = torch.tensor(len(bad))
    dist.all_reduce(count)
    if count:
        whose = bad[0] if bad else "a shard of another rank"
        raise NotFiniteError(f"the gradient of {whose} is not finite; nothing was stepped")


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def sharded(
    model: Any,  # of transformers, which is not imported to name its type
    settings: Settings,
    tile_bytes: int,
    *,
    offload: bool,
    strict: bool,
) -> Sharded:
    """Tile, shard and load a model that has no values yet.

    Args:
        model: its parameters on the meta device.
        settings: of the run; its engine too.
        tile_bytes: the most that a tile has.
        offload: keep shards, gradients and moments in host memory.
        strict: refuse files that hold more than the model has.

    Raises:
        EngineError: the engine is missing, or ranks differ.
        CommandError: nothing is larger than a tile.
        CheckpointError: the model's files are damaged, or of another model.
    """
    memtile.tile(model, max_tile_bytes=tile_bytes)
    try:
        if settings.engine == "zero3":
            return Zero3(model, settings, offload=offload, strict=strict)
        return Fsdp2(model, settings, offload=offload, strict=strict)
    except ArgumentError as error:
        raise CommandError(
            f"--tile {format_byte_size(tile_bytes)}: no layer of the model is larger, so nothing "
            "is tiled: give less."
        ) from error


def load_engine(name: str) -> None:
    """Import an engine, and have it print nothing but warnings.

    Raises:
        EngineError: it is not installed.
    """
    if name != "zero3":
        return
    check_installed()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning)  # its use of torch
    import deepspeed  # noqa: F401  # before memory is measured

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
