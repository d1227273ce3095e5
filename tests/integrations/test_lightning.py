"""Lightning over a tiled model on disk: the dense run's training, checkpoints and resumption."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as lightning
import torch
from leftovers import check_nothing_is_left
from pytorch_lightning.callbacks import ModelCheckpoint
from tiny_llama import (
    Sentences,
    as_truth,
    assert_losses_as_accurate,
    assert_same_values,
    dense_values,
    flat,
    llama,
    on_disk,
)
from torch import Tensor
from torch.utils.data import DataLoader

import memtile
from memtile.homes import allocation_of
from memtile.testing import assert_as_accurate

nothing_is_left = pytest.fixture(autouse=True)(check_nothing_is_left)
pytestmark = [
    # Lightning 2.6 uses what torch 2.13 deprecates.
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning"),
    # Its advice about workers, in every run.
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    # A resumed run writes its checkpoints into a folder of its own.
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]

ADAMW: dict[str, Any] = {"lr": 1e-2, "eps": 1e-3}


class Module(lightning.LightningModule):
    """A language model; nothing in it knows tiles but the optimizer that it makes.

    Args:
        model: tiled or not.
        mode: of the `TileOptimizer`.
    """

    def __init__(self, model: Any, mode: str = "classic") -> None:
        super().__init__()
        self.model, self.mode = model, mode
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, Tensor], number: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: dict[str, Tensor], number: int) -> None:
        self.losses.append(self.model(**batch).loss.item())

    def configure_optimizers(self) -> Any:
        optimizer: torch.optim.Optimizer
        if any(isinstance(module, memtile.TiledLinear) for module in self.modules()):
            mode: Any = self.mode
            optimizer = memtile.TileOptimizer(self, torch.optim.AdamW, mode=mode, **ADAMW)
        else:
            optimizer = torch.optim.AdamW(self.parameters(), **ADAMW)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class DenseCheckpoints(Module):
    """A module whose checkpoints have dense names, as the page in docs/ says."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = dict(memtile.dense_state_dict(self))


def fitted(
    module: Module, folder: Path, resume: Path | None = None, max_steps: int = 3, **options: Any
) -> Module:
    """Train: an epoch is four batches, two of them a step, and ends with a checkpoint."""
    settings: dict[str, Any] = {
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 0.5,  # below the norms of these gradients
        **options,
    }
    trainer = lightning.Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)],
        **settings,
    )
    trainer.fit(
        module,
        DataLoader(Sentences(12, seed=1), batch_size=3),
        DataLoader(Sentences(5, seed=2), batch_size=5),
        ckpt_path=resume,
        weights_only=True if resume else None,
    )
    return module


def assert_as_accurate_as_dense(tiled: Module, dense: Module, truth: Module) -> None:
    """Losses and weights."""
    values = [flat(dense_values(module).values()) for module in (tiled, dense, truth)]
    assert_as_accurate(*values, factor=2)
    assert_losses_as_accurate(tiled.losses, dense.losses, truth.losses)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def runs(request: Any, tmp_path_factory: Any) -> Any:
    """The same training tiled, dense, and in float64."""
    tied, folder = request.param, tmp_path_factory.mktemp("lightning")
    models = {"tiled": on_disk(llama(tied)), "dense": llama(tied), "truth": as_truth(llama(tied))}
    made = {name: fitted(Module(model), folder / name) for name, model in models.items()}
    return {"tied": tied, "folder": folder, **made}


def test_training_is_as_accurate_as_the_dense_run(runs: Any) -> None:
    """Three steps with closures, accumulation, clipping, validation and a scheduler."""
    tiled = runs["tiled"]

    assert_as_accurate_as_dense(tiled, runs["dense"], runs["truth"])
    assert len(tiled.losses) == 8  # of 6 batches, and of the validation before, or after, an epoch
    parked = [p for p in tiled.parameters() if allocation_of(p) is not None]
    state = tiled.trainer.optimizers[0].state
    assert len(parked) > 40
    assert all(allocation_of(state[p]["exp_avg"]).home is allocation_of(p).home for p in parked)


def test_a_resumed_run_ends_bit_identical(runs: Any, tmp_path: Path) -> None:
    """From the checkpoint at the end of the first epoch, into a model with other values."""
    model = llama(runs["tied"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    checkpoint = runs["folder"] / "tiled" / "epoch=0.ckpt"

    resumed = fitted(Module(on_disk(model)), tmp_path, resume=checkpoint)

    assert_same_values(dense_values(resumed), dense_values(runs["tiled"]))
    assert resumed.trainer.global_step == 3


def test_a_dense_runs_checkpoint_resumes_tiled(runs: Any, tmp_path: Path) -> None:
    """Dense names and moments over dense parameters are cut into tiles."""
    checkpoint = runs["folder"] / "dense" / "epoch=0.ckpt"

    resumed = fitted(Module(on_disk(llama(runs["tied"]))), tmp_path, resume=checkpoint)

    values = [flat(dense_values(m).values()) for m in (resumed, runs["dense"], runs["truth"])]
    assert_as_accurate(*values, factor=2)


def test_a_tiled_runs_checkpoint_has_the_names_of_tiles(runs: Any, tmp_path: Path) -> None:
    """Lightning refuses it in a dense run; on_save_checkpoint can give it dense names."""
    with pytest.raises(RuntimeError, match=r"Missing key.*model.embed_tokens.weight"):
        fitted(
            Module(llama(runs["tied"])),
            tmp_path,
            resume=runs["folder"] / "tiled" / "epoch=0.ckpt",
        )

    fitted(DenseCheckpoints(on_disk(llama(runs["tied"]))), tmp_path / "named", max_steps=2)
    resumed = fitted(
        Module(llama(runs["tied"])), tmp_path / "dense", resume=tmp_path / "named" / "epoch=0.ckpt"
    )
    values = [flat(dense_values(m).values()) for m in (resumed, runs["dense"], runs["truth"])]
    assert_as_accurate(*values, factor=2)


def test_stepping_in_backward_works_without_accumulation_and_clipping(tmp_path: Path) -> None:
    """The closure that Lightning gives to step() steps in its backward, and that only once."""
    plain: dict[str, Any] = {"accumulate_grad_batches": 1, "gradient_clip_val": None}
    models = {"tiled": on_disk(llama()), "dense": llama(), "truth": as_truth(llama())}

    runs = [
        fitted(Module(model, mode="in_backward"), tmp_path / name, **plain)
        for name, model in models.items()
    ]

    assert_as_accurate_as_dense(*runs)
