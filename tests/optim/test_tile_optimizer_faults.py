"""Full disks, failing disks and failing code: a clear error, and training can go on."""

import errno
import itertools
import math
import os

import pytest
import torch
from faulty_disk import FaultyDisk, Watched, at_step, nobody_works, slabs_are_free
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

from memtile.errors import HomeFullError, HomeIOError, NotFiniteError, ParkedError
from memtile.homes import allocation_of

OVERRIDE_HOOKS = (1, 20)  # which read or write of a step fails first
# (path, act, point, steps before): half of the product, in which any three of the four meet.
ENDED = [
    case
    for case in itertools.product(("buffered", "direct"), ("read", "write"), OVERRIDE_HOOKS, (0, 1))
    if ((case[0] == "direct") + (case[1] == "write") + (case[2] > 1) + case[3]) % 2
]


@pytest.fixture(params=["buffered", "direct"])
def path(request, monkeypatch):
    """Which way reads and writes go."""
    free = 1 << 60 if request.param == "buffered" else 0
    monkeypatch.setattr("memtile.homes.limits.free_bytes", lambda: free)
    return request.param


@pytest.fixture
def disk(monkeypatch):
    """The disk of all homes, which fails on demand."""
    return FaultyDisk(monkeypatch)


@pytest.fixture
def watched(monkeypatch):
    """Lets a test act before a parameter is stepped."""
    return lambda before: monkeypatch.setattr(Watched, "before", staticmethod(before))


def _prepared(mode="classic", steps=1):
    """A model and its optimizer after some steps, with gradients where the mode keeps them."""
    model = in_home(small(), "disk")
    optimizer = optimizer_for(model, Watched, mode=mode, lr=0.01)
    train(model, optimizer, batches(steps))
    if mode == "classic":
        loss_of(model, batches(1, seed=8)[0]).backward()
    return model, optimizer


def _goes_on(model, optimizer, reference, reference_optimizer):
    """Whether both give the same bits from here on."""
    losses = [
        train(*pair, batches(2, seed=9))
        for pair in ((model, optimizer), (reference, reference_optimizer))
    ]
    return losses[0] == losses[1] and same(values(model), values(reference))


def _refuse_room(monkeypatch):
    def full(fd, offset, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)


def _fill(home):
    """Take all the room that the home has already."""
    _, rooms = home.hold([4096]), []
    for segment in home._segments._all:
        while segment.free.runs:
            largest = max(stop - start for start, stop in segment.free.runs)
            rooms.append(home.allocate((largest,), torch.uint8))
    return rooms


@pytest.mark.parametrize("mode", MODES)
def test_a_full_disk_at_construction_changes_nothing(mode, monkeypatch):
    """HomeFullError leaves no hook and no state, and gradients go home as before."""
    model = in_home(small(), "disk")
    rooms = _fill(disk_of(model))
    before = values(model)
    _refuse_room(monkeypatch)

    with pytest.raises(HomeFullError, match="more bytes needed"):
        optimizer_for(model, mode=mode)

    monkeypatch.undo()
    del rooms
    loss_of(model, batches(1)[0]).backward()
    assert same(values(model), before)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert all(allocation_of(tile.weight.grad) for _, tile in model.up.tiles())
    model.zero_grad()
    train(model, optimizer_for(model, mode=mode), batches(1))


@pytest.mark.parametrize("mode", MODES)
def test_a_full_disk_when_a_group_is_added_changes_nothing(mode, monkeypatch):
    """HomeFullError from `add_param_group`: the groups are as before, and so is the model."""
    model = in_home(small(), "disk")
    late = list(model.up.parameters())
    first = [p for p in model.parameters() if not any(p is other for other in late)]
    optimizer = optimizer_for(model, mode=mode, params=first)
    rooms = _fill(disk_of(model))
    _refuse_room(monkeypatch)

    with pytest.raises(HomeFullError, match="more bytes needed"):
        optimizer.add_param_group({"params": late})

    monkeypatch.undo()
    del rooms
    assert len(optimizer.param_groups) == 1
    assert not any(p._post_accumulate_grad_hooks for p in late)
    optimizer.add_param_group({"params": late})
    train(model, optimizer, batches(1))
    assert len(optimizer.state) == len(list(model.parameters()))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_was_reserved_is_enough(mode, dtype, monkeypatch):
    """The constructor holds room for all that training parks: no step fails for room."""
    model, asked = in_home(small(dtype), "disk"), []
    real = disk_of(model).hold
    monkeypatch.setattr(disk_of(model), "hold", lambda rooms: asked.extend(rooms) or real(rooms))
    optimizer = optimizer_for(model, mode=mode)

    loss_of(model, batches(1)[0]).backward()
    optimizer.step()

    parked = [entry for state in optimizer.state.values() for entry in state.values()]
    parked += [p.grad for p in model.parameters() if p.grad is not None]
    assert sum(allocation.room for allocation in map(allocation_of, parked) if allocation) <= sum(
        asked
    )


