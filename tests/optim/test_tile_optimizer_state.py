"""The state dict is the plain optimizer's over the dense model: it is handed over, both ways."""

import copy
import gc
from typing import Any

import pytest
import torch
from small_training import (
    HOMES,
    MODES,
    batches,
    disk_of,
    in_home,
    loss_of,
    optimizer_for,
    same,
    small,
    train,
    values,
)
from torch import Tensor, nn, optim

from memtile import TileOptimizer, untile
from memtile.homes import allocation_of


class Turned(nn.Module):
    """Two of GPT-2's linears, which keep their weight as (in, out), and an ordinary head."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.embed, self.up, self.down = nn.Embedding(23, 10), Conv1D(13, 10), Conv1D(10, 13)
        self.head = nn.Linear(10, 23)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.down(torch.tanh(self.up(self.embed(ids)))))


class Element(optim.SGD):
    """An optimizer whose moment is the sum of all gradients: joined or not, the same bits."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                state.setdefault("count", 0)
                state.setdefault("total", torch.zeros_like(p))
                state["count"] += 1
                state["total"].add_(p.grad)
                p.sub_(state["total"], alpha=group["lr"])


def _dense(kind: str) -> nn.Module:
    torch.manual_seed(5)
    return small() if kind == "small" else Turned()


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    """Biases and norms apart, in another order than the model's."""
    small_ones = [p for p in model.parameters() if p.dim() == 1]
    matrices = [p for p in model.parameters() if p.dim() > 1]
    return [{"params": small_ones, "lr": 0.02}, {"params": matrices, "weight_decay": 0.1}]


def _give_gradients(model: nn.Module, dense: nn.Module, seed: int) -> None:
    """Put the same gradients before both: those of the dense model are cut along the tiles."""
    torch.manual_seed(seed)
    for parameter in dense.parameters():
        parameter.grad = torch.randn_like(parameter)
    for name, theirs in dense.named_modules():
        module = model.get_submodule(name)
        for key, parameter in theirs.named_parameters(recurse=False):
            if not hasattr(module, "grid"):
                module.get_parameter(key).grad = parameter.grad.clone()
                continue
            for index, part in module.tile_parameters(key).items():
                rect = module.tile_rect(key, index).index
                turned = key == "weight" and module.weight_is_transposed
                gradient = parameter.grad.t() if turned else parameter.grad
                part.grad = gradient[rect[: part.dim()]].clone(
                    memory_format=torch.contiguous_format
                )


