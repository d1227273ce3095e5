"""Idle steps are seen by whoever reads a tile, survive errors, and keep nothing alive."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from faulty_disk import FaultyDisk, slabs_are_free
from routed_layers import (
    EXPERTS,
    ROUTED_HOMES,
    WIDTH,
    dense_routed,
    largest_difference,
    routed,
    routed_values,
    scheduled_optimizer,
    state_of,
    steps_of,
    tiles_of,
    train_routed,
    trained_routed,
)
from small_training import MODES, same

import memtile
from memtile import TileOptimizer
from memtile.errors import HomeIOError, ParkedError
from memtile.homes import allocation_of
from memtile.optim import idle
from memtile.transfer import catch_up

READS = {
    "state_dict": lambda model, tmp: model.state_dict(),
    "the tile's state_dict": lambda model, tmp: model.experts.tile(0, 0).state_dict(),
    "handle": lambda model, tmp: model.experts.weight.sum(),
    "to_linear": lambda model, tmp: model.experts.to_linear(),
    "catch_up": lambda model, tmp: catch_up(model.parameters()),
}


@pytest.mark.parametrize("read", READS)
def test_whoever_reads_sees_the_newest_values(read, tmp_path, recwarn):
    """Each way of memtile's to read a tile replays its idle steps first; the values are home."""
    model, optimizer, _ = trained_routed("disk", [0, 1], [1], [1])
    READS[read](model, tmp_path)
    seen = tiles_of(model)[0].detach().clone()

    assert optimizer.state[tiles_of(model)[0]]["step"] == 3
    optimizer.catch_up()
    assert torch.equal(seen, tiles_of(model)[0])


def test_loaded_values_are_not_stepped_by_what_was_owed_before():
    """Values that are loaded stay; the state gets the steps that were put off."""
    model, optimizer, _ = trained_routed("disk", [0, 1], [1], [1])
    loaded = {name: torch.ones_like(value) for name, value in dense_routed().state_dict().items()}
    model.load_state_dict(loaded)
    optimizer.catch_up()

    assert same(routed_values(model), loaded)
    assert {int(state["step"]) for state in optimizer.state.values()} == {3}


@pytest.mark.parametrize("act", ["read", "write"])
def test_a_replay_that_fails_is_repeated(act, monkeypatch):
    """A home that fails in a replay leaves all as it was: the next forward comes out as always."""
    results = []
    for fails in (False, True):
        disk = FaultyDisk(monkeypatch)
        model = routed("disk")
        optimizer, schedule = scheduled_optimizer(model)
        steps = list(steps_of(6))
        train_routed(model, optimizer, steps, [schedule])
        if fails:
            disk.fail(act, 2)
            with pytest.raises(HomeIOError):
                optimizer.catch_up()
            if act == "read":
                with pytest.raises(HomeIOError):
                    model(steps[0][0], range(EXPERTS))
            disk.mend()
        train_routed(model, optimizer, steps, [schedule])
        results.append(routed_values(model))
        assert slabs_are_free(allocation_of(tiles_of(model)[0]).home)

    assert same(*results)


@pytest.mark.parametrize("mode", MODES)
def test_a_step_that_is_given_up_is_owed_by_nobody(mode, monkeypatch):
    """After an error and `zero_grad()`, those that were not stepped owe nothing for that step."""
    disk = FaultyDisk(monkeypatch)
    model = routed("disk")
    optimizer = TileOptimizer(model, torch.optim.AdamW, lr=0.1, mode=mode)
    x = next(steps_of(1))[0]
    train_routed(model, optimizer, [(x, [0, 1, 2])])
    disk.fail("read", 3)
    with pytest.raises(HomeIOError):
        train_routed(model, optimizer, [(x, [0, 1])])
    disk.mend()
    optimizer.zero_grad()
    optimizer.catch_up()

    assert [int(optimizer.state[tile]["step"]) for tile in tiles_of(model)[2:]] == [1, 1, 1]


def test_a_graph_from_before_the_step_is_refused():
    """A tile that owes a step counts as written: an older graph through it raises, as dense."""
    model, optimizer, x = trained_routed("disk")
    older = model(x, [0]).sum()
    train_routed(model, optimizer, [(x, [1])])

    with pytest.raises(ParkedError, match="modified between its forward"):
        older.backward()


