"""Ctrl-C: a step, and a backward that steps, is done as a whole; anything else stops at once."""

import gc
import signal
import threading

import pytest
import torch
from faulty_disk import Watched, at_step, nobody_works, slabs_are_free
from small_training import (
    HOMES,
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
from torch import nn

from memtile import TileOptimizer
from memtile.transfer import rings_of

OVERRIDE_HOOKS = (0, 14)  # which parameter is being stepped when Ctrl-C comes


def _ctrl_c():
    signal.raise_signal(signal.SIGINT)


@pytest.fixture(autouse=True)
def handler():
    """Who handles SIGINT: the same before and after every test."""
    before = signal.getsignal(signal.SIGINT)
    yield before
    gc.collect()
    after = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)
    assert after is before


@pytest.fixture
def watched(monkeypatch):
    """Lets a test act before a parameter is stepped."""
    return lambda before: monkeypatch.setattr(Watched, "before", staticmethod(before))


def _pair(mode="classic"):
    """Twice the same: a model after a step, with its optimizer."""
    for _ in range(2):
        model = in_home(small(), "disk")
        optimizer = optimizer_for(model, Watched, mode=mode, lr=0.01)
        train(model, optimizer, batches(1))
        yield model, optimizer


def _goes_on(model, optimizer, reference, reference_optimizer):
    """Whether both give the same bits from here on."""
    losses = [
        train(*pair, batches(2, seed=9))
        for pair in ((model, optimizer), (reference, reference_optimizer))
    ]
    return losses[0] == losses[1] and same(values(model), values(reference))


@pytest.mark.parametrize("point", OVERRIDE_HOOKS)
def test_in_a_step_it_waits_for_the_end(watched, handler, point):
    """KeyboardInterrupt is raised after all parameters are stepped, with the undisturbed bits."""
    (model, optimizer), (reference, reference_optimizer) = _pair()
    for each in (model, reference):
        loss_of(each, batches(1, seed=8)[0]).backward()
    reference_optimizer.step()

    watched(at_step(point, _ctrl_c))
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()

    assert signal.getsignal(signal.SIGINT) is handler
    assert slabs_are_free(disk_of(model))
    assert same(values(model), values(reference))
    for each in (optimizer, reference_optimizer):
        each.zero_grad()
    assert _goes_on(model, optimizer, reference, reference_optimizer)


def test_in_clipping_it_waits_for_the_end(monkeypatch, handler):
    """A Ctrl-C during scaling is raised when all gradients are scaled."""
    (model, optimizer), (reference, reference_optimizer) = _pair()
    for each in (model, reference):
        loss_of(each, batches(1, seed=8)[0]).backward()
    reference_optimizer.clip_grad_norm_(0.1)
    calls, real = iter(range(1000)), torch.autograd.graph.increment_version

    def increment(tensor):
        if next(calls) == 2:
            _ctrl_c()
        real(tensor)

    monkeypatch.setattr(torch.autograd.graph, "increment_version", increment)
    with pytest.raises(KeyboardInterrupt):
        optimizer.clip_grad_norm_(0.1)
    monkeypatch.undo()

    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    assert all(torch.equal(ours.grad, theirs.grad) for ours, theirs in pairs)


@pytest.mark.parametrize("point", OVERRIDE_HOOKS)
def test_a_second_one_in_a_step_comes_at_once(watched, handler, point):
    """A second Ctrl-C ends the step at once; `step()` goes on with it, bit for bit."""
    (model, optimizer), (reference, reference_optimizer) = _pair()
    for each in (model, reference):
        loss_of(each, batches(1, seed=8)[0]).backward()
    reference_optimizer.step()
    stepped = []

    def before(parameter):
        stepped.append(parameter.shape)
        if len(stepped) == point + 1:
            _ctrl_c()
            _ctrl_c()

    watched(before)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()

    assert len(stepped) == point + 1
    assert signal.getsignal(signal.SIGINT) is handler
    assert nobody_works(disk_of(model))
    optimizer.step()
    for each in (optimizer, reference_optimizer):
        each.zero_grad()
    assert _goes_on(model, optimizer, reference, reference_optimizer)


