"""Experts without tokens: they end up as in the dense model, and cost no traffic meanwhile."""

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
    backward,
    dense_routed,
    routed,
    routed_values,
    steps_of,
    tiles_of,
    train_routed,
)
from small_training import MODES, Lion, same

import memtile
from memtile import DiskHome, TileOptimizer
from memtile.errors import ArgumentError, HomeIOError, OptimizerError, ParkedError
from memtile.homes import allocation_of
from memtile.optim import idle
from memtile.transfer import catch_up, rings_of

WAVE = (lambda step: 0.2 + (step % 7) / 5, lambda step: 1.0 if step < 20 else 0.3)


def _optimizer(model, made=TileOptimizer, optimizer_class=torch.optim.AdamW, **options):
    """Two groups with options of their own, and a schedule."""
    options.setdefault("lr", 0.05)
    groups = [
        {"params": list(model.inner.parameters())},
        {"params": list(model.experts.parameters()), "lr": 2 * options["lr"]},
    ]
    if made is TileOptimizer:
        optimizer = made(model, optimizer_class, params=groups, **options)
    else:
        optimizer = optimizer_class(groups, **options)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, list(WAVE))


@torch.no_grad()
def _differs(ours, theirs):
    """The largest difference of two tables' tensors, relative to the largest value of each."""
    assert ours.keys() == theirs.keys()
    largest = {name: float(value.abs().max()) or 1.0 for name, value in theirs.items()}
    differ = {name: float((ours[name] - theirs[name]).abs().max()) for name in theirs}
    return max((differ[name] / largest[name] for name in theirs), default=0.0)


ADAMW = {"lr": 0.05, "weight_decay": 0.3}
OPTIMIZERS = {
    "AdamW": (torch.optim.AdamW, ADAMW),
    "amsgrad, maximize": (torch.optim.AdamW, {**ADAMW, "amsgrad": True, "maximize": True}),
    "foreach": (torch.optim.AdamW, {**ADAMW, "foreach": True}),
    "fused": (torch.optim.AdamW, {**ADAMW, "fused": True}),
    "Adam": (torch.optim.Adam, {"lr": 0.05, "weight_decay": 0.1}),
    "SGD": (torch.optim.SGD, {"lr": 2e-3, "momentum": 0.9, "weight_decay": 0.1}),
    "plain SGD": (torch.optim.SGD, {"lr": 2e-3}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.05, "weight_decay": 0.1}),
    "Lion": (Lion, {"lr": 0.01}),
}


def _state(optimizer):
    """All entries of a dense state."""
    state = optimizer.state_dict()["state"]
    return {f"{n}.{key}": value for n, entry in state.items() for key, value in entry.items()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("home", "kind"),
    [
        *((home, "AdamW") for home in ROUTED_HOMES),
        *(("disk", kind) for kind in OPTIMIZERS if kind != "AdamW"),
    ],
)
def test_it_equals_dense_at_every_save(home, mode, kind):
    """50 steps of two groups with a schedule: values and state within 1e-6 of dense at 4 saves."""
    cls, options = OPTIMIZERS[kind]
    dense, model = dense_routed(), routed(home)
    plain, plain_schedule = _optimizer(dense, None, cls, **options)
    optimizer, schedule = _optimizer(model, TileOptimizer, cls, mode=mode, **options)
    steps = list(steps_of(50))
    for first, last in ((0, 1), (1, 18), (18, 19), (19, 50)):
        train_routed(dense, plain, steps[first:last], [plain_schedule])
        train_routed(model, optimizer, steps[first:last], [schedule])

        assert _differs(routed_values(model), dict(dense.named_parameters())) < 1e-6
        assert _differs(_state(optimizer), _state(plain)) < 1e-6


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masters", [True, False])
def test_a_replay_has_the_bits_of_steps_with_gradients_of_zeros(mode, dtype, masters):
    """Steps that are put off come out as those of a run that is given zeros, in 16 bits too."""
    results = []
    for puts_off in (True, False):
        model = routed("disk", dtype)
        optimizer, schedule = _optimizer(model, masters=masters, mode=mode)
        for step in steps_of(12):
            backward(model, step)
            for tile in [] if puts_off else tiles_of(model):
                if tile.grad is None and tile not in optimizer._stepped:
                    tile.grad = torch.zeros_like(tile)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        results.append({**routed_values(model), **_state(optimizer)})

    assert same(*results)


