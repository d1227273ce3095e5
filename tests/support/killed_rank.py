"""Two ranks, one of which is killed in the middle of a step."""

import os
import signal
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from engine_cases import Case, Net, batches, tiled
from processes import started
from torch import Tensor, nn

import memtile
from memtile.engines.torch_fsdp2 import shard

TIMEOUT_SECONDS = 40

Step = Callable[[Tensor], None]


def fsdp2(rank: int, folder: str) -> tuple[nn.Module, Step]:
    """A model under FSDP2, and a step of it."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), 2)
    limit = timedelta(seconds=TIMEOUT_SECONDS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=limit)
    model = shard(memtile.tile(Net(Case()), out_splits=4), unit_bytes=0)
    optimizer = torch.optim.AdamW(model.parameters())

    def step(ids: Tensor) -> None:
        model(ids).backward()
        optimizer.step()

    return model, step


def zero3(rank: int, folder: str) -> tuple[nn.Module, Step]:
    """A model under ZeRO-3, and a step of it."""
    from zero3_group import join
    from zero3_worker import started as engine_of

    from memtile.engines.deepspeed_zero3 import attach, config

    join(rank, 2, folder, TIMEOUT_SECONDS)
    model = tiled(Case(), torch.float32)
    engine = attach(engine_of(model, config(model)))

    def step(ids: Tensor) -> None:
        engine.backward(engine(ids))
        engine.step()

    return model, step


ENGINES = {"fsdp2": fsdp2, "zero3": zero3}


def run(rank: int, folder: str, engine: str) -> None:
    """Steps without end; rank 1 kills itself between two tiles of the second one's forward."""
    model, step = ENGINES[engine](rank, folder)
    try:
        for index, ids in enumerate(batches()):
            if (rank, index) == (1, 1):
                model.up.tile(2, 0).register_forward_pre_hook(_die)
            step(ids)
    except RuntimeError as error:
        (Path(folder) / f"error{rank}").write_text(str(error))
        os._exit(7)  # without the group, whose end would wait for the dead


def _die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed(engine: str) -> tuple[list[int | None], str]:
    """How both ranks ended, and what the one that was left was told."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = [started(run, rank, folder, engine) for rank in range(2)]
        for rank in ranks:
            rank.join(3 * TIMEOUT_SECONDS)
        return [rank.exitcode for rank in ranks], (Path(folder) / "error0").read_text()
