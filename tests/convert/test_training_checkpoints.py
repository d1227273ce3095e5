"""`save_training` and `resume_training`: the resumed run is the uninterrupted one, bit for bit."""

import pytest
import torch
from resumable import HOMES, NONE, a_run, all_of, differences
from small_training import MODES, Lion, disk_of
from torch import optim

import memtile
from memtile import TileOptimizer
from memtile.checkpoints import Checkpoint
from memtile.convert import Resumed
from memtile.homes import allocation_of

ADAMW = {"optimizer_class": optim.AdamW}
SGD = {"optimizer_class": optim.SGD, "momentum": 0.9}
ADAGRAD = {"optimizer_class": optim.Adagrad}
LION = {"optimizer_class": Lion}


def ended_at_once(steps, **options):
    """A run of so many steps without an interruption: its losses, and everything of it."""
    run = a_run(**options)
    losses = run.train(steps)
    return losses, all_of(run)


def ended_in_two(folder, steps, between=None, **options):
    """The same, saved half-way, and resumed by a run that began with other values."""
    first = a_run(**options)
    losses = first.train(steps // 2)
    first.save(folder)
    del first
    second = a_run(**{**options, **(between or {})}, seed=99)
    second.train(1)  # so that there is something to be replaced
    second.resume(folder)
    losses += second.train(steps - steps // 2)
    return losses, all_of(second)


@pytest.mark.parametrize("options", [ADAMW, SGD, ADAGRAD, LION], ids=str)
@pytest.mark.parametrize("home", HOMES)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, home, options):
    """Losses, weights, buffers, state, options, scheduler and random state are bit-identical."""
    losses, expected = ended_at_once(7, home=home, **options)

    resumed_losses, found = ended_in_two(tmp_path, 7, home=home, **options)

    assert resumed_losses == losses
    assert differences(found, expected) == []


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("home", HOMES)
def test_sixteen_bits_go_on_with_their_masters(tmp_path, home, mode):
    """The float32 values behind bfloat16 weights come back, in both modes."""
    options = {"home": home, "mode": mode, "dtype": torch.bfloat16}
    losses, expected = ended_at_once(7, **options)

    resumed_losses, found = ended_in_two(tmp_path, 7, **options)

    assert any(key.startswith("master ") for key in found)
    assert resumed_losses == losses
    assert differences(found, expected) == []


@pytest.mark.parametrize("options", [ADAMW, SGD, ADAGRAD], ids=str)
@pytest.mark.parametrize("home", [NONE, "disk"])
def test_a_plain_optimizer_goes_on(tmp_path, home, options):
    """torch's own optimizers are resumed too, over a dense model and over a parked one."""
    losses, expected = ended_at_once(7, home=home, plain=True, **options)

    resumed_losses, found = ended_in_two(tmp_path, 7, home=home, plain=True, **options)

    assert resumed_losses == losses
    assert differences(found, expected) == []


@pytest.mark.parametrize("plain_before", [False, True])
@pytest.mark.parametrize("plain_after", [False, True])
@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("grid", [{"out_splits": 3}, {"out_splits": 1, "in_splits": 4}], ids=str)
def test_it_goes_on_in_another_grid_and_home(tmp_path, grid, home, plain_before, plain_after):
    """What was saved from 2 × 2 tiles on disk resumes with its values in any form of the model."""
    first = a_run("disk", plain=plain_before)
    first.train(3)
    again = first.save(tmp_path / "first")
    second = a_run(home, grid=grid, plain=plain_after, seed=99)

    resumed = second.resume(tmp_path / "first")
    other = second.save(tmp_path / "second")

    assert resumed == Resumed(3, None, None, again)
    for stem in ("model", "optimizer"):
        ours = Checkpoint.open(other / f"{stem}.safetensors")
        theirs = Checkpoint.open(again / f"{stem}.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name].read(), theirs[name].read()) for name in ours)
    assert second.train(2)


def test_state_comes_back_into_the_home(tmp_path):
    """After a resume, moments of parked tiles are in the tiles' home, in room that was reserved."""
    first = a_run("disk", mode="in_backward")
    first.train(2)
    first.save(tmp_path)
    second = a_run("disk", mode="in_backward")

    second.resume(tmp_path)

    home = disk_of(second.model)
    for parameter in second.model.parameters():
        allocation = allocation_of(parameter)
        if allocation is not None and parameter.requires_grad:
            kept = second.optimizer.state[parameter]
            assert all(allocation_of(kept[key]).home is home for key in ("exp_avg", "exp_avg_sq"))


def test_a_run_goes_back_to_its_last_checkpoint(tmp_path):
    """Resuming in the process that saved discards later steps, and repeats them bit for bit."""
    run = a_run("disk")
    run.train(3)
    run.save(tmp_path)
    losses = run.train(3)
    expected = all_of(run)

    run.resume(tmp_path)

    assert (run.train(3), differences(all_of(run), expected)) == (losses, [])


def test_going_back_before_the_first_step_loses_the_state(tmp_path):
    """Parameters that had no state then have none after."""
    run = a_run("disk")
    run.save(tmp_path)
    losses = run.train(2)

    run.resume(tmp_path)

    assert not run.optimizer.state
    assert run.train(2) == losses


def test_a_plain_optimizer_may_begin_with_state_of_its_own(tmp_path):
    """torch's Adagrad makes its sums in the constructor, and goes on from a save before a step."""
    first = a_run("disk", **ADAGRAD)
    first.save(tmp_path)
    losses = first.train(2)
    second = a_run("disk", plain=True, seed=99, **ADAGRAD)

    second.resume(tmp_path)

    assert second.train(2) == losses


@pytest.mark.parametrize("masters", [False, True])
def test_bfloat16_passes_between_optimizers(tmp_path, masters):
    """A plain optimizer takes moments in 16 bits and no master; a TileOptimizer those in 32."""
    ours = {"home": "disk", "dtype": torch.bfloat16}
    first = a_run(**ours, plain=masters)
    first.train(2)
    first.save(tmp_path)
    second = a_run(**ours, plain=not masters)

    second.resume(tmp_path)

    state = second.optimizer.state[next(iter(second.model.parameters()))]
    assert state["exp_avg"].dtype is (torch.float32 if masters else torch.bfloat16)
    assert "master" not in state
    assert second.train(2)


def test_only_what_is_trained_can_be_saved(tmp_path):
    """With trainable_only frozen weights are in no file, and stay as they are at resume."""
    first = a_run("disk")
    first.train(2)
    path = first.save(tmp_path, trainable_only=True)
    second = a_run("disk", seed=99)
    frozen = second.model.frozen.weight.clone()

    second.resume(tmp_path)

    names = set(Checkpoint.open(path / "trainable.safetensors"))
    assert not any(name.startswith("frozen") for name in names)
    assert {"embed.weight", "up.bias", "norm.running_mean"} <= names
    assert torch.equal(second.model.frozen.weight, frozen)
    assert torch.equal(second.model.up.weight, first.model.up.weight)


def test_a_partly_trained_model_has_state_of_its_part(tmp_path):
    """The optimizer may hold some parameters only, in groups with options of their own."""

    def begin(seed):
        run = a_run("disk", seed=seed)
        parameters = [
            {"params": run.model.up.parameters(), "lr": 0.5},
            {"params": [run.model.norm.weight], "betas": (0.5, 0.9)},
        ]
        run.optimizer = TileOptimizer(run.model, optim.AdamW, params=parameters, lr=0.1)
        run.scheduler = None
        return run

    first = begin(7)
    first.train(2)
    first.save(tmp_path)
    losses = first.train(2)
    second = begin(99)

    second.resume(tmp_path)

    assert second.optimizer.param_groups[1]["betas"] == (0.5, 0.9)
    assert second.train(2) == losses
    assert differences(all_of(second), all_of(first)) == []


def test_the_weights_are_a_plain_checkpoint(tmp_path):
    """Any reader of safetensors finds the dense model under its own names."""
    from safetensors.torch import load_file

    run = a_run("disk")
    run.train(2)

    path = run.save(tmp_path)

    found = load_file(path / "model.safetensors")
    expected = dict(memtile.dense_state_dict(run.model))
    assert expected.keys() - found.keys() == {"head.weight"}  # tied, written once
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_state_of_another_shape_comes_back(tmp_path):
    """State of another shape than the parameter's comes back where the layer is not tiled."""

    def begin(seed):
        run = a_run(seed=seed)
        run.optimizer = optim.Adafactor(run.model.parameters(), lr=0.1)
        run.scheduler = None
        return run

    first = begin(7)
    first.train(2)
    first.save(tmp_path)
    losses = first.train(2)
    second = begin(8)

    second.resume(tmp_path)

    assert second.train(2) == losses


def test_an_adapter_goes_on_over_its_parked_base(tmp_path):
    """LoRA with dropout: only the adapters are saved, and the run is the uninterrupted one."""
    import peft
    from small_models import build, inputs

    def begin(seed):
        model = build("llama-tied")
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=3, lora_dropout=0.2, target_modules=["q_proj", "up_proj"])
        model = peft.get_peft_model(model, config)
        memtile.tile(model, out_splits=2, home=memtile.DiskHome())
        trained = [p for p in model.parameters() if p.requires_grad]
        return model, TileOptimizer(model, optim.AdamW, params=trained, lr=0.1)

    def train(model, optimizer):
        losses = []
        for _ in range(2):
            ids = inputs("llama-tied")["input_ids"]
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    first, second = begin(1), begin(2)
    train(*first)
    path = memtile.save_training(tmp_path, *first, step=2, trainable_only=True)
    losses = train(*first)

    memtile.resume_training(tmp_path, *second)

    assert all("lora_" in name for name in Checkpoint.open(path / "trainable.safetensors"))
    assert train(*second) == losses


def test_plain_transformers_loads_a_checkpoint_of_a_run(tmp_path):
    """The folder of a step has the config, and the weights under transformers' own names."""
    import transformers
    from small_models import build

    model = memtile.tile(build("llama-tied"), out_splits=2, home="host")
    optimizer = TileOptimizer(model, optim.AdamW)
    path = memtile.save_training(tmp_path, model, optimizer, step=0)

    plain = transformers.AutoModelForCausalLM.from_pretrained(path)

    expected = dict(memtile.dense_state_dict(model))
    found = plain.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