@pytest.mark.parametrize("mode", MODES)
def test_a_step_moves_only_what_is_hit(mode):
    """The bytes of a step are those of the experts hit, and of the moments that they missed."""
    home = DiskHome()
    model = routed(home)
    optimizer = TileOptimizer(model, torch.optim.AdamW, mode=mode)
    step, room = next(steps_of(1))[0], allocation_of(tiles_of(model)[0]).room
    train_routed(model, optimizer, [(step, [0, 1, 2])])
    optimizer.catch_up()
    before = home.traffic
    train_routed(model, optimizer, [(step, [0])] * 10)
    after = home.traffic

    # forward and backward share a slab; the step reads value and moments (and gradient)
    reads, writes = ((1 + 4), (1 + 3)) if mode == "classic" else ((1 + 2), 3)
    assert after.read_bytes - before.read_bytes == 10 * reads * room
    assert after.written_bytes - before.written_bytes == 10 * writes * room
    optimizer.catch_up()
    assert home.traffic.read_bytes - after.read_bytes == (EXPERTS - 1) * 3 * room
    assert home.traffic.written_bytes - after.written_bytes == (EXPERTS - 1) * 3 * room


@pytest.mark.parametrize("mode", MODES)
def test_an_expert_that_comes_back_is_read_once(mode):
    """What an expert owes is applied to the value that the forward has read, and written once."""
    home = DiskHome()
    model = routed(home)
    optimizer = TileOptimizer(model, torch.optim.AdamW, mode=mode)
    x, room = next(steps_of(1))[0], allocation_of(tiles_of(model)[0]).room
    train_routed(model, optimizer, [(x, [0]), (x, [1]), (x, [1])])
    rings_of(home).weights.flush()
    before = home.traffic
    with torch.no_grad():
        model(x, [0])
    rings_of(home).flush()

    assert home.traffic.read_bytes - before.read_bytes == 3 * room
    assert home.traffic.written_bytes - before.written_bytes == 3 * room


@pytest.mark.parametrize("home", ROUTED_HOMES)
def test_a_stack_without_any_gradient_is_not_stepped(home):
    """As torch leaves parameters out that have no gradient, so a stack of which no tile has one."""
    model = routed(home)
    optimizer = TileOptimizer(model, torch.optim.AdamW, lr=0.1)
    before = routed_values(model)
    for parameter in model.inner.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()

    after = routed_values(model)
    assert torch.equal(after["experts.weight"], before["experts.weight"])
    assert not torch.equal(after["inner.weight"], before["inner.weight"])


@pytest.mark.parametrize("home", ROUTED_HOMES)
def test_skipped_experts_stay_as_they_are(home, tmp_path):
    """With idle="skip" an expert without a gradient is not moved; only weights can be saved."""
    model = routed(home)
    optimizer = TileOptimizer(model, torch.optim.AdamW, lr=0.1, idle="skip")
    before = [tile.detach().clone() for tile in tiles_of(model)]
    x = next(steps_of(1))[0]
    train_routed(model, optimizer, [(x, [1])] * 3)
    model(x, [0, 2])

    assert [torch.equal(*pair) for pair in zip(before, tiles_of(model), strict=True)] == [
        True, False, True, True, True,
    ]  # fmt: skip
    with pytest.raises(OptimizerError, match="there is no dense state of it"):
        optimizer.state_dict()
    with pytest.raises(OptimizerError, match="idle='skip' only the weights can be saved"):
        memtile.save_training(tmp_path, model, optimizer, step=3)
    memtile.save_checkpoint(model, tmp_path)
    with pytest.raises(ArgumentError, match="idle='sparse' must be 'replay'"):
        TileOptimizer(model, torch.optim.AdamW, idle="sparse")


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
    model = routed("disk")
    optimizer = TileOptimizer(model, torch.optim.AdamW, lr=0.1)
    x = next(steps_of(1))[0]
    train_routed(model, optimizer, [(x, [0, 1]), (x, [1]), (x, [1])])
    READS[read](model, tmp_path)
    seen = tiles_of(model)[0].detach().clone()

    assert optimizer.state[tiles_of(model)[0]]["step"] == 3
    optimizer.catch_up()
    assert torch.equal(seen, tiles_of(model)[0])


