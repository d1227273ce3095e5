"""Room that an optimizer was given is held: it can always step, whoever else parks there."""

import copy
import errno
import gc
import os
import time

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
from torch import nn

from memtile import DiskHome
from memtile.errors import HomeFullError
from memtile.homes import PAGE


@pytest.fixture
def home(monkeypatch):
    """A home on a disk that has room for three models that train, and for five that do not."""
    limit, real = 1 << 20, os.posix_fallocate

    def limited(fd, offset, size):
        if offset + size > limit:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", limited)
    return DiskHome()


def _net() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(70, 110), nn.Tanh(), nn.Linear(110, 70))


def _step(model, optimizer) -> None:
    model(torch.ones(3, 70)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def _fill(home):
    """Take all room that nobody holds."""
    taken = []
    try:
        while True:
            taken.append(home.allocate((PAGE,), torch.uint8))
    except HomeFullError:
        return taken


def _accepted(models, mode):
    """The models with optimizers, as far as there is room for them."""
    pairs = []
    for model in models:
        try:
            pairs.append((model, optimizer_for(model, mode=mode)))
        except HomeFullError as error:
            refused = error
    return pairs, refused


@pytest.mark.parametrize("mode", MODES)
def test_who_was_accepted_can_always_step(home, mode):
    """Of several optimizers on one home some are refused when they are made; the others train."""
    models = [in_home(_net(), home) for _ in range(6)]
    reference = _net()
    truth = torch.optim.AdamW(reference.parameters(), lr=0.01)

    pairs, refused = _accepted(models, mode)
    for _ in range(3):
        _step(reference, truth)
        for pair in pairs:
            _step(*pair)

    assert 1 < len(pairs) < len(models)
    assert "more bytes needed" in str(refused)
    expected = dict(reference.named_parameters())
    for model, _ in pairs:
        for name, value in values(model).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_what_others_park_takes_nothing_of_it(home, mode):
    """Moments, masters and gradients have room on a full home: of ties, and in 16 bits too."""
    for dtype in (torch.float32, torch.bfloat16):
        model, free = in_home(small(dtype), home), in_home(small(dtype), "disk")
        optimizer, theirs = optimizer_for(model, mode=mode), optimizer_for(free, mode=mode)
        if mode == "in_backward":  # where a layer is used twice cannot be known before
            for pair in (model, optimizer), (free, theirs):
                pair[0].middle = lambda x, own=pair[0]: own.down(torch.tanh(own.norm(own.up(x))))
        others = _fill(home)

        losses = train(model, optimizer, batches(3))

        assert losses == train(free, theirs, batches(3))
        assert same(values(model), values(free))
        del others


def test_a_state_that_is_loaded_takes_it(home):
    """A new optimizer on a full home takes a state over, and steps with it."""
    first = in_home(small(), "disk")
    saved = optimizer_for(first)
    train(first, saved, batches(2))
    model = in_home(small(), home)
    optimizer = optimizer_for(model)
    model.load_state_dict(first.state_dict())
    others = _fill(home)

    optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))

    assert train(model, optimizer, batches(2)) == train(first, saved, batches(2))
    del others


def _has_room(home, pages):
    """Whether so many pages are free, once no worker thread refers to its last write any more."""
    for _ in range(100):
        if len(_fill(home)) == pages:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("mode", MODES)
def test_it_is_given_back(home, mode, steps):
    """When an optimizer and then its model are gone, their room is free."""
    others = _fill(home)
    before = len(others)
    del others
    model = in_home(small(), home)
    free = len(_fill(home))
    optimizer = optimizer_for(model, mode=mode)
    assert len(_fill(home)) < free
    train(model, optimizer, batches(steps))

    del optimizer
    gc.collect()
    assert _has_room(home, free)
    loss_of(model, batches(1)[0]).backward()
    del model
    gc.collect()
    assert _has_room(home, before)


def test_a_group_that_is_refused_takes_nothing(home):
    """`add_param_group` without room leaves what is free, and the optimizer as it was."""
    model = in_home(small(), home)
    late = list(model.up.parameters())
    first = [p for p in model.parameters() if all(p is not other for other in late)]
    optimizer = optimizer_for(model, params=first)
    others = _fill(home)

    with pytest.raises(HomeFullError):
        optimizer.add_param_group({"params": late})

    del others
    train(model, optimizer, batches(2))
    optimizer.add_param_group({"params": late})
    others = _fill(home)
    train(model, optimizer, batches(2))
    del others