def test_a_write_after_a_step_that_was_given_up_is_seen(watched):
    """Values that a step has read ahead are not used by the next one."""
    (model, optimizer), (reference, reference_optimizer) = _pair()
    for each in (model, reference):
        loss_of(each, batches(1, seed=8)[0]).backward()

    def interrupt():
        _ctrl_c()
        _ctrl_c()

    watched(at_step(0, interrupt))
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    for each in (model, reference):
        for parameter in each.parameters():
            parameter.data.mul_(0.5)
            parameter.grad.data.mul_(2)
    optimizer.step()
    reference_optimizer.step()

    assert same(values(model), values(reference))


@pytest.mark.parametrize("point", OVERRIDE_HOOKS)
def test_in_a_backward_that_steps_it_waits_for_the_end(watched, handler, point):
    """in_backward: KeyboardInterrupt is raised after the backward, with the undisturbed bits."""
    (model, optimizer), (reference, reference_optimizer) = _pair("in_backward")
    loss_of(reference, batches(1, seed=8)[0]).backward()

    watched(at_step(point, _ctrl_c))
    with pytest.raises(KeyboardInterrupt):
        loss_of(model, batches(1, seed=8)[0]).backward()

    assert signal.getsignal(signal.SIGINT) is handler
    assert same(values(model), values(reference))
    assert all(parameter.grad is None for parameter in model.parameters())
    for each in (optimizer, reference_optimizer):
        each.step()
        each.zero_grad()
    assert slabs_are_free(disk_of(model))
    assert _goes_on(model, optimizer, reference, reference_optimizer)