def test_an_evaluation_in_inference_mode_replays():
    """State that is made while inference mode is on can be stepped afterwards."""
    results = []
    for evaluates in (False, True):
        model = routed("disk")
        optimizer, schedule = scheduled_optimizer(model)
        for step in steps_of(8):
            train_routed(model, optimizer, [step], [schedule])
            if evaluates:
                with torch.inference_mode():
                    model(step[0], range(EXPERTS))
        results.append(routed_values(model))

    assert same(*results)


def test_what_a_dropped_optimizer_owes_is_still_applied():
    """Without the optimizer values come out the same; its memory is freed with what it owed."""
    kept, dropped = routed("disk"), routed("disk")
    x = next(steps_of(1))[0]
    for model in (kept, dropped):
        optimizer = TileOptimizer(model, torch.optim.AdamW, lr=0.1)
        train_routed(model, optimizer, [(x, [0, 1]), (x, [1]), (x, [2])])
        if model is kept:
            optimizer.catch_up()
    state = weakref.ref(optimizer.state[tiles_of(dropped)[0]]["exp_avg"])
    del optimizer
    gc.collect()
    assert state() is not None

    assert same(routed_values(dropped), routed_values(kept))
    assert state() is None
    tile = weakref.ref(tiles_of(dropped)[0])
    del model, dropped
    gc.collect()
    assert tile() is None


def test_a_dropped_model_is_freed_with_what_it_owes():
    """Neither optimizer nor model is kept alive by steps that were put off."""
    for order in (True, False):
        model = routed("disk")
        optimizer = TileOptimizer(model, torch.optim.AdamW)
        train_routed(model, optimizer, steps_of(3))
        tile = weakref.ref(tiles_of(model)[0])
        if order:
            del optimizer, model
        else:
            model.trainer = optimizer  # a circle
            del model, optimizer
        gc.collect()
        assert tile() is None


def test_a_forward_applies_what_a_dropped_optimizer_owes():
    """After an evaluation the newest values are at home for everybody."""
    kept, dropped = routed("disk"), routed("disk")
    x = next(steps_of(1))[0]
    outputs = []
    for model in (kept, dropped):
        optimizer = TileOptimizer(model, torch.optim.AdamW, lr=0.1)
        train_routed(model, optimizer, [(x, [0, 1]), (x, [1]), (x, [2])])
        if model is kept:
            optimizer.catch_up()
        del optimizer
        with torch.no_grad():
            outputs.append(model(x, range(EXPERTS)))

    assert torch.equal(*outputs)
    assert all(map(torch.equal, tiles_of(dropped), tiles_of(kept)))


@pytest.mark.parametrize("adds", [False, True])
def test_another_optimizer_begins_where_the_first_one_ended(adds):
    """What the first one owes is applied when the second one takes its parameters."""
    models = routed("disk"), routed("disk")
    x = next(steps_of(1))[0]
    for model in models:
        first = TileOptimizer(model, torch.optim.AdamW, lr=0.1)
        train_routed(model, first, [(x, [0, 1]), (x, [1])])
        if model is models[0]:
            first.catch_up()
        elif adds:
            second = TileOptimizer(model, torch.optim.SGD, params=model.inner.parameters(), lr=0.1)
            second.add_param_group({"params": model.experts.parameters()})
        else:
            second = TileOptimizer(model, torch.optim.SGD, lr=0.1)

    assert all(map(torch.equal, *map(tiles_of, models)))
    del first, second


def test_options_that_stay_cost_nothing_and_old_ones_are_dropped(monkeypatch):
    """Equal options are kept once; a tile that lags behind too many different ones catches up."""
    monkeypatch.setattr(idle, "MAX_RUNS", 8)
    model = routed("disk")
    optimizer = TileOptimizer(model, torch.optim.AdamW, lr=0.1)
    (stack,) = optimizer._idle._tiles
    x = next(steps_of(1))[0]
    train_routed(model, optimizer, [(x, [0, 1])] * 20)
    assert len(stack.runs) == 1
    for number in range(40):
        optimizer.param_groups[0]["lr"] = 0.1 / (number + 1)
        train_routed(model, optimizer, [(x, [0])])
        assert len(stack.runs) <= 9

    reference = dense_routed()
    plain = torch.optim.AdamW(reference.parameters(), lr=0.1)
    train_routed(reference, plain, [(x, [0, 1])] * 20)
    for number in range(40):
        plain.param_groups[0]["lr"] = 0.1 / (number + 1)
        train_routed(reference, plain, [(x, [0])])
    assert largest_difference(routed_values(model), dict(reference.named_parameters())) < 1e-6


