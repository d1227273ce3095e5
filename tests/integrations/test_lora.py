"""LoRA over a parked, frozen base: the dense run's adapters, and nothing of the base is trained."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from leftovers import check_nothing_is_left
from safetensors.torch import load_file
from tiny_llama import (
    TILE_BYTES,
    Sentences,
    as_truth,
    assert_losses_as_accurate,
    assert_same_values,
    dense_values,
    flat,
    llama,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

import memtile
from memtile.convert import select_linears
from memtile.homes import allocation_of
from memtile.testing import assert_as_accurate

nothing_is_left = pytest.fixture(autouse=True)(check_nothing_is_left)

ADAMW: dict[str, Any] = {"lr": 1e-2, "eps": 1e-3}
PROJECTIONS = ["q_proj", "down_proj"]
WITH_BIAS = {"lora_bias": True, "bias": "lora_only"}
CASES = [
    pytest.param(True, PROJECTIONS, {}, id="tied"),
    pytest.param(False, PROJECTIONS, {}, id="untied"),
    pytest.param(True, PROJECTIONS, WITH_BIAS, id="biases"),
    pytest.param(True, ["lm_head", "down_proj"], {}, id="tied head"),
    pytest.param(False, ["lm_head", "embed_tokens"], {}, id="untied head and embedding"),
    pytest.param(True, "all-linear", {"use_dora": True}, id="DoRA everywhere"),
]
EVERY_BIAS = pytest.param(False, PROJECTIONS, {"bias": "all"}, id="every bias")
# PEFT says so of the dense model too: what is adapted is tied with what is not.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning"),
]


def adapted(tied: bool = True, targets: Any = PROJECTIONS, **options: Any) -> Any:
    """A seeded model with biases, wrapped by PEFT; adapters begin at values that matter."""
    model = llama(tied, attention_bias=True, mlp_bias=True)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, **options)
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.normal_(std=0.02)
    return wrapped


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by its name in PEFT's model."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def base_values(model: nn.Module) -> dict[str, Tensor]:
    """The frozen values under dense names."""
    trained = trainable(model).keys()
    return {name: value for name, value in dense_values(model).items() if name not in trained}


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    """The losses of four steps of two sentences, with clipping."""
    losses = []
    for batch in DataLoader(Sentences(8, seed=4), batch_size=2):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable(model).values(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@dataclass
class Side:
    """A model that was trained."""

    model: Any
    losses: list[float]


def dense_side(model: Any) -> Side:
    """Train with torch's own optimizer."""
    return Side(model, train(model, torch.optim.AdamW(trainable(model).values(), **ADAMW)))


def parked(model: Any) -> tuple[Any, memtile.DiskHome]:
    """Tile PEFT's model, and its home."""
    home = memtile.DiskHome()
    return memtile.tile(model, max_tile_bytes=TILE_BYTES, home=home), home


def tile_optimizer(model: Any, **options: Any) -> memtile.TileOptimizer:
    """One for the adapters only."""
    chosen = list(trainable(model).values())
    return memtile.TileOptimizer(model, torch.optim.AdamW, params=chosen, **options, **ADAMW)


