"""Parameter groups, schedulers, closures: all that a loop does with a torch optimizer."""

from typing import Any

import pytest
import torch
from small_training import (
    MODES,
    batches,
    in_home,
    loss_of,
    optimizer_for,
    same,
    small,
    train,
    values,
)
from torch import Tensor, nn, optim
from torch.optim import lr_scheduler

import memtile
from memtile import TileOptimizer
from memtile.errors import ArgumentError, OptimizerError
from memtile.homes import allocation_of

STEPS = 3


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    """Decay for matrices, none for the rest, and another lr for the layer that is called twice."""
    own = list(model.twice.parameters())
    rest = [p for p in model.parameters() if not any(p is other for other in own)]
    return [
        {"params": [p for p in rest if p.dim() > 1], "weight_decay": 0.3},
        {"params": [p for p in rest if p.dim() == 1], "weight_decay": 0.0},
        {"params": own, "lr": 0.002},
    ]


def _plain(make: Any, between: Any = None) -> list[float]:
    model = small()
    optimizer = make(model)
    return train(model, optimizer, batches(STEPS), between(optimizer) if between else lambda: None)


@pytest.mark.parametrize("mode", MODES)
def test_groups_have_their_own_options(mode):
    """Decay, no decay and another lr: losses are those of plain torch with the same groups."""
    plain = _plain(lambda model: optim.AdamW(_groups(model), lr=0.01))
    runs = []
    for home in ("device", "disk"):
        model = in_home(small(), home)
        optimizer = optimizer_for(model, mode=mode, params=_groups(model), lr=0.01)
        runs.append((train(model, optimizer, batches(STEPS)), values(model)))

    assert runs[0][0] == runs[1][0] == pytest.approx(plain, rel=1e-5)
    assert same(runs[0][1], runs[1][1])


@pytest.mark.parametrize("mode", MODES)
def test_a_group_that_is_added_later_trains_from_then_on(mode):
    """Parameters added by `add_param_group` after steps train with its options from then on."""

    def run(model: nn.Module, make: Any) -> list[float]:
        late = list(model.up.parameters())
        first = [p for p in model.parameters() if not any(p is other for other in late)]
        optimizer = make(first)
        before = [p.detach().clone() for p in late]
        losses = train(model, optimizer, batches(2))
        assert all(map(torch.equal, late, before))
        model.zero_grad()
        optimizer.add_param_group({"params": late, "lr": 0.02})
        losses += train(model, optimizer, batches(2, seed=5))
        assert not any(map(torch.equal, late, before))
        return losses

    plain = run(small(), lambda params: optim.AdamW(params, lr=0.01))
    model = in_home(small(), "disk")
    ours = run(model, lambda params: optimizer_for(model, mode=mode, params=params))

    assert ours == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step),
        lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=9),
        lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=5),
    ],
    ids=["lambda", "one cycle", "cosine"],
)
def test_schedulers(schedule, mode):
    """Schedulers set lr and betas as with plain torch, without a warning."""

    def run(model: nn.Module, optimizer: optim.Optimizer) -> tuple[list[float], Any]:
        scheduler = schedule(optimizer)
        losses = train(model, optimizer, batches(STEPS), scheduler.step)
        group = optimizer.param_groups[0]
        return losses, (group["lr"], group["betas"])

    model, dense = in_home(small(), "disk"), small()

    losses, group = run(model, optimizer_for(model, mode=mode))
    plain, theirs = run(dense, optim.AdamW(dense.parameters(), lr=0.01))

    assert losses == pytest.approx(plain, rel=1e-5)
    assert group == theirs


@pytest.mark.parametrize("mode", MODES)
def test_lr_may_be_a_tensor(mode):
    """An lr that is a tensor and was changed in place is what the next step uses."""

    def run(model: nn.Module, make: Any) -> list[float]:
        lr = torch.tensor(0.01)
        optimizer = make(lr)
        return train(model, optimizer, batches(STEPS), lambda: lr.mul_(0.5))

    model, dense = in_home(small(), "disk"), small()

    ours = run(model, lambda lr: optimizer_for(model, optim.Adam, mode=mode, lr=lr))
    plain = run(dense, lambda lr: optim.Adam(dense.parameters(), lr=lr))

    assert ours == pytest.approx(plain, rel=1e-5)


