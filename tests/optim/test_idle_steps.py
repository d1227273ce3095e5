"""Experts without tokens: they end up as in the dense model, and cost no traffic meanwhile."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from routed_layers import (
    EXPERTS,
    ROUTED_HOMES,
    backward,
    dense_routed,
    largest_difference,
    routed,
    routed_values,
    scheduled_optimizer,
    state_of,
    steps_of,
    tiles_of,
    train_routed,
)
from small_training import MODES, Lion, same

import memtile
from memtile import DiskHome, TileOptimizer
from memtile.errors import ArgumentError, OptimizerError
from memtile.homes import allocation_of
from memtile.transfer import rings_of

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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("home", "kind"),
    [
        *((home, "AdamW") for home in ROUTED_HOMES),
        *(("disk", kind) for kind in OPTIMIZERS if kind != "AdamW"),
    ],
)
def test_it_equals_dense_at_every_save(home, mode, kind):
    """50 steps of two groups with a schedule: values and state within 1e-6 of dense at 4 saves.

    24 steps for other optimizers than AdamW: the rate of experts changes after 20.
    """
    cls, options = OPTIMIZERS[kind]
    dense, model = dense_routed(), routed(home)
    plain, plain_schedule = scheduled_optimizer(dense, None, cls, **options)
    optimizer, schedule = scheduled_optimizer(model, TileOptimizer, cls, mode=mode, **options)
    steps = list(steps_of(50))
    for first, last in pairwise((0, 1, 18, 19, 50 if kind == "AdamW" else 24)):
        train_routed(dense, plain, steps[first:last], [plain_schedule])
        train_routed(model, optimizer, steps[first:last], [schedule])

        assert largest_difference(routed_values(model), dict(dense.named_parameters())) < 1e-6
        assert largest_difference(state_of(optimizer), state_of(plain)) < 1e-6


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masters", [True, False])
def test_a_replay_has_the_bits_of_steps_with_gradients_of_zeros(mode, dtype, masters):
    """Steps that are put off come out as those of a run that is given zeros, in 16 bits too."""
    results = []
    for puts_off in (True, False):
        model = routed("disk", dtype)
        optimizer, schedule = scheduled_optimizer(model, masters=masters, mode=mode)
        for step in steps_of(12):
            backward(model, step)
            for tile in [] if puts_off else tiles_of(model):
                if tile.grad is None and tile not in optimizer._stepped:
                    tile.grad = torch.zeros_like(tile)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        results.append({**routed_values(model), **state_of(optimizer)})

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

    assert largest_difference(routed_values(model), dict(dense.named_parameters())) < 1e-6
