"""Whatever wrote to a parked weight, the next iteration uses what was written.

Each write is done to a model on disk and to the same model with resident tiles: they must agree bit
for bit. The iterations before have filled slabs, and learnt what to read ahead.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from parked_layers import (
    assert_same_bits,
    gradients_of,
    resident_and_parked,
    small_model,
    weights_of,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import memtile
from memtile.homes import DiskHome, HostHome, allocation_of
from memtile.testing import LargestAllocation

X = torch.randn(5, 13, generator=torch.Generator().manual_seed(3))
Writer = Callable[[nn.Module], None]


def other_values(seed: int) -> nn.Module:
    """The same architecture with other values, tiled alike."""
    return memtile.tile(small_model(seed), out_splits=3)


def copies(model: nn.Module) -> None:
    for p, other in zip(model.parameters(), other_values(5).parameters(), strict=True):
        p.data.copy_(other)


def swaps(model: nn.Module) -> None:
    for p, other in zip(model.parameters(), other_values(6).parameters(), strict=True):
        p.data = other.data


def swaps_and_back(model: nn.Module) -> None:
    kept = [p.data for p in model.parameters()]
    swaps(model)
    model(X)
    for p, own in zip(model.parameters(), kept, strict=True):
        p.data = own
        p.data.mul_(3)


@torch.no_grad()
def multiplies(model: nn.Module) -> None:
    for p in model.parameters():
        p.mul_(-2)


@torch.no_grad()
def multiplies_at_once(model: nn.Module) -> None:
    torch._foreach_mul_(list(model.parameters()), 0.3)


def writes_through_numpy(model: nn.Module) -> None:
    for p in model.parameters():
        p.detach().numpy()[...] += 1


def steps_with_a_foreign_optimizer(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for p in model.parameters():
        p.grad = p.detach().cos()
    optimizer.step()
    optimizer.zero_grad()


def loads_tiles(model: nn.Module) -> None:
    model.load_state_dict(other_values(7).state_dict())


def loads_tiles_assigning(model: nn.Module) -> None:
    model.load_state_dict(other_values(8).state_dict(), assign=True)


def loads_dense(model: nn.Module) -> None:
    model.load_state_dict(small_model(9).state_dict())


def loads_dense_assigning(model: nn.Module) -> None:
    model.load_state_dict(small_model(10).state_dict(), assign=True)


def initialises(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(4)
    for p in model.parameters():
        nn.init.uniform_(p, -1, 1, generator=generator)


def copies_a_layer(model: Any) -> None:
    dense = small_model(11)
    model[0].copy_params_from(dense[0])
    model[2].copy_params_from(dense[2])


def resets(model: Any) -> None:
    torch.manual_seed(12)
    model[0].reset_parameters()
    model[2].reset_parameters()


WRITERS = [
    copies,
    swaps,
    swaps_and_back,
    multiplies,
    multiplies_at_once,
    writes_through_numpy,
    steps_with_a_foreign_optimizer,
    loads_tiles,
    loads_tiles_assigning,
    loads_dense,
    loads_dense_assigning,
    initialises,
    copies_a_layer,
    resets,
]


def trains(model: nn.Module) -> dict[str, Tensor | None]:
    model.zero_grad()
    x = X.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return {"y": y.detach(), "x": x.grad, **gradients_of(model)}


def only_forwards(model: nn.Module) -> Tensor:
    return model(X).detach()


@torch.no_grad()
def evaluates(model: nn.Module) -> Tensor:
    return model.eval()(X)


@torch.inference_mode()
def infers(model: nn.Module) -> Tensor:
    return model(X)


def calls_layers_alone(model: Any) -> Tensor:
    return model[2](torch.tanh(model[0](X))).detach()


@torch.no_grad()
def calls_one_layer(model: Any) -> Tensor:
    return model[0](X)


def checkpoints(model: nn.Module) -> dict[str, Tensor | None]:
    model.zero_grad()
    x = X.clone().requires_grad_()
    y = checkpoint(model, x, use_reentrant=False)
    y.square().sum().backward()
    return {"y": y.detach(), "x": x.grad, **gradients_of(model)}


MODES = [
    trains,
    only_forwards,
    evaluates,
    infers,
    calls_layers_alone,
    calls_one_layer,
    checkpoints,
]


# Each writer before training, and before two of the other kinds in turn.
SEEN = [
    (write, mode)
    for number, write in enumerate(WRITERS)
    for mode in (trains, *(MODES[1 + (number + step) % (len(MODES) - 1)] for step in (0, 3)))
]


@pytest.mark.parametrize(("write", "mode"), SEEN)
def test_a_write_is_seen_by_the_next_iteration(
    write: Writer, mode: Callable[[nn.Module], Any]
) -> None:
    """Nothing in a slab is used after the iteration that it was read for."""
    resident, parked = resident_and_parked()
    for model in (resident, parked):
        for _ in range(2):
            mode(model)
        write(model)
        model.zero_grad()

    assert_same_bits(mode(parked), mode(resident))


@pytest.mark.parametrize("grid", [(1, 1), (1, 3), (4, 1), (3, 2)])
@pytest.mark.parametrize("mode", [trains, evaluates])
def test_a_write_is_seen_in_every_grid(grid, mode):
    """One tile, one row, one column and a ragged grid agree with their resident references."""
    resident, parked = resident_and_parked(out_splits=grid[0], in_splits=grid[1])
    for model in (resident, parked):
        for _ in range(2):
            mode(model)
        multiplies(model)
        writes_through_numpy(model)

    assert_same_bits(mode(parked), mode(resident))


@pytest.mark.parametrize("first", MODES)
@pytest.mark.parametrize("second", MODES)
def test_a_write_is_seen_by_an_iteration_of_another_kind(first, second):
    """Training, evaluation, generation and recomputation may alternate, with writes between."""
    resident, parked = resident_and_parked()
    for _ in range(2):
        for mode in (first, second):
            for model in (resident, parked):
                writes_through_numpy(model)
                model.zero_grad()

            assert_same_bits(mode(parked), mode(resident))


@torch.no_grad()
def test_functional_call_uses_the_tensors_that_it_is_given():
    """Other tensors are never replaced by the home's bytes, and the own ones come back after."""
    resident, parked = resident_and_parked()
    others = dict(other_values(5).named_parameters())
    for _ in range(2):
        expected = resident(X)
        assert_same_bits(parked(X), expected)

        with_others = torch.func.functional_call(parked, others, (X,))

        assert_same_bits(with_others, torch.func.functional_call(resident, others, (X,)))
        assert not torch.equal(with_others, expected)