@pytest.mark.parametrize("home", ROUTED_HOMES)
def test_a_tile_that_is_frozen_is_not_moved(home):
    """A frozen expert owes what it owed before, and nothing for the steps after."""
    model, optimizer, x = trained_routed(home, [0, 1], [0, 1])
    tiles_of(model)[4].requires_grad_(False)
    train_routed(model, optimizer, [(x, [0])] * 3)
    optimizer.catch_up()

    steps = [int(optimizer.state[tile]["step"]) for tile in tiles_of(model)]
    assert steps == [5, 5, 5, 5, 2]


def test_a_double_backward_sees_replayed_values():
    """`create_graph=True` reads the tile where it lies, after its idle steps."""
    results = []
    for caught_up in (False, True):
        model = routed("disk")
        optimizer = TileOptimizer(model, torch.optim.AdamW, lr=0.1)
        x = next(steps_of(1))[0].requires_grad_()
        train_routed(model, optimizer, [(x.detach(), [0, 1]), (x.detach(), [1])])
        if caught_up:
            optimizer.catch_up()
        (gradient,) = torch.autograd.grad(model(x, [0]).square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(gradient.square().sum(), x)[0])

    assert torch.equal(*results)


def test_models_without_experts_put_nothing_off():
    """Nothing is counted, asked or kept for a model without routed layers."""
    optimizer = TileOptimizer(torch.nn.Linear(WIDTH, 3), torch.optim.AdamW)

    assert not optimizer._idle


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    """Saved with steps put off and resumed in another home, the run goes on bit for bit."""
    steps, ends = list(steps_of(20)), []
    whole = routed("disk")
    optimizer, schedule = scheduled_optimizer(whole)
    train_routed(whole, optimizer, steps, [schedule])
    for home, mode in (("disk", "in_backward"), ("host", "classic"), ("none", "classic")):
        saved = routed("disk")
        first, first_schedule = scheduled_optimizer(saved, mode=mode)
        train_routed(saved, first, steps[:9], [first_schedule])
        memtile.save_training(tmp_path / home, saved, first, first_schedule, step=9)
        resumed = routed(home)
        second, second_schedule = scheduled_optimizer(resumed, mode=mode)
        train_routed(resumed, second, steps[:3])
        memtile.resume_training(tmp_path / home, resumed, second, second_schedule)
        train_routed(resumed, second, steps[9:], [second_schedule])
        ends.append({**routed_values(resumed), **state_of(second)})

    assert all(same(end, {**routed_values(whole), **state_of(optimizer)}) for end in ends)


def test_a_saved_state_dict_goes_on(tmp_path):
    """An optimizer's state dict, and a saved model, have what was put off in them."""
    steps = list(steps_of(20))
    whole, again = routed("disk"), routed("disk")
    optimizer, schedule = scheduled_optimizer(whole)
    train_routed(whole, optimizer, steps[:9], [schedule])
    memtile.save_checkpoint(whole, tmp_path)
    second, second_schedule = scheduled_optimizer(again)
    train_routed(again, second, steps[:4])
    memtile.load_checkpoint(again, tmp_path)
    second.load_state_dict(optimizer.state_dict())
    second_schedule.load_state_dict(schedule.state_dict())
    for model, own, own_schedule in (
        (whole, optimizer, schedule),
        (again, second, second_schedule),
    ):
        train_routed(model, own, steps[9:], [own_schedule])

    assert same(routed_values(again), routed_values(whole))


@pytest.mark.parametrize("home", ["host", "disk"])
def test_threads_apply_what_is_owed_once(home):
    """Forwards in several threads at once replay each tile once."""
    results = []
    for threads in (1, 4):
        model, _optimizer, x = trained_routed(home, range(EXPERTS), [0], [0], [0])
        with ThreadPoolExecutor(threads) as pool:
            outputs = list(pool.map(partial(model, x), [range(EXPERTS)] * 8))
        results.append(routed_values(model))
        assert all(torch.equal(output, outputs[0]) for output in outputs)

    assert same(*results)
