"""transformers' Trainer over a tiled model on disk: the dense run's training and checkpoints."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from leftovers import check_nothing_is_left
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

import memtile
from memtile.homes import allocation_of
from memtile.layers import DeferredLogits, deferring_head
from memtile.testing import assert_as_accurate

nothing_is_left = pytest.fixture(autouse=True)(check_nothing_is_left)

# An eps that is not far below the gradients: steps of AdamW are then no mere signs of noise.
ADAMW: dict[str, Any] = {"lr": 1e-2, "eps": 1e-3}
SETTINGS: dict[str, Any] = {
    "max_steps": 3,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 0.5,  # below the norms of these gradients
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_steps": 2,
    "logging_steps": 1,
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "seed": 5,
}


@pytest.fixture(scope="module", autouse=True)
def without_logits() -> Any:
    """Tiled models have no logits at all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deferring_head, "LEAST_LOGITS", 0)
        patch.setattr(DeferredLogits, "computed", None)
        yield


@dataclass
class Run:
    """A training run that has ended.

    Attributes:
        trainer: transformers'.
        optimizer: the one that was given to it.
        values: of the model, under dense names.
        losses: of training and evaluation, in order.
    """

    trainer: Any
    optimizer: torch.optim.Optimizer
    values: dict[str, Tensor]
    losses: list[float]


def optimizer_for(model: Any, mode: Any = "classic") -> torch.optim.Optimizer:
    """A `TileOptimizer` for a tiled model, torch's own for a dense one."""
    if any(isinstance(module, memtile.TiledLinear) for module in model.modules()):
        return memtile.TileOptimizer(model, torch.optim.AdamW, mode=mode, **ADAMW)
    return torch.optim.AdamW(model.parameters(), **ADAMW)


def trained(
    model: Any, folder: Path, mode: str = "classic", resume: Path | None = None, **settings: Any
) -> Run:
    """Train it with the Trainer; dropout draws from the seed that the Trainer sets."""
    optimizer = optimizer_for(model, mode)
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(output_dir=str(folder), **{**SETTINGS, **settings}),
        train_dataset=Sentences(40, seed=1),
        eval_dataset=Sentences(5, seed=2),
        optimizers=(
            optimizer,
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
        ),
    )
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    history = trainer.state.log_history
    losses = [entry.get("loss", entry.get("eval_loss")) for entry in history]
    return Run(trainer, optimizer, dense_values(model), [loss for loss in losses if loss])


def fresh(tied: bool, dropout: float = 0.1) -> Any:
    """A model as another process would make it: of the same config, with other values."""
    model = llama(tied, attention_dropout=dropout)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    return model


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def runs(request: Any, tmp_path_factory: Any) -> Any:
    """The same training tiled, dense, and in float64, each with a checkpoint after two steps."""
    tied, folder = request.param, tmp_path_factory.mktemp("trainer")
    model = {name: llama(tied, attention_dropout=0.1) for name in ("tiled", "dense", "truth")}
    on_disk(model["tiled"])
    as_truth(model["truth"])
    made = {name: trained(model[name], folder / name) for name in model}
    return {"tied": tied, "folder": folder, **made}


def test_training_is_as_accurate_as_the_dense_run(runs: Any) -> None:
    """Three steps with accumulation, clipping and dropout: losses, norms, weights.

    Neither training nor evaluation computes logits of the tiled model.
    """
    tiled, dense, truth = (runs[name] for name in ("tiled", "dense", "truth"))

    assert tiled.values.keys() == dense.values.keys()
    values = [flat(run.values.values()) for run in (tiled, dense, truth)]
    assert_as_accurate(*values, factor=2)
    assert len(tiled.losses) == 6
    assert_losses_as_accurate(tiled.losses, dense.losses, truth.losses)


def test_gradients_were_clipped_and_logged(runs: Any) -> None:
    """The norm before clipping is in the log, and is the dense run's."""

    def norms(run: Run) -> list[float]:
        return [h["grad_norm"] for h in run.trainer.state.log_history if "grad_norm" in h]

    assert min(norms(runs["tiled"])) > 2 * SETTINGS["max_grad_norm"]
    assert_losses_as_accurate(norms(runs["tiled"]), norms(runs["dense"]), norms(runs["truth"]))


def test_moments_live_on_disk_and_no_gradient_is_left(runs: Any) -> None:
    """accelerate's preparation of model and optimizer leaves every moment in its home."""
    run = runs["tiled"]
    parked = [p for p in run.trainer.model.parameters() if allocation_of(p) is not None]

    assert len(parked) > 40
    assert all(p.grad is None for p in run.trainer.model.parameters())
    for parameter in parked:
        state = run.optimizer.state[parameter]
        assert allocation_of(state["exp_avg"]).home is allocation_of(parameter).home
        assert allocation_of(state["exp_avg_sq"]).home is allocation_of(parameter).home


@pytest.mark.parametrize("checkpoint", ["checkpoint-2", "checkpoint-3", "saved"])
def test_folders_load_in_plain_transformers(runs: Any, checkpoint: str) -> None:
    """Checkpoints and the saved model: nothing missing or unexpected, and the same values."""
    folder = runs["folder"] / "tiled" / checkpoint
    if checkpoint == "saved":
        runs["tiled"].trainer.save_model(str(folder))

    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )

    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded).__name__ == "LlamaForCausalLM"
    if checkpoint != "checkpoint-2":
        assert_same_values(dense_values(loaded), runs["tiled"].values)