def test_gradients_flow_to_the_tensors_of_functional_call():
    """The tensor found on the tile is the one that is differentiated."""
    _, parked = resident_and_parked()
    others = {n: p.detach().clone().requires_grad_() for n, p in parked.named_parameters()}

    torch.func.functional_call(parked, others, (X,)).sum().backward()

    assert all(p.grad is not None for p in others.values())
    assert all(p.grad is None for p in parked.parameters())


def test_a_write_between_two_forwards_without_a_backward_is_seen():
    """What was read ahead for a backward that never came is not used by the next forward."""
    resident, parked = resident_and_parked()
    for _ in range(3):
        ours, theirs = parked(X), resident(X)
        assert_same_bits(ours, theirs)
        multiplies(resident)
        multiplies(parked)

    assert_same_bits(trains(parked), trains(resident))


def test_one_layers_write_is_seen_by_another_that_is_tied_to_it():
    """A tile of two layers, written through one of them, is fresh in both."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(13, 13, bias=False), nn.Linear(13, 13, bias=False))
    model[1].weight = model[0].weight
    resident = memtile.tile(copy.deepcopy(model), out_splits=3, home="device")
    parked = memtile.tile(model, out_splits=3, home=DiskHome())
    for _ in range(3):
        assert_same_bits(trains(parked), trains(resident))
        multiplies(parked)
        multiplies(resident)


class Fails(nn.Module):
    """Raises in forward when it is told to."""

    fails = False

    def forward(self, x: Tensor) -> Tensor:
        if self.fails:
            raise RuntimeError("the test wants it")
        return x


def failing_copies() -> tuple[Any, Any]:
    dense = small_model()
    dense.insert(2, Fails())
    resident = memtile.tile(copy.deepcopy(dense), out_splits=3, home="device")
    return resident, memtile.tile(dense, out_splits=3, home=DiskHome())


@pytest.mark.parametrize("mode", [trains, evaluates, calls_one_layer])
def test_a_write_after_an_exception_in_forward_is_seen(mode):
    """An iteration that failed leaves no stale values, whatever runs next."""
    resident, parked = failing_copies()
    trains(parked)
    parked[2].fails = True
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="wants it"):
            parked(X)
    parked[2].fails = False
    for model in (resident, parked):
        multiplies(model)
        writes_through_numpy(model)
        model.zero_grad()

    assert_same_bits(mode(parked), mode(resident))


def interrupt(*args: object) -> None:
    """A Ctrl-C while a tile is worked on."""
    raise KeyboardInterrupt


def test_a_write_after_ctrl_c_in_a_tile_is_seen_by_a_layer_alone():
    """torch calls no hook of the model then; the iteration ends all the same."""
    resident, parked = resident_and_parked()
    trains(parked)
    tile = parked[2].tile(1, 0)
    hook = tile.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        parked(X)
    hook.remove()
    for _ in range(3):
        for model in (resident, parked):
            writes_through_numpy(model)

        assert_same_bits(calls_one_layer(parked), calls_one_layer(resident))


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_write_after_ctrl_c_between_tiles_is_seen(where):
    """A Ctrl-C in an ordinary module of the model ends the iteration, whatever runs next."""
    resident, parked = resident_and_parked()
    trains(parked)
    register = {"forward": "register_forward_hook", "backward": "register_full_backward_hook"}
    hook = getattr(parked[1], register[where])(interrupt)
    with pytest.raises(KeyboardInterrupt):
        trains(parked)
    hook.remove()
    for mode in (calls_one_layer, calls_one_layer, calls_layers_alone, only_forwards, trains):
        for model in (resident, parked):
            writes_through_numpy(model)
            model.zero_grad()

        assert_same_bits(mode(parked), mode(resident))


class FailsOnce:
    """A hook of a gradient that raises the first time."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, grad: Tensor) -> None:
        self.calls += 1
        if self.calls == 1:
            raise RuntimeError("the test wants it")


