"""What `save_training` and `resume_training` refuse, and that nothing is lost or changed then."""

import errno
import json
import random
import shutil

import pytest
import torch
from resumable import a_run, all_of, differences
from small_training import Lion, loss_of
from torch import nn, optim

import memtile
from memtile import TileOptimizer
from memtile.checkpoints import record
from memtile.convert import has_training
from memtile.errors import (
    ArgumentError,
    CheckpointError,
    OptimizerError,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with one checkpoint, after three steps."""
    folder = tmp_path_factory.mktemp("saved")
    run = a_run("disk")
    run.train(3)
    run.save(folder)
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    """Gives a copy of it, to be damaged."""
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def assert_refused(run, folder, match):
    """Resuming raises, and leaves every bit of the run as it was, random states included."""
    before = all_of(run)

    with pytest.raises(CheckpointError, match=match):
        run.resume(folder)
    assert differences(all_of(run), before) == []


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def names_of(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_flipped_bit_is_found_wherever_it_is(copied):
    """In weights, state, headers and the record: one bit is refused, and changes nothing."""
    run, seeded = a_run(), random.Random(5)
    for path in files_of(copied):
        whole = path.read_bytes()
        for _ in range(12):
            raw = bytearray(whole)
            raw[seeded.randrange(len(raw))] ^= 1 << seeded.randrange(8)
            path.write_bytes(raw)

            assert_refused(run, copied, "the|it")
        path.write_bytes(whole)
    assert run.resume(copied).step == 3


@pytest.mark.parametrize("end", [-1, -5000, 4, 0])
def test_a_file_cut_short_is_refused(copied, end):
    """A file that is shorter by a byte, by much, or empty, is refused."""
    run = a_run()
    for path in files_of(copied):
        whole = path.read_bytes()
        path.write_bytes(whole[:end])

        assert_refused(run, copied, "damaged|cut short|written")
        path.write_bytes(whole)


def test_a_missing_file_is_named(copied):
    """A missing file is refused, whichever it is."""
    run = a_run()
    for path in files_of(copied):
        moved = path.rename(copied / path.name)

        assert_refused(run, copied, path.name)
        moved.rename(path)


def test_a_file_of_another_checkpoint_is_refused(copied, tmp_path):
    """Files that are whole, and were not written together, are not mixed."""
    other = a_run("disk", seed=8)
    other.train(4)
    theirs = other.save(tmp_path / "other")
    (place,) = copied.iterdir()
    shutil.copy(theirs / "optimizer.safetensors", place)

    assert_refused(a_run(), copied, r"optimizer\.safetensors is damaged")


def test_the_way_out_of_a_damaged_one_is_the_one_before(tmp_path):
    """The older checkpoint is named, and never taken by itself."""
    run = a_run()
    for _ in range(2):
        run.train(1)
        newest = run.save(tmp_path, keep=2)
    (newest / "model.safetensors").write_bytes(b"")

    assert_refused(run, tmp_path, "to resume from step-00000001, which is older, remove .*0002")
    shutil.rmtree(newest)
    assert run.resume(tmp_path).step == 1


def test_another_format_names_who_wrote_it(copied):
    """A record of a later release says so."""
    (place,) = copied.iterdir()
    found = json.loads((place / "training.json").read_text())
    del found["crc32"]
    found |= {"format": 2, "memtile": "9.9"}
    text = json.dumps({"crc32": record._crc_of(found), **found})
    (place / "training.json").write_text(text)

    assert_refused(a_run(), copied, r"format 2, written by memtile 9\.9; this memtile reads")


def test_where_there_is_none_the_message_says_what_to_do(tmp_path):
    """No folder, an empty one, a file, and a half-written checkpoint are refused."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "half" / "step-00000003.partial-0a1b2c3d").mkdir(parents=True)
    run = a_run()

    for name in ("none", "empty", "file"):
        assert not has_training(tmp_path / name)
        assert_refused(run, tmp_path / name, "holds no training checkpoint; give")
    assert not has_training(tmp_path / "half")
    assert_refused(run, tmp_path / "half", "half-written, and no checkpoint: .* start it anew")


def test_another_model_is_refused(saved):
    """Another model is refused, with the name, shape or dtype that differs."""
    run = a_run()
    run.model.head = nn.Linear(9, 23, bias=False)  # not tied any more

    assert_refused(run, saved, r"only this Uncertain has 'head\.weight'")
    run = a_run()
    run.model.up.weight.data = torch.zeros(13, 8)
    assert_refused(run, saved, r"up\.weight is \(13, 9\) torch\.float32 in .*, and \(13, 8\)")
    run = a_run(dtype=torch.bfloat16)
    assert_refused(run, saved, r"is .* torch\.float32 in .*, and .* torch\.bfloat16")
    run = a_run()
    run.model.more = nn.Linear(2, 2).requires_grad_(False)
    assert_refused(run, saved, r"only this Uncertain has 'more\.bias'")


def test_another_optimizer_is_refused(saved):
    """An optimizer of another class, number of groups or members is refused."""
    assert_refused(a_run(optimizer_class=Lion), saved, "trained with torch.*AdamW, and .*Lion: ")
    assert_refused(a_run(optimizer_class=optim.SGD, plain=True), saved, "and .*SGD: its state")
    run = a_run()
    parameters = list(run.model.parameters())
    run.optimizer = optim.AdamW([{"params": parameters[:2]}, {"params": parameters[2:]}])
    assert_refused(run, saved, "has 2 parameter groups, the checkpoint .* has 1")
    run.optimizer = optim.AdamW(parameters[1:])
    assert_refused(run, saved, r"only the checkpoint .* has embed\.weight in group 0")


def test_another_scheduler_is_refused(saved):
    """A scheduler of another class, and a missing one, are refused."""
    run = a_run()
    run.scheduler = optim.lr_scheduler.StepLR(run.optimizer, 1)
    assert_refused(run, saved, "with torch.*CosineAnnealingLR, .* with torch.*StepLR")
    run.scheduler = None
    assert_refused(run, saved, "CosineAnnealingLR, and is to be resumed with no scheduler")


def test_an_optimizer_of_other_parameters_is_refused(tmp_path):
    """Parameters that are not of the model have no name to be saved under."""
    run = a_run()
    run.optimizer = optim.AdamW([*run.model.parameters(), nn.Parameter(torch.ones(3))])

    with pytest.raises(
        OptimizerError, match=r"holds a \(3,\) parameter that is not in this Uncertain"
    ):
        run.save(tmp_path)
    assert names_of(tmp_path) == []


def test_a_step_that_is_under_way_is_not_saved(tmp_path):
    """Saving is refused between a backward that stepped and its step()."""
    run = a_run("disk", mode="in_backward")
    loss_of(run.model, torch.ones(3, 6, dtype=torch.long)).backward()

    with pytest.raises(OptimizerError, match=r"and step\(\) was not called yet; call step\(\)"):
        run.save(tmp_path)
    run.optimizer.step()
    assert run.save(tmp_path).is_dir()


def test_a_step_that_failed_half_way_is_not_saved(tmp_path, monkeypatch):
    """Saving is refused after a step that was not finished."""
    run = a_run()
    loss_of(run.model, torch.ones(3, 6, dtype=torch.long)).backward()
    with monkeypatch.context() as patch:
        patch.setattr(run.optimizer._stepper, "step", _broken)
        with pytest.raises(RuntimeError, match="broken"):
            run.optimizer.step()

    with pytest.raises(OptimizerError, match=r"a step was not finished: .* call step\(\) to go"):
        run.save(tmp_path)
    run.optimizer.step()
    assert run.save(tmp_path).is_dir()


def _broken(*args, **options):
    raise RuntimeError("broken")


def test_tiles_that_were_stepped_unevenly_are_not_saved(tmp_path):
    """Tiles of one weight that were stepped unequally often cannot be saved."""
    run = a_run("device")
    run.train(1)
    tiles = list(run.model.up.tile_parameters("weight").values())
    tiles[0].grad = torch.ones_like(tiles[0])
    for parameter in run.model.parameters():
        parameter.grad = parameter.grad if parameter is tiles[0] else None
    run.optimizer.step()

    with pytest.raises(OptimizerError, match=r"up\.weight: 'step' is not the same for all"):
        run.save(tmp_path)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (
            lambda run: setattr(run.scheduler, "hook", print),
            r"state_dict\(\)\['hook'\] is a builtin",
        ),
        (lambda run: run.optimizer.param_groups[0].update(f=len), r"param_groups\[0\]\['f'\]"),
        (lambda run: run.optimizer.state["count"].update(n=1), "keeps state for 'count'"),
        (
            lambda run: run.optimizer.state[run.model.up.bias].update(past=[torch.ones(3)]),
            r"state of up\.bias\['past'\]\[0\] is a \(3,\) tensor",
        ),
    ],
)
def test_what_is_neither_a_tensor_nor_json_is_named(tmp_path, spoil, named):
    """Values that JSON cannot hold are refused, and nothing is written."""
    run = a_run()
    run.train(1)
    spoil(run)

    with pytest.raises((CheckpointError, OptimizerError), match=named):
        run.save(tmp_path)
    assert names_of(tmp_path) == []