def test_zero_grad_can_keep_gradients_as_zeros():
    """`set_to_none=False` zeroes gradients in their home, and the next ones are added."""
    runs = []
    for to_none in (True, False):
        model = in_home(small(), "disk")
        optimizer = optimizer_for(model)
        for ids in batches(STEPS):
            loss_of(model, ids).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)
        runs.append(values(model))
        gradients = [parameter.grad for parameter in model.parameters()]

    assert same(*runs)
    assert all(gradient is not None and not gradient.any() for gradient in gradients)
    assert all(allocation_of(tile.weight.grad) for _, tile in model.up.tiles())


def test_set_to_none_gives_the_room_back():
    """Dropped gradients free their room: steps do not make the home grow."""
    model = in_home(small(), "disk")
    optimizer = optimizer_for(model)
    (home,) = {tile.home for _, tile in model.up.tiles()}
    train(model, optimizer, batches(1))
    before = home._segments._all[-1].offset, len(home._segments._all), home._file.size

    train(model, optimizer, batches(4))

    assert (home._segments._all[-1].offset, len(home._segments._all), home._file.size) == before


@pytest.mark.parametrize("mode", MODES)
def test_a_subset_of_the_parameters(mode):
    """With params=…, the others stay, keep their gradients, and have no state."""
    model = in_home(small(), "disk")
    chosen = list(model.down.parameters())
    others = [p for p in model.parameters() if not any(p is each for each in chosen)]
    before = [p.detach().clone() for p in others]
    optimizer = optimizer_for(model, mode=mode, params=(p for p in chosen))

    loss_of(model, batches(1)[0]).backward()
    optimizer.step()

    assert all(map(torch.equal, others, before))
    assert all(p.grad is not None for p in others)
    assert set(optimizer.state) == set(chosen)


def test_named_parameters_are_taken():
    """Pairs of name and parameter are taken as torch takes them, and the names are kept."""
    model = in_home(small(), "disk")
    optimizer = optimizer_for(model, params=list(model.named_parameters()))

    train(model, optimizer, batches(1))

    assert optimizer.param_groups[0]["param_names"] == [n for n, _ in model.named_parameters()]


@pytest.mark.parametrize("mode", MODES)
def test_a_closure_is_called_with_gradients_on(mode):
    """`step(closure)` gives the closure's loss and steps with its gradients, also in no_grad."""
    model, expected = in_home(small(), "disk"), in_home(small(), "disk")
    (ids,) = batches(1)
    optimizer = optimizer_for(model, mode=mode)
    plain = train(expected, optimizer_for(expected, mode=mode), [ids])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, ids)
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)

    assert loss.item() == plain[0]
    assert same(values(model), values(expected))


@pytest.mark.parametrize("mode", MODES)
def test_hooks_on_the_step_are_called_once(mode):
    """torch's own hooks before and after `step()` are called once a step, not once a tile."""
    model = in_home(small(), "disk")
    optimizer, called = optimizer_for(model, mode=mode), []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))

    train(model, optimizer, batches(2))

    assert called == ["before", "after"] * 2


@pytest.mark.parametrize("overflows", [False, True])
def test_gradscaler_drives_it(overflows):
    """`torch.amp.GradScaler` unscales gradients at home; a step with an overflow is skipped."""
    model, expected, (ids,) = in_home(small(), "disk"), in_home(small(), "disk"), batches(1)
    optimizer, scaler = optimizer_for(model), torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = values(model)
    train(expected, optimizer_for(expected), [ids])

    scaler.scale(loss_of(model, ids)).backward()
    if overflows:
        model.up.tile(0, 0).weight.grad[0, 0] = float("inf")
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()

    assert scaler.get_scale() == (512.0 if overflows else 1024.0)
    assert same(values(model), before if overflows else values(expected))


@pytest.mark.parametrize("unscales", [False, True])
def test_gradscaler_is_refused_in_backward(unscales):
    """Its `step` raises an error of ours, the first time; a disabled scaler changes nothing."""
    model, (ids,) = in_home(small(), "disk"), batches(1)
    optimizer = optimizer_for(model, mode="in_backward")
    disabled, scaler = (torch.amp.GradScaler("cpu", enabled=each) for each in (False, True))
    disabled.scale(loss_of(model, ids)).backward()
    disabled.step(optimizer)

    scaler.scale(loss_of(model, ids)).backward()
    if unscales:
        scaler.unscale_(optimizer)

    with pytest.raises(OptimizerError, match=r"stepped in it, by the scaled ones.*mode='classic'"):
        scaler.step(optimizer)


@pytest.mark.parametrize("name", ["Muon", "LBFGS", "Adafactor"])
def test_optimizers_that_are_not_element_wise_are_refused(name):
    """They are refused by name before the model is changed."""
    if not hasattr(optim, name):
        pytest.skip(f"this torch has no {name}")

    with pytest.raises(OptimizerError, match=name):
        TileOptimizer(small(), getattr(optim, name))


