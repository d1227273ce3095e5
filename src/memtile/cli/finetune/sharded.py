"""The model of a run over several ranks: its tiles are shards of FSDP2 or ZeRO-3."""

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LRScheduler

import memtile
from memtile.cli import models
from memtile.cli.errors import CommandError
from memtile.cli.finetune.backend import Backend, schedule_of
from memtile.cli.finetune.settings import Options, TrainingSettings
from memtile.costmodel import format_byte_size
from memtile.engines import dense_files
from memtile.engines.ranks import Ranks, check_agreement, of_all_ranks
from memtile.engines.torch_fsdp2 import shard
from memtile.engines.zero3_config import check_installed
from memtile.errors import ArgumentError, NotFiniteError
from memtile.optim import is_finite


class _Fsdp2(Backend):
    """Under FSDP2: weights, gradients and moments in float32."""

    def check_gradients(self) -> None:
        """On every rank, where a gradient of any rank is not finite."""
        check_shards(self.model)

    def clip_gradients(self, limit: float) -> float:
        """The norm is that of the whole gradients, of all ranks."""
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


class _Zero3(Backend):
    """Under DeepSpeed's ZeRO-3: in the checkpoint's dtype, with float32 masters of 16 bits."""

    def __init__(self, model: Any, engine: Any, scheduler: LRScheduler, dtype: torch.dtype) -> None:
        super().__init__(model, engine.optimizer, scheduler, dtype=dtype, device=_device())
        self._engine = engine

    def _called(self) -> Any:
        """The engine, which prepares its backward."""
        return self._engine

    def update(self, loss: Tensor) -> None:
        """Backward and step of the engine, which clips, and skips what is not finite."""
        self._engine.backward(loss)
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        if self.dtype != torch.float16 and norm is not None and not math.isfinite(norm):
            raise NotFiniteError("the norm of the gradients is not finite; nothing was stepped")
        self.scheduler.step()


def load(
    model: Any,  # of transformers
    settings: TrainingSettings,
    options: Options,
    planned: Callable[[str], None],
) -> Backend:
    """Tiles, shards and loads a model on the meta device."""
    nbytes = 4 * sum(parameter.numel() for parameter in model.parameters())
    tile = format_byte_size(options.tile_bytes)
    check_agreement(model, (settings, options))
    made = _zero3 if settings.engine == "zero3" else _fsdp2
    with models.printing_warnings():
        memtile.tile(model, max_tile_bytes=options.tile_bytes)
        try:
            backend = made(model, settings, options)
        except ArgumentError as error:
            raise CommandError(
                f"--tile {tile}: no layer of the model is larger, so nothing is tiled: give less."
            ) from error
    planned(
        f"{settings.engine}, {backend.ranks} ranks, tiles of at most {tile}; weights, gradients "
        f"and moments in float32: {format_byte_size(4 * nbytes // backend.ranks)} a rank"
    )
    return backend


def _fsdp2(model: Any, settings: TrainingSettings, options: Options) -> Backend:
    """What has 16 bits in the checkpoint is computed in 16 bits."""
    model = model.float()
    dtype: torch.dtype = model.config.dtype or torch.float32
    mixed = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32
    )
    pinned = CPUOffloadPolicy(pin_memory=_device().type == "cuda")
    shard(model, mp_policy=mixed, offload_policy=pinned if options.offload else OffloadPolicy())
    device = "cpu" if options.offload else _device()
    dense_files.load_checkpoint(model, Path(settings.model), device=device, strict=options.strict)
    adamw = torch.optim.AdamW(model.parameters(), lr=settings.lr, fused=True)
    model.train()
    schedule = schedule_of(adamw, settings)
    return _Fsdp2(model, adamw, schedule, dtype=dtype, device=_device(), clip=settings.clip)


def _zero3(model: Any, settings: TrainingSettings, options: Options) -> Backend:
    import deepspeed

    from memtile.engines.deepspeed_zero3 import attach, config, from_checkpoint

    dtype: torch.dtype = next(model.parameters()).dtype
    model = model.to(dtype)  # DeepSpeed takes one dtype
    place = "cpu" if options.offload else None
    given = config(model, offload_param=place, offload_optimizer=place)
    if settings.clip is not None:
        given["gradient_clipping"] = settings.clip
    from_checkpoint(model, Path(settings.model), given, strict=options.strict)
    adamw = torch.optim.AdamW(model.parameters(), lr=settings.lr, fused=True)
    model.train()
    engine = attach(deepspeed.initialize(model=model, optimizer=adamw, config=given)[0])
    return _Zero3(model, engine, schedule_of(adamw, settings), dtype)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_shards(model: nn.Module) -> None:
    """Raises NotFiniteError on every rank where a gradient of any rank is not finite."""
    gradients = ((name, each.grad) for name, each in model.named_parameters())
    bad = (name for name, grad in gradients if grad is not None and not is_finite(_local(grad)))
    for name in of_all_ranks(next(bad, None)):
        if name is not None:
            raise NotFiniteError(f"the gradient of {name} is not finite; nothing was stepped")


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def process_group() -> Iterator[None]:
    """The process group of the launcher's ranks; a rank that is gone is an EngineError."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")
    with Ranks().answering(collectives_only=True):
        yield
    dist.destroy_process_group()  # not after an error: it would wait for ranks that are gone


def load_engine(name: str) -> None:
    """Imports an engine, and has it print nothing but warnings."""
    if name != "zero3":
        return
    check_installed()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning)  # its use of torch
    import deepspeed  # noqa: F401  # before memory is measured

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