@pytest.mark.parametrize("name", ["position", "extra"])
def test_a_position_that_is_no_json_is_named(tmp_path, name):
    """Sets, arrays and objects are refused, with their place."""
    with pytest.raises(CheckpointError, match=rf"^{name}\['a'\]\[1\] is a set, which cannot be"):
        a_run().save(tmp_path, **{name: {"a": [1, {2}]}})


@pytest.mark.parametrize(
    "options", [{"step": -1}, {"step": 1.0}, {"step": True}, {"step": 1, "keep": 0}], ids=str
)
def test_numbers_that_mean_nothing_are_refused(tmp_path, options):
    """A step is 0 or more, and at least one checkpoint stays."""
    run = a_run()

    with pytest.raises(ArgumentError, match="or more, an int"):
        memtile.save_training(tmp_path, run.model, run.optimizer, **options)


def test_without_room_for_the_state_nothing_changes(saved, monkeypatch):
    """A full home raises before the first value is replaced."""
    run = a_run("disk")
    before = all_of(run)
    monkeypatch.setattr(memtile.DiskHome, "allocate", _full)

    with pytest.raises(memtile.errors.HomeFullError):
        run.resume(saved)
    assert differences(all_of(run), before) == []


def _full(*args):
    raise memtile.errors.HomeFullError(errno.ENOSPC, "full")


def test_a_model_that_is_frozen_otherwise_is_refused(tmp_path):
    """With trainable_only, what was trained then must be trained now."""
    run = a_run("disk")
    run.save(tmp_path, trainable_only=True)
    run.model.up.requires_grad_(False)
    run.optimizer = TileOptimizer(run.model, optim.AdamW, lr=0.01)

    assert_refused(run, tmp_path, r"only the checkpoint has 'up\.bias': .* other weights were")