def frozen_tiles(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parked parameters."""
    return (p for p in model.parameters() if allocation_of(p) is not None)


@pytest.mark.parametrize(("tied", "targets", "options"), CASES)
def test_adapters_train_as_over_the_dense_base(tied: bool, targets: Any, options: Any) -> None:
    """Losses and adapters are as accurate as PEFT's own run, and so is the merged model."""
    model = adapted(tied, targets, **options)
    dense, truth = dense_side(copy.deepcopy(model)), copy.deepcopy(model)
    as_truth(truth.base_model.model)
    truth64 = dense_side(truth)
    tiled, _ = parked(model)

    losses = train(tiled, tile_optimizer(tiled))

    names = trainable(dense.model).keys()
    assert names
    sides = [dense_values(m) for m in (tiled, dense.model, truth64.model)]
    assert_as_accurate(*(flat(side[name] for name in names) for side in sides), factor=2)
    assert_losses_as_accurate(losses, dense.losses, truth64.losses)


@pytest.mark.usefixtures("in_slabs")
def test_nothing_of_the_base_is_trained_or_written() -> None:
    """No gradient, no moment, no room for them; the home is read only, and its file does not grow.

    In 16 bits, where parameters that are trained would have float32 masters too.
    """
    tiled, home = parked(adapted().bfloat16())
    before, size, traffic = base_values(tiled), home._file.size, home.traffic

    optimizer = tile_optimizer(tiled)
    train(tiled, optimizer)

    assert len(list(frozen_tiles(tiled))) >= 30
    assert all(p.grad is None for p in tiled.parameters() if not p.requires_grad)
    assert set(optimizer.state) == set(trainable(tiled).values())
    assert home.traffic.read_bytes > traffic.read_bytes
    assert home.traffic.written_bytes == traffic.written_bytes
    assert home._file.size == size
    assert_same_values(base_values(tiled), before)


def test_an_optimizer_over_all_parameters_steps_the_adapters_only() -> None:
    """Without params=… frozen parameters get no room, no state and no step."""
    chosen, _ = parked(adapted())
    everything, home = parked(adapted())
    size = home._file.size

    train(chosen, tile_optimizer(chosen))
    optimizer = memtile.TileOptimizer(everything, torch.optim.AdamW, **ADAMW)
    train(everything, optimizer)

    assert home._file.size == size
    assert set(optimizer.state) == set(trainable(everything).values())
    assert_same_values(dense_values(everything), dense_values(chosen))


def test_adapters_step_in_backward() -> None:
    """mode="in_backward" gives the same adapters as stepping afterwards, without clipping."""
    models = [parked(adapted())[0] for _ in range(2)]
    batch = next(iter(DataLoader(Sentences(2, seed=4), batch_size=2)))

    for model, mode in zip(models, ("classic", "in_backward"), strict=True):
        optimizer = tile_optimizer(model, mode=mode)
        for _ in range(2):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    assert_same_values(dense_values(models[0]), dense_values(models[1]))


# PEFT says that it saves an embedding too because it is adapted, and takes the biases of its own
# adapters for weights of another shape, in the dense model too.
@pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.parametrize(("tied", "targets", "options"), [*CASES, EVERY_BIAS])
def test_saved_adapters_load_in_plain_peft(
    tied: bool, targets: Any, options: Any, tmp_path: Path
) -> None:
    """The file has the dense model's names, and plain PEFT has the same values and logits."""
    dense = adapted(tied, targets, **options)
    tiled, _ = parked(copy.deepcopy(dense))
    train(tiled, tile_optimizer(tiled))

    dense.save_pretrained(tmp_path / "dense")
    tiled.save_pretrained(tmp_path / "tiled")
    base = llama(tied, attention_bias=True, mlp_bias=True)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "tiled", is_trainable=True)

    ours, theirs = (
        load_file(tmp_path / each / "adapter_model.safetensors").keys()
        for each in ("tiled", "dense")
    )
    assert ours <= theirs
    assert all(name.endswith("base_layer.weight") for name in theirs - ours)  # frozen, and huge
    assert_same_values(dense_values(loaded), dense_values(tiled))
    ids = Sentences(2, seed=9)[0]["input_ids"][None]
    torch.testing.assert_close(loaded(ids).logits, tiled(ids).logits)


@pytest.mark.parametrize(("tied", "targets"), [(True, PROJECTIONS), (False, ["lm_head", "q_proj"])])
def test_merging_after_untile_gives_the_dense_merged_model(
    tied: bool, targets: list[str], tmp_path: Path
) -> None:
    """untile, merge_and_unload, save_pretrained: a plain checkpoint, as accurate as dense."""
    model = adapted(tied, targets)
    dense, truth = dense_side(copy.deepcopy(model)), copy.deepcopy(model)
    as_truth(truth.base_model.model)
    truth64 = dense_side(truth)
    tiled, _ = parked(model)
    train(tiled, tile_optimizer(tiled))

    merged = memtile.untile(tiled).merge_and_unload()
    merged.save_pretrained(tmp_path)

    names = dense.model.merge_and_unload().state_dict().keys()
    truth64.model.merge_and_unload()
    models = (merged, dense.model.base_model.model, truth64.model.base_model.model)
    values = [flat(m.state_dict()[name] for name in names) for m in models]
    assert_as_accurate(*values, factor=2)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_values(loaded.state_dict(), merged.state_dict())