def test_a_graph_whose_backward_failed_can_run_backward_again():
    """After the exception the retained graph gives the gradients that it would have given."""
    resident, parked = resident_and_parked()
    results = []
    for model in (resident, parked):
        x = X.clone().requires_grad_()
        middle = model[1](model[0](x))
        middle.register_hook(FailsOnce())
        loss = model[2](middle).square().sum()
        with pytest.raises(RuntimeError, match="wants it"):
            loss.backward(retain_graph=True)
        model.zero_grad()
        loss.backward()
        results.append({"x": x.grad, **gradients_of(model)})

    assert_same_bits(results[1], results[0])


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_zeroed_between_forward_and_backward_are_zero(to_none):
    """`zero_grad` just before `backward` is as good as before `forward`."""
    resident, parked = resident_and_parked()
    for _ in range(4):
        results = []
        for model in (resident, parked):
            loss = model(X).square().sum()
            model.zero_grad(set_to_none=to_none)
            loss.backward()
            results.append(gradients_of(model))

        assert_same_bits(results[1], results[0])


def test_gradients_written_between_two_backwards_are_added_to():
    """A gradient at home that was scaled or set is added to as it is then."""
    resident, parked = resident_and_parked()
    for number in range(4):
        for model in (resident, parked):
            model(X).square().sum().backward()
            for p in model.parameters():
                assert p.grad is not None
                if number == 1:
                    p.grad.mul_(0.5)
                elif number == 2:
                    p.grad.data.fill_(1)

        assert_same_bits(gradients_of(parked), gradients_of(resident))