def test_an_unknown_mode_is_refused():
    """An unknown mode is refused; the message has the known ones."""
    with pytest.raises(ArgumentError, match=r"mode='deferred' must be 'classic' .* or 'in_b"):
        TileOptimizer(small(), optim.AdamW, mode="deferred")


def test_parameters_in_the_place_of_the_model_are_refused():
    """`TileOptimizer(model.parameters(), …)` is refused; the message says what to give."""
    with pytest.raises(ArgumentError, match=r"a generator; TileOptimizer takes the model itself,"):
        TileOptimizer(small().parameters(), optim.AdamW)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"lr": -1.0}, "Invalid learning rate"),
        ({"momentum": 0.9}, "unexpected keyword argument 'momentum'"),
        ({"differentiable": True}, "differentiable=True"),
    ],
    ids=["value", "name", "differentiable"],
)
def test_options_that_the_class_does_not_take_are_refused(options, reason):
    """Options go to the optimizer's class; its refusal and reason are in the message."""
    with pytest.raises(OptimizerError, match=reason):
        TileOptimizer(small(), optim.AdamW, **options)


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        (lambda own: [], "empty parameter list"),
        (lambda own: [{"params": own}, {"params": own[:1]}], "in more than one parameter group"),
        (lambda own: 5, "not iterable"),
        (lambda own: [own[0] * 2], "non-leaf"),
    ],
)
def test_what_torch_takes_for_no_parameters_is_refused(params, reason):
    """torch's reason comes in an error of ours, with what to give."""
    model = small()

    with pytest.raises(OptimizerError, match=f"{reason}.*give parameters of the model, or groups"):
        TileOptimizer(model, optim.AdamW, params=params(list(model.parameters())))


@pytest.mark.parametrize("mode", MODES)
def test_a_group_of_other_parameters_is_refused_when_it_is_added(mode):
    """The error comes at once and names the cause; nothing was added, and training goes on."""
    model, expected, (ids,) = in_home(small(), "disk"), in_home(small(), "disk"), batches(1)
    optimizer = optimizer_for(model, mode=mode)

    with pytest.raises(OptimizerError, match="not of this"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    with pytest.raises(OptimizerError, match="in more than one parameter group"):
        optimizer.add_param_group({"params": [next(model.parameters())]})

    assert len(optimizer.param_groups) == 1
    train(model, optimizer, [ids])
    train(expected, optimizer_for(expected, mode=mode), [ids])
    assert same(values(model), values(expected))


def _two_linears():
    torch.manual_seed(0)
    return memtile.tile(
        nn.Sequential(nn.Linear(11, 17), nn.Linear(17, 3)), out_splits=2, home="host"
    )


def test_parameters_of_another_model_are_refused():
    """Parameters that are not the model's, for example from before tiling, are refused."""
    with pytest.raises(OptimizerError, match="not of this Sequential"):
        TileOptimizer(_two_linears(), optim.SGD, params=nn.Linear(3, 3).parameters(), lr=0.1)


@pytest.mark.parametrize("mode", ["classic", "in_backward"])
def test_a_second_optimizer_beside_one_that_steps_in_backward_is_refused(mode):
    """A second optimizer beside an in-backward one is refused until the first is dropped."""
    ours = _two_linears()
    first = TileOptimizer(ours, optim.SGD, mode="in_backward", lr=0.1)

    with pytest.raises(OptimizerError, match="del optimizer"):
        TileOptimizer(ours, optim.SGD, mode=mode, lr=0.1)

    del first
    TileOptimizer(ours, optim.SGD, mode=mode, lr=0.1)


def test_an_optimizer_of_parameters_that_were_replaced_refuses_to_step():
    """An optimizer from before tiling or untiling raises in `step` instead of training nothing."""
    ours = nn.Sequential(nn.Linear(11, 17), nn.Linear(17, 3))
    early = TileOptimizer(ours, optim.SGD, lr=0.1)
    memtile.tile(ours, out_splits=2, home="host")
    ours(torch.ones(2, 11)).sum().backward()

    with pytest.raises(OptimizerError, match=r"after memtile\.tile"):
        early.step()


def test_parameters_without_values_are_refused():
    """A model on the meta device is refused; the message says how to load values."""
    empty = memtile.empty_model(lambda: nn.Sequential(nn.Linear(11, 17), nn.Linear(17, 3)))

    with pytest.raises(OptimizerError, match="load_checkpoint"):
        TileOptimizer(empty, optim.SGD, lr=0.1)