@pytest.mark.parametrize(("path", "act", "point", "steps"), ENDED, indirect=["path"])
def test_a_step_that_the_disk_ended_goes_on(path, disk, act, point, steps):
    """After a HomeIOError `step()` goes on, and all bits equal those of an undisturbed run."""
    (model, optimizer), (reference, reference_optimizer) = (
        _prepared(steps=steps),
        _prepared(steps=steps),
    )
    reference_optimizer.step()
    reference_optimizer.zero_grad()

    disk.fail(act, point)
    with pytest.raises(HomeIOError, match=f"{act} of"):
        optimizer.step()
    disk.mend()
    optimizer.step()
    optimizer.zero_grad()

    assert slabs_are_free(disk_of(model))
    assert same(values(model), values(reference))
    assert _goes_on(model, optimizer, reference, reference_optimizer)


@pytest.mark.parametrize("act", ["read", "write"])
def test_a_step_goes_on_as_often_as_it_takes(disk, act):
    """However often the disk fails, repeating `step()` gives the bits of an undisturbed run."""
    (model, optimizer), (reference, reference_optimizer) = _prepared(), _prepared()
    reference_optimizer.step()
    reference_optimizer.zero_grad()

    failures = 0
    for _ in range(200):
        disk.fail(act, 6, 14)
        try:
            optimizer.step()
            break
        except HomeIOError:
            failures += 1
    disk.mend()
    optimizer.zero_grad()

    assert failures
    assert _goes_on(model, optimizer, reference, reference_optimizer)


def test_a_write_that_fails_once_is_tried_again(disk):
    """A single failed write of a step is repeated without an error."""
    (model, optimizer), (reference, reference_optimizer) = _prepared(), _prepared()
    reference_optimizer.step()
    reference_optimizer.zero_grad()

    disk.fail("write", 4, 1)
    optimizer.step()
    optimizer.zero_grad()

    assert _goes_on(model, optimizer, reference, reference_optimizer)


@pytest.mark.parametrize("act", ["read", "write"])
def test_a_step_can_be_given_up(disk, act):
    """`zero_grad()` gives up a step that an I/O error ended: the next one steps all, none twice."""
    model, optimizer = _prepared()
    disk.fail(act, 7)
    with pytest.raises(HomeIOError):
        optimizer.step()
    disk.mend()

    optimizer.zero_grad()
    train(model, optimizer, batches(1))

    assert {int(state["step"]) for state in optimizer.state.values()} <= {2, 3}
    assert slabs_are_free(disk_of(model))