def test_the_checkpoints_optimizer_is_one_over_the_dense_model(runs: Any) -> None:
    """optimizer.pt has the numbers and shapes of torch's AdamW over the dense parameters."""
    states = [
        torch.load(runs["folder"] / name / "checkpoint-3" / "optimizer.pt", weights_only=True)
        for name in ("tiled", "dense", "truth")
    ]

    tiled, dense, truth = (state["state"] for state in states)
    assert tiled.keys() == dense.keys()
    for key in ("exp_avg", "exp_avg_sq"):
        assert all(tiled[n][key].shape == dense[n][key].shape for n in dense)
        moments = [flat(state[n][key] for n in dense) for state in (tiled, dense, truth)]
        assert_as_accurate(*moments, factor=2)


def test_a_resumed_run_ends_bit_identical(runs: Any, tmp_path: Path) -> None:
    """Values, losses and moments are those of the run that was not interrupted.

    The Trainer brings back the order of the data and the random numbers of the dropout.
    """
    whole = runs["tiled"]
    checkpoint = runs["folder"] / "tiled" / "checkpoint-2"

    resumed = trained(on_disk(fresh(runs["tied"])), tmp_path, resume=checkpoint)

    assert_same_values(resumed.values, whole.values)
    assert resumed.losses == whole.losses
    assert (resumed.trainer.state.global_step, resumed.trainer.lr_scheduler.last_epoch) == (3, 3)
    ours, theirs = resumed.optimizer.state_dict(), whole.optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    for number, state in theirs["state"].items():
        assert all(torch.equal(ours["state"][number][key], state[key]) for key in state)


@pytest.mark.parametrize(("saved_by", "resumed_by"), [("dense", "tiled"), ("tiled", "dense")])
def test_dense_and_tiled_runs_resume_each_other(
    runs: Any, saved_by: str, resumed_by: str, tmp_path: Path
) -> None:
    """A checkpoint of the one goes on in the other, as accurately as the dense run."""
    model = fresh(runs["tied"])
    if resumed_by == "tiled":
        on_disk(model)

    resumed = trained(model, tmp_path, resume=runs["folder"] / saved_by / "checkpoint-2")

    values = [flat(run.values.values()) for run in (resumed, runs["dense"], runs["truth"])]
    assert_as_accurate(*values, factor=2)
    assert_losses_as_accurate(resumed.losses, runs["dense"].losses, runs["truth"].losses)


def test_a_sharded_checkpoint_resumes(runs: Any, tmp_path: Path) -> None:
    """Shards are loaded one by one, each with dense names: the run ends bit-identical."""
    whole, sharded = runs["folder"] / "tiled" / "checkpoint-2", tmp_path / "checkpoint-2"
    shutil.copytree(whole, sharded)
    (sharded / "model.safetensors").unlink()
    plain = transformers.AutoModelForCausalLM.from_pretrained(whole)
    plain.save_pretrained(sharded, max_shard_size="60KB")
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 5

    resumed = trained(on_disk(fresh(runs["tied"])), tmp_path / "run", resume=sharded)

    assert_same_values(resumed.values, runs["tiled"].values)


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    """load_best_model_at_end puts a checkpoint's values into the tiles."""
    run = trained(
        on_disk(llama()),
        tmp_path,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that it is the first, and not the last
    )

    best = run.trainer.state.best_model_checkpoint
    assert best.endswith("checkpoint-1")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(best)
    assert_same_values(run.values, dense_values(loaded))


def test_stepping_in_backward_works_without_accumulation_and_clipping(tmp_path: Path) -> None:
    """max_grad_norm=0 and one batch a step: as accurate as the dense run, and resumes."""
    settings: dict[str, Any] = {"gradient_accumulation_steps": 1, "max_grad_norm": 0.0}
    models = {"tiled": on_disk(llama()), "dense": llama(), "truth": as_truth(llama())}

    runs = {
        name: trained(model, tmp_path / name, mode="in_backward", **settings)
        for name, model in models.items()
    }
    resumed = trained(
        on_disk(fresh(True, dropout=0.0)),
        tmp_path / "resumed",
        mode="in_backward",
        resume=tmp_path / "tiled" / "checkpoint-2",
        **settings,
    )

    values = [flat(run.values.values()) for run in runs.values()]
    assert_as_accurate(*values, factor=2)
    assert_same_values(resumed.values, runs["tiled"].values)


def test_stepping_in_backward_refuses_to_accumulate(tmp_path: Path) -> None:
    """A second batch before the step is an error that names the mode."""
    # In host memory: torch 2.13 never frees the graph of a backward that a hook's exception ended,
    # and with it the file of a home on disk.
    model = memtile.tile(llama(), max_tile_bytes=9000, home="host")

    with pytest.raises(memtile.errors.OptimizerError, match=r"cannot accumulate.*'classic'"):
        trained(model, tmp_path, mode="in_backward", max_grad_norm=0.0)


def test_stepping_in_backward_refuses_the_default_clipping(tmp_path: Path) -> None:
    """With max_grad_norm=1.0, which is the Trainer's own default, its first step raises."""
    model = memtile.tile(llama(), max_tile_bytes=9000, home="host")

    settings: dict[str, Any] = {"gradient_accumulation_steps": 1, "max_grad_norm": 1.0}

    with pytest.raises(memtile.errors.OptimizerError, match="max_grad_norm=0 of a Trainer"):
        trained(model, tmp_path, mode="in_backward", **settings)