def test_loaded_values_are_not_stepped_by_what_was_owed_before():
    """Values that are loaded stay; the state gets the steps that were put off."""
    model = routed("disk")
    optimizer = TileOptimizer(model, torch.optim.AdamW, lr=0.1)
    x = next(steps_of(1))[0]
    train_routed(model, optimizer, [(x, [0, 1]), (x, [1]), (x, [1])])
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
        optimizer, schedule = _optimizer(model)
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
    model = routed("disk")
    optimizer = TileOptimizer(model, torch.optim.AdamW, lr=0.1)
    x = next(steps_of(1))[0]
    older = model(x, [0]).sum()
    train_routed(model, optimizer, [(x, [1])])

    with pytest.raises(ParkedError, match="modified between its forward"):
        older.backward()


def test_an_evaluation_in_inference_mode_replays():
    """State that is made while inference mode is on can be stepped afterwards."""
    results = []
    for evaluates in (False, True):
        model = routed("disk")
        optimizer, schedule = _optimizer(model)
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
    assert _differs(routed_values(model), dict(reference.named_parameters())) < 1e-6


@pytest.mark.parametrize("home", ROUTED_HOMES)
def test_a_tile_that_is_frozen_is_not_moved(home):
    """A frozen expert owes what it owed before, and nothing for the steps after."""
    model = routed(home)
    optimizer = TileOptimizer(model, torch.optim.AdamW, lr=0.1)
    x = next(steps_of(1))[0]
    train_routed(model, optimizer, [(x, [0, 1])] * 2)
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


def test_groups_that_are_added_put_off_too():
    """Experts that `add_param_group` adds equal dense from then on."""
    dense, model = dense_routed(), routed("disk")
    made = partial(torch.optim.AdamW, lr=0.1), partial(TileOptimizer, model, torch.optim.AdamW)
    plain = made[0](dense.inner.parameters())
    optimizer = made[1](params=model.inner.parameters(), lr=0.1)
    steps = list(steps_of(9))
    for trained, stepped in ((dense, plain), (model, optimizer)):
        train_routed(trained, stepped, steps[:4])
        stepped.zero_grad()
        trained.experts.zero_grad()
        stepped.add_param_group({"params": list(trained.experts.parameters()), "lr": 0.02})
        train_routed(trained, stepped, steps[4:])

    assert _differs(routed_values(model), dict(dense.named_parameters())) < 1e-6


def test_models_without_experts_put_nothing_off():
    """Nothing is counted, asked or kept for a model without routed layers."""
    optimizer = TileOptimizer(torch.nn.Linear(WIDTH, 3), torch.optim.AdamW)

    assert not optimizer._idle


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    """Saved with steps put off and resumed in another home, the run goes on bit for bit."""
    steps, ends = list(steps_of(20)), []
    whole = routed("disk")
    optimizer, schedule = _optimizer(whole)
    train_routed(whole, optimizer, steps, [schedule])
    for home, mode in (("disk", "in_backward"), ("host", "classic"), ("none", "classic")):
        saved = routed("disk")
        first, first_schedule = _optimizer(saved, mode=mode)
        train_routed(saved, first, steps[:9], [first_schedule])
        memtile.save_training(tmp_path / home, saved, first, first_schedule, step=9)
        resumed = routed(home)
        second, second_schedule = _optimizer(resumed, mode=mode)
        train_routed(resumed, second, steps[:3])
        memtile.resume_training(tmp_path / home, resumed, second, second_schedule)
        train_routed(resumed, second, steps[9:], [second_schedule])
        ends.append({**routed_values(resumed), **_state(second)})

    assert all(same(end, {**routed_values(whole), **_state(optimizer)}) for end in ends)


def test_a_saved_state_dict_goes_on(tmp_path):
    """An optimizer's state dict, and a saved model, have what was put off in them."""
    steps = list(steps_of(20))
    whole, again = routed("disk"), routed("disk")
    optimizer, schedule = _optimizer(whole)
    train_routed(whole, optimizer, steps[:9], [schedule])
    memtile.save_checkpoint(whole, tmp_path)
    second, second_schedule = _optimizer(again)
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
        model = routed(home)
        optimizer = TileOptimizer(model, torch.optim.AdamW, lr=0.1)
        x = next(steps_of(1))[0]
        train_routed(model, optimizer, [(x, range(EXPERTS))] + [(x, [0])] * 3)
        with ThreadPoolExecutor(threads) as pool:
            outputs = list(pool.map(partial(model, x), [range(EXPERTS)] * 8))
        results.append(routed_values(model))
        assert all(torch.equal(output, outputs[0]) for output in outputs)

    assert same(*results)