class _PlainHead(nn.Module):
    """A head that is not tiled, so that what is stepped first in backward is no tile."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up = nn.Embedding(23, 10), nn.Linear(10, 13)
        self.scale = nn.Parameter(torch.ones(23))
        self.head = nn.Linear(13, 23)

    def forward(self, ids):
        return self.head(self.up(self.embed(ids))) * self.scale


def test_the_end_of_the_iteration_is_not_left_out(watched):
    """A backward whose first stepped parameter is no tile ends its iteration, also with Ctrl-C."""
    torch.manual_seed(0)
    model = in_home(_PlainHead(), "disk")
    optimizer = optimizer_for(model, Watched, mode="in_backward", lr=0.01)
    train(model, optimizer, batches(1))
    before = set(rings_of(disk_of(model)).backwards)  # of those that failed

    watched(at_step(0, _ctrl_c))
    with pytest.raises(KeyboardInterrupt):
        loss_of(model, batches(1)[0]).backward()
    optimizer.step()

    assert set(rings_of(disk_of(model)).backwards) <= before
    train(model, optimizer, batches(1))
    assert slabs_are_free(disk_of(model))


@pytest.mark.parametrize("point", OVERRIDE_HOOKS)
def test_a_second_one_in_a_backward_comes_at_once(watched, handler, point):
    """in_backward: a second Ctrl-C ends it at once; after `zero_grad()` training goes on."""
    (model, optimizer), _ = _pair("in_backward")
    stepped = []

    def before(parameter):
        stepped.append(parameter.shape)
        if len(stepped) == point + 1:
            _ctrl_c()
            _ctrl_c()

    watched(before)
    with pytest.raises(KeyboardInterrupt):
        loss_of(model, batches(1, seed=8)[0]).backward()

    assert len(stepped) == point + 1
    assert nobody_works(disk_of(model))
    watched(lambda parameter: None)
    optimizer.zero_grad()
    train(model, optimizer, batches(2))
    assert slabs_are_free(disk_of(model))


def test_after_a_backward_that_failed_it_is_as_ever(watched, handler):
    """After a failed backward, the next one defers Ctrl-C to its end again."""
    (model, optimizer), _ = _pair("in_backward")

    def fail():
        raise ValueError("the optimizer's")

    watched(at_step(5, fail))
    with pytest.raises(ValueError, match="the optimizer's"):
        loss_of(model, batches(1)[0]).backward()
    optimizer.zero_grad()
    before, stepped = values(model), []

    def act(parameter):
        stepped.append(parameter.shape)
        if len(stepped) == 4:
            _ctrl_c()

    watched(act)
    with pytest.raises(KeyboardInterrupt):
        loss_of(model, batches(1)[0]).backward()

    assert len(stepped) == len(list(model.parameters()))
    assert not any(torch.equal(value, before[name]) for name, value in values(model).items())


def test_in_a_backward_that_fails_it_is_not_put_off_for_ever(watched, handler):
    """A failed backward restores the earlier handler of SIGINT."""
    (model, optimizer), _ = _pair("in_backward")

    def fail():
        raise ValueError("the optimizer's")

    watched(at_step(5, fail))
    with pytest.raises(ValueError, match="the optimizer's"):
        loss_of(model, batches(1)[0]).backward()

    assert signal.getsignal(signal.SIGINT) is handler
    with pytest.raises(KeyboardInterrupt):
        _ctrl_c()
    optimizer.zero_grad()


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_elsewhere_it_comes_at_once(handler, where):
    """Classic mode: Ctrl-C in forward or backward is raised there, and the model is unchanged."""
    (model, optimizer), (reference, reference_optimizer) = _pair()
    act = [_ctrl_c]
    hook = lambda *_: act.pop()() if act else None  # noqa: E731  # it is removed by its handle
    if where == "forward":
        handle = model.twice.register_forward_hook(hook)
    else:
        handle = model.twice.register_full_backward_hook(hook)

    with pytest.raises(KeyboardInterrupt):
        loss_of(model, batches(1)[0]).backward()
    handle.remove()
    optimizer.zero_grad()

    assert nobody_works(disk_of(model))
    assert signal.getsignal(signal.SIGINT) is handler
    assert _goes_on(model, optimizer, reference, reference_optimizer)


def test_in_another_thread_signals_are_left_alone(handler):
    """Steps and backwards of another thread set no handler, and step as usual."""
    (model, optimizer), (reference, reference_optimizer) = _pair("in_backward")
    seen = []

    def run():
        train(model, optimizer, batches(1))
        seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()

    train(reference, reference_optimizer, batches(1))
    assert seen == [handler]
    assert same(values(model), values(reference))


def test_a_handler_of_the_users_is_called_at_the_end(watched):
    """A user's own handler of SIGINT is called once, after the step."""
    (model, optimizer), _ = _pair()
    loss_of(model, batches(1)[0]).backward()
    calls, stepped = [], []

    def act(parameter):
        stepped.append(parameter.shape)
        if len(stepped) == 2:
            _ctrl_c()

    watched(act)
    before = signal.signal(signal.SIGINT, lambda *_: calls.append(len(stepped)))
    try:
        optimizer.step()
    finally:
        signal.signal(signal.SIGINT, before)

    assert calls == [len(list(model.parameters()))]


def test_ignored_signals_stay_ignored(watched):
    """Where SIGINT is ignored, it stays ignored during a step and after."""
    (model, optimizer), _ = _pair()
    loss_of(model, batches(1)[0]).backward()
    watched(at_step(2, _ctrl_c))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        optimizer.step()
        after = signal.getsignal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)

    assert after == signal.SIG_IGN


@pytest.mark.parametrize("home", HOMES)
def test_an_exception_after_a_tile_steps_no_other_one_twice(home, monkeypatch):
    """As from another signal's handler, before the tile is counted: it is stepped once more."""
    model = in_home(small(), home)
    optimizer = TileOptimizer(model, torch.optim.SGD, lr=1.0)
    parameters = list(model.parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)

    def fail(parameter):
        if parameter is parameters[5]:
            raise InterruptedError

    with monkeypatch.context() as patched:
        patched.setattr(optimizer._kept, "note", fail)
        with pytest.raises(InterruptedError):
            optimizer.step()
    optimizer.step()

    moved = [old - new.detach() for old, new in zip(before, parameters, strict=True)]
    assert [round(each.mean().item()) for each in moved] == [
        2 if number == 5 else 1 for number in range(len(parameters))
    ]