@pytest.mark.parametrize("point", OVERRIDE_HOOKS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("act", ["read", "write"])
def test_a_disk_that_fails_in_backward(disk, act, mode, point):
    """HomeIOError, no slab is lost, and after `zero_grad()` training goes on."""
    model, optimizer = _prepared(mode)
    optimizer.step()
    optimizer.zero_grad()
    loss = loss_of(model, batches(1)[0])

    disk.fail(act, point)
    with pytest.raises(HomeIOError, match=f"{act} of"):
        loss.backward()
    disk.mend()
    optimizer.zero_grad()
    assert nobody_works(disk_of(model))
    train(model, optimizer, batches(2))

    assert slabs_are_free(disk_of(model))
    assert all(value.isfinite().all() for value in values(model).values())


def test_a_disk_that_fails_in_classic_backward_changes_no_weight(disk):
    """Classic mode: after the failure and `zero_grad()` the run equals an undisturbed one."""
    (model, optimizer), (reference, reference_optimizer) = _prepared(), _prepared()
    for each in (optimizer, reference_optimizer):
        each.step()
        each.zero_grad()
    loss = loss_of(model, batches(1)[0])

    disk.fail("read", 3)
    with pytest.raises(HomeIOError):
        loss.backward()
    disk.mend()
    optimizer.zero_grad()

    assert _goes_on(model, optimizer, reference, reference_optimizer)


@pytest.mark.parametrize("mode", MODES)
def test_an_error_of_someone_elses_in_backward(mode):
    """An exception in a hook comes out as it is; after `zero_grad()` training goes on."""
    model, optimizer = _prepared(mode)
    optimizer.step()
    optimizer.zero_grad()

    def fail(gradient):
        raise ValueError("someone else's")

    handle = model.up.register_full_backward_hook(lambda *_: fail(None))
    with pytest.raises(ValueError, match="someone else's"):
        loss_of(model, batches(1)[0]).backward()
    handle.remove()
    optimizer.zero_grad()

    assert nobody_works(disk_of(model))
    train(model, optimizer, batches(2))
    assert slabs_are_free(disk_of(model))


@pytest.mark.parametrize("number", [0, 5, 14])
def test_an_error_of_the_optimizers_in_step(watched, number):
    """An exception of the inner optimizer leaves its tile as it was: `step()` goes on with it."""
    (model, optimizer), (reference, reference_optimizer) = _prepared(), _prepared()
    reference_optimizer.step()
    reference_optimizer.zero_grad()

    def fail():
        raise ValueError("the optimizer's")

    watched(at_step(number, fail))
    with pytest.raises(ValueError, match="the optimizer's"):
        optimizer.step()
    optimizer.step()
    optimizer.zero_grad()

    assert _goes_on(model, optimizer, reference, reference_optimizer)


@pytest.mark.parametrize("mode", MODES)
def test_a_step_between_forward_and_backward_is_told(mode):
    """Weights stepped after the forward make its backward raise, not give wrong gradients."""
    model, optimizer = _prepared(mode)
    optimizer.step()
    optimizer.zero_grad()
    loss = loss_of(model, batches(1)[0])
    train(model, optimizer, batches(1))

    with pytest.raises((ParkedError, RuntimeError), match="modified"):
        loss.backward()

    optimizer.zero_grad()
    train(model, optimizer, batches(1))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("home", "name"),
    [("device", "up"), ("host", "up"), ("disk", "norm"), ("disk", "up")],
)
def test_a_gradient_that_is_not_finite_is_never_applied(home, name, bad):
    """In memory, nothing is stepped; in a home, the tile and those after it are not."""
    model, reference = in_home(small(), home), in_home(small(), home)
    optimizer, reference_optimizer = optimizer_for(model), optimizer_for(reference)
    loss_of(model, batches(1)[0]).backward()
    parameter = model.norm.weight if name == "norm" else model.up.tile(0, 0).weight
    parameter.grad.view(-1)[3] = bad

    with pytest.raises(NotFiniteError, match=rf"the gradient of {name}.*weight is not finite"):
        optimizer.step()

    found, before = values(model), values(reference)
    if (home, name) == ("disk", "up"):  # after the embedding, to which the head is tied
        assert all(
            torch.equal(found[n], before[n]) for n in found if n[:5] not in ("embed", "head.")
        )
        assert all(value.isfinite().all() for value in found.values())
        return
    assert same(found, before)
    optimizer.zero_grad()
    assert _goes_on(model, optimizer, reference, reference_optimizer)


@pytest.mark.parametrize("home", HOMES)
def test_a_backward_with_a_gradient_that_is_not_finite_leaves_finite_weights(home):
    """It raises within backward, and a later batch can be trained on."""
    model = in_home(small(), home)
    optimizer = optimizer_for(model, mode="in_backward")
    weight = model.up.tile(1, 0).weight
    weight.register_hook(lambda gradient: gradient.fill_(math.inf))

    with pytest.raises(NotFiniteError, match=r"the gradient of up\..*weight is not finite"):
        loss_of(model, batches(1)[0]).backward()

    assert all(value.isfinite().all() for value in values(model).values())
    optimizer.zero_grad()
    weight._backward_hooks.clear()
    assert torch.tensor(train(model, optimizer, batches(2))).isfinite().all()