def _equal(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(_equal(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(_equal, ours, theirs))
    return ours == theirs


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("kind", ["small", "turned"])
@pytest.mark.parametrize("optimizer_class", [optim.AdamW, Element])
def test_it_is_the_plain_optimizers(optimizer_class, kind, home, grouped):
    """With the same gradients the state dict equals torch's for the dense model."""
    dense, model = _dense(kind), in_home(_dense(kind), home)
    make = _groups if grouped else lambda model: list(model.parameters())
    plain = optimizer_class(make(dense), lr=0.01)
    ours = TileOptimizer(model, optimizer_class, params=make(model), lr=0.01)

    for step in range(2):
        _give_gradients(model, dense, seed=step)
        plain.step()
        ours.step()

    # elementwise operations on the CPU may round otherwise in a vector than in its tail
    assert _close(ours.state_dict(), plain.state_dict())
    if optimizer_class is Element:
        assert _equal(ours.state_dict(), plain.state_dict())


def _close(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, Tensor):
        eps = torch.finfo(ours.dtype).eps * (float(theirs.abs().max()) or 1.0)
        fits = ours.dtype == theirs.dtype and ours.shape == theirs.shape
        return fits and bool((ours - theirs).abs().max() <= 2 * eps)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(_close(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(_close, ours, theirs))
    return ours == theirs


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("kind", ["small", "turned"])
def test_it_can_be_taken_over_and_given_back(kind, home, grouped):
    """A plain optimizer's state, loaded and saved again, is the same bit for bit."""
    dense = _dense(kind)
    make = _groups if grouped else lambda model: list(model.parameters())
    plain = optim.AdamW(make(dense), lr=0.01, amsgrad=True)
    train(dense, plain, batches(2))
    model = in_home(dense, home)
    ours = TileOptimizer(model, optim.AdamW, params=make(model), lr=0.5, amsgrad=True)

    ours.load_state_dict(plain.state_dict())

    assert _equal(ours.state_dict(), plain.state_dict())
    if home == "disk":
        weight = model.up.tile(1, 1).weight
        assert allocation_of(ours.state[weight]["exp_avg"]).home is allocation_of(weight).home


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["small", "turned"])
def test_a_plain_run_goes_on_in_tiles_and_back(kind, mode):
    """Plain, then tiles, then plain again: the losses are those of one plain run."""
    dense, ids = _dense(kind), batches(6)
    whole = copy.deepcopy(dense)
    expected = train(whole, optim.AdamW(whole.parameters(), lr=0.01), ids)

    first = optim.AdamW(dense.parameters(), lr=0.01)
    losses = train(dense, first, ids[:2])
    model = in_home(dense, "disk")
    second = optimizer_for(model, mode=mode, lr=0.5)
    second.load_state_dict(first.state_dict())
    losses += train(model, second, ids[2:4])
    state = copy.deepcopy(second.state_dict())
    del second  # in backward mode it steps what is not tiled for as long as it is there
    dense = untile(model)
    third = optim.AdamW(dense.parameters(), lr=0.7)
    third.load_state_dict(state)
    losses += train(dense, third, ids[4:])

    assert losses == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("home", HOMES)
def test_it_goes_through_a_file(home, tmp_path):
    """`torch.save` writes it, `torch.load` reads it, and another grid goes on with it."""
    ids, model = batches(4), in_home(small(), home)
    optimizer = optimizer_for(model)
    train(model, optimizer, ids[:2])

    torch.save(optimizer.state_dict(), tmp_path / "state")
    loaded = torch.load(tmp_path / "state")

    assert (tmp_path / "state").stat().st_size < 100_000
    assert _equal(loaded, optimizer.state_dict())
    dense = small()
    dense.load_state_dict(values(model))
    other = in_home(dense, home, {"out_splits": 2})
    others = optimizer_for(other)
    others.load_state_dict(loaded)
    theirs = train(other, others, ids[2:])
    assert theirs == pytest.approx(train(model, optimizer, ids[2:]), rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_resuming_from_its_own_state_gives_the_same_bits(mode):
    """Saved and loaded into a new model and optimizer, the run goes on bit for bit."""
    ids = batches(4)
    model = in_home(small(), "disk")
    optimizer = optimizer_for(model, mode=mode)
    train(model, optimizer, ids[:2])
    weights, state = values(model), copy.deepcopy(optimizer.state_dict())
    expected = train(model, optimizer, ids[2:])

    again = in_home(small(), "disk")
    again.load_state_dict(weights)
    optimizer_again = optimizer_for(again, mode=mode)
    optimizer_again.load_state_dict(state)

    assert train(again, optimizer_again, ids[2:]) == expected
    assert same(values(again), values(model))


def test_of_a_disk_home_it_is_in_the_home():
    """Joined moments live in the home of their tiles, and their room is given back with them."""
    model = in_home(small(), "disk")
    optimizer, home = optimizer_for(model), disk_of(model)
    train(model, optimizer, batches(1))
    home.hold([1 << 20])
    before, weights = home._file.size, values(model)

    for _ in range(40):
        state = optimizer.state_dict()
    joined = [state["state"][n][k] for n in (0, 1, 5) for k in ("exp_avg", "exp_avg_sq")]

    assert all(allocation_of(tensor).home is home for tensor in joined)
    assert joined[0].untyped_storage().nbytes() == joined[0].nbytes
    del state, joined
    gc.collect()
    optimizer.state_dict()
    assert home._file.size == before
    assert same(values(model), weights)


def test_before_the_first_step_it_is_empty():
    """A new optimizer's state dict is a plain new one's, and loads as one."""
    dense, model = small(), in_home(small(), "disk")
    optimizer = optimizer_for(model)

    assert _equal(optimizer.state_dict(), optim.AdamW(dense.parameters(), lr=0.01).state_dict())
    train(model, optimizer, batches(1))
    optimizer.load_state_dict(optim.AdamW(dense.parameters(), lr=0.3).state_dict())
    assert not optimizer.state
    assert optimizer.param_groups[0]["lr"] == 0.3


def test_it_does_not_change_with_later_steps():
    """Joined tensors of a state dict are copies: a later step leaves them as they were."""
    model = in_home(small(), "disk")
    optimizer = optimizer_for(model)
    train(model, optimizer, batches(1))
    state = optimizer.state_dict()
    before = copy.deepcopy(state)

    train(model, optimizer, batches(1))

    assert _equal(state["state"][0], before["state"][0])


def test_a_gradient_on_its_way_does_not_matter():
    """Between backward and step the state dict is the one before the backward."""
    model = in_home(small(), "disk")
    optimizer = optimizer_for(model)
    train(model, optimizer, batches(1))
    before = copy.deepcopy(optimizer.state_dict())

    loss_of(model, batches(1)[0]).backward()

    assert _equal(optimizer.state_dict(), before)


@pytest.mark.parametrize("mode", MODES)
def test_without_state_it_is_empty_after_a_step_too(mode):
    """SGD without momentum has no state, and its state dict no entries."""
    model = in_home(small(), "disk")
    optimizer = optimizer_for(model, optim.SGD, mode=mode)

    train(model, optimizer, batches(1))

    assert optimizer.state_dict()["state"] == {}


def test_hooks_see_the_dense_state():
    """Hooks around `state_dict` and `load_state_dict` run in torch's order, on the dense form."""
    model, seen = in_home(small(), "disk"), []
    optimizer = optimizer_for(model)
    train(model, optimizer, batches(1))
    shape = (model.up.out_features, model.up.in_features)

    def changed(name):
        def hook(optimizer, state):
            seen.append((name, state["state"][1]["exp_avg"].shape == shape))
            return {**state, "state": dict(list(state["state"].items())[:-1]), name: True}

        return hook

    optimizer.register_state_dict_pre_hook(lambda _: seen.append("before"))
    optimizer.register_state_dict_post_hook(changed("after"))
    optimizer.register_load_state_dict_pre_hook(changed("loading"))
    optimizer.register_load_state_dict_post_hook(lambda own: seen.append(len(own.state)))
    left = len(optimizer.state) - len(list(model.down.parameters()))
    given = optimizer.state_dict()
    held = dict(given)
    optimizer.load_state_dict(given)

    assert seen == ["before", ("after", True), ("loading", True), left]
    assert given["after"]
    assert given == held


def test_a_hook_that_returns_nothing_changes_in_place():
    """A pre-hook's changes to its shallow copy are loaded; the caller's dictionary stays."""
    model = in_home(small(), "disk")
    optimizer = optimizer_for(model)
    packed = optimizer.state_dict()

    def faster(optimizer, state):
        state["param_groups"] = [{**state["param_groups"][0], "lr": 7.0}]

    optimizer.register_load_state_dict_pre_hook(faster)
    optimizer.load_state_dict(packed)

    assert optimizer.param_groups[0]["lr"] == 7.0
    assert packed["param_groups"][0]["lr"] != 7.0