def test_modules_to_save_are_trained_dense_and_saved_under_dense_names(tmp_path: Path) -> None:
    """PEFT's trained copy of the head stays a dense module, which plain PEFT loads."""
    model = adapted(False, ["q_proj"], modules_to_save=["lm_head"])
    with pytest.warns(memtile.errors.TileSizeWarning, match="PEFT's own copy"):
        tiled, _ = parked(model)
    copies = [c for c in select_linears(tiled, out_splits=2) if "to_save" in c.name]
    train(tiled, tile_optimizer(tiled))

    tiled.save_pretrained(tmp_path)
    base = llama(False, attention_bias=True, mlp_bias=True)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)

    assert [c.tiled for c in copies] == [False]
    assert "PEFT's own copy" in copies[0].reason
    assert any("modules_to_save" in name for name in trainable(tiled))
    assert_same_values(dict(trainable(loaded)), dict(trainable(tiled)))


def test_embeddings_are_saved_when_peft_is_told_to(tmp_path: Path) -> None:
    """save_embedding_layers=True writes both ends of the model under their dense names."""
    tiled, _ = parked(adapted(False, ["q_proj"]))

    tiled.save_pretrained(tmp_path, save_embedding_layers=True)

    saved, values = load_file(tmp_path / "adapter_model.safetensors"), dense_values(tiled)
    ends = [name for name in saved if "lora_" not in name]
    assert sorted(name.split(".")[-2] for name in ends) == ["embed_tokens", "lm_head"]
    assert all(torch.equal(saved[name], values[name]) for name in ends)


def test_an_embedding_of_which_peft_trains_rows_stays_dense() -> None:
    """trainable_token_indices reads the embedding itself; the linears around it are parked."""
    model = adapted(True, ["q_proj"], trainable_token_indices=[5, 7])
    dense = dense_side(copy.deepcopy(model))
    with pytest.warns(memtile.errors.TileSizeWarning, match="PEFT trains some of its rows"):
        tiled, _ = parked(model)

    losses = train(tiled, tile_optimizer(tiled))

    torch.testing.assert_close(losses, dense.losses)
    assert any("trainable_tokens" in name for name in trainable(tiled))


def test_peft_refuses_a_model_that_is_tiled_already() -> None:
    """PEFT refuses to wrap a tiled model and names the tiled layer; the model still works."""
    model = memtile.tile(llama(), max_tile_bytes=TILE_BYTES)
    before = dense_values(model)

    with pytest.raises(ValueError, match=r"(?s)Target module TiledLinear.*is not supported"):
        peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=PROJECTIONS))

    assert_same_values(dense_values(model), before)


def test_the_trainer_saves_and_resumes_adapters(tmp_path: Path) -> None:
    """Checkpoints hold adapters and their moments; a resumed run ends bit-identical."""

    def run(folder: str, resume: str | None = None) -> Any:
        model, _ = parked(adapted())
        trainer = transformers.Trainer(
            model,
            transformers.TrainingArguments(
                output_dir=str(tmp_path / folder),
                max_steps=3,
                save_steps=2,
                per_device_train_batch_size=2,
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=Sentences(20, seed=1),
            optimizers=(tile_optimizer(model), None),
        )
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = run("whole")
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    resumed = run("resumed", str(checkpoint))

    assert not (checkpoint / "model.safetensors").exists()
    assert (checkpoint / "adapter_model.safetensors").exists()
    assert_same_values(dense_values(resumed), dense_values(whole))