def test_a_hook_that_steps_inside_backward_is_seen_by_the_next_iteration():
    """A foreign optimizer in a post-accumulate hook writes weights within an iteration."""
    resident, parked = resident_and_parked()
    for model in (resident, parked):
        for p in model.parameters():

            def step(p: Tensor) -> None:
                with torch.no_grad():
                    p.sub_(p.grad, alpha=0.1)
                p.grad = None

            p.register_post_accumulate_grad_hook(step)

    for _ in range(3):
        assert_same_bits(trains(parked), trains(resident))


def test_ema_swaps_of_data_need_no_bump_of_versions():
    """Swapping averages in for evaluation and back for training, again and again."""
    resident, parked = resident_and_parked()
    for number in range(3):
        for model in (resident, parked):
            trains(model)
            averages = [p.detach() * 0.5 + number for p in model.parameters()]
            own = [p.data for p in model.parameters()]
            for p, average in zip(model.parameters(), averages, strict=True):
                p.data = average
            model.evaluated = evaluates(model)
            for p, data in zip(model.parameters(), own, strict=True):
                p.data = data

        assert_same_bits(parked.evaluated, resident.evaluated)
        assert_same_bits(trains(parked), trains(resident))
        assert all(allocation_of(p) for p in weights_of(parked).values())


def test_a_model_within_a_model_is_fresh_too():
    """A part that was tiled by itself, inside a model that was tiled afterwards."""
    torch.manual_seed(0)
    inner, outer = small_model(), nn.Linear(7, 13)
    results = []
    for home in ("device", DiskHome()):
        part = memtile.tile(copy.deepcopy(inner), out_splits=3, home=home)
        model = nn.Sequential(part, copy.deepcopy(outer), part)
        memtile.tile(model, out_splits=2, home=home)
        for _ in range(2):
            trains(model)
            evaluates(model)
            writes_through_numpy(model)
        results.append(trains(model))

    assert_same_bits(results[1], results[0])


@pytest.mark.parametrize("home", [HostHome, DiskHome])
def test_a_closed_home_stops_its_own_model_only(home):
    """Another model works on; that of the closed home raises HomeError, every time."""
    resident, other = resident_and_parked()
    closing = home()
    model = memtile.tile(small_model(), out_splits=3, home=closing)
    trains(model)
    trains(other)

    closing.close()

    if home is DiskHome:
        for act in (only_forwards, evaluates, trains):
            with pytest.raises(memtile.errors.HomeError, match="is closed"):
                act(model)
    assert_same_bits(trains(other), trains(resident))


def test_a_broken_home_stops_its_own_model_only(monkeypatch):
    """A failed read of one home raises nothing in models of other homes."""
    resident, parked = resident_and_parked()
    broken = memtile.tile(small_model(), out_splits=3, home=DiskHome())
    real = memtile.homes.disk_io.fill
    broken_fd = next(iter(weights_of(broken).values()))
    allocation = allocation_of(broken_fd)
    assert allocation is not None
    fd = allocation.home._fd

    def failing(number: int, buffer: memoryview, offset: int) -> None:
        if number == fd:
            raise memtile.errors.HomeIOError(5, "the test wants it")
        real(number, buffer, offset)

    trains(broken)
    monkeypatch.setattr(memtile.homes.disk_io, "fill", failing)
    with pytest.raises(memtile.errors.HomeIOError, match="wants it"):
        trains(broken)
    assert_same_bits(trains(parked), trains(resident))
    monkeypatch.undo()
    resident.load_state_dict(small_model().state_dict())
    assert_same_bits(trains(broken), trains(resident))


def test_no_allocation_is_as_large_as_the_layer():
    """Forward and backward of a wide layer on disk allocate one tile at most, gradients too."""
    torch.manual_seed(0)
    dense = nn.Linear(512, 520)
    layer = memtile.tile(nn.Sequential(dense), out_splits=13, home=DiskHome())
    x = torch.randn(3, 512, requires_grad=True)

    for _ in range(2):
        with LargestAllocation() as largest:
            layer(x).sum().backward()

        assert largest.nbytes <= 512 * 40 * 4
