"""`tile(model, home=…)`: whole models whose weights live at a home."""

import copy
import errno
import os
from typing import Any

import pytest
import torch
from leftovers import check_nothing_is_left
from parked_layers import (
    HOMES,
    assert_same_bits,
    gradients_of,
    home_called,
    small_model,
    weights_of,
)
from small_models import build, inputs
from torch import nn

import memtile
from memtile.errors import ArgumentError, CannotTileError, HomeError, HomeFullError
from memtile.homes import DiskHome, HostHome, allocation_of
from memtile.layers import ParkedEmbedding, ParkedLinear
from memtile.transfer import rings_of

nothing_is_left = pytest.fixture(autouse=True)(check_nothing_is_left)


def results(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Logits and all gradients of one training pass."""
    model.zero_grad()
    logits = model(**batch).logits
    logits.square().mean().backward()
    return {"logits": logits.detach(), **gradients_of(model)}


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2", "t5"])
@pytest.mark.parametrize("sizes", [{"out_splits": 3, "in_splits": 2}, {"out_splits": 1}], ids=str)
def test_every_home_gives_the_same_bits(kind, sizes):
    """Logits and gradients of two passes agree over homes, and with the dense model closely."""
    dense, batch, found = build(kind), inputs(kind), []
    for home in HOMES:
        model = memtile.tile(copy.deepcopy(dense), **sizes, home=home_called(home))
        results(model, batch)
        found.append(results(model, batch))
        assert weights_of(model)

    assert_same_bits(found[1], found[0])
    assert_same_bits(found[2], found[0])
    torch.testing.assert_close(found[0]["logits"], dense(**batch).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("home", HOMES)
def test_untile_gives_the_plain_model_back(home):
    """`untile` keeps bits and ties, and leaves plain modules without a hook of ours."""
    dense = build("llama-tied")
    model = memtile.tile(copy.deepcopy(dense), out_splits=3, home=home_called(home))

    memtile.untile(model)

    assert_same_bits(dict(model.state_dict()), dict(dense.state_dict()))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert [type(m) for m in model.modules()] == [type(m) for m in dense.modules()]
    assert not weights_of(model)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert not model._forward_hooks_always_called


def test_tiling_and_untiling_again_and_again_leaves_nothing():
    """Tiling and untiling again adds no hooks, and each home is freed with its tiles."""
    model = small_model()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for splits in (1, 2, 3):
        memtile.tile(model, out_splits=splits, home=DiskHome())
        assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1
        memtile.untile(model)

    assert_same_bits({n: p.detach() for n, p in model.named_parameters()}, before)
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("home", HOMES)
def test_without_a_size_whole_layers_are_parked(home):
    """`tile(model, home=…)` alone parks every linear and embedding in one tile each."""
    model = memtile.tile(build("llama-tied"), home=home_called(home))

    parked = [m for m in model.modules() if isinstance(m, ParkedLinear | ParkedEmbedding)]
    assert len({id(m.weight) for m in parked}) == len(weights_of(model)) == 15
    for m in parked:
        assert allocation_of(m.weight) is not None


def test_a_size_parks_layers_that_fit_too():
    """With max_tile_bytes, layers below it are parked whole and the others in tiles."""
    model = memtile.tile(small_model(), max_tile_bytes=29 * 4 * 5, home=DiskHome())

    assert {n: tuple(p.shape) for n, p in weights_of(model).items()} == {
        "0.linears.0.0.weight": (10, 13),
        "0.linears.1.0.weight": (10, 13),
        "0.linears.2.0.weight": (9, 13),
        "2.linears.0.0.weight": (4, 29),
        "2.linears.1.0.weight": (3, 29),
    }


@pytest.mark.parametrize("home", HOMES)
def test_frozen_stays_frozen_and_gradients_move_home(home):
    """requires_grad and an existing gradient of each dense weight are those of its tiles."""
    dense = small_model()
    dense(torch.randn(5, 13)).sum().backward()
    dense[2].weight.requires_grad_(False)
    expected = dense[0].weight.grad.clone()
    model = memtile.tile(dense, out_splits=3, in_splits=2, home=home_called(home))

    assert not any(p.requires_grad for p in model[2].tile_parameters("weight").values())
    assert all(p.requires_grad for p in model[0].tile_parameters("weight").values())
    assert torch.equal(model[0].weight.grad + 0, expected)
    for p in model[0].tile_parameters("weight").values():
        own, allocation = allocation_of(p), allocation_of(p.grad)
        assert own is not None
        assert allocation is not None
        assert allocation.home is own.home


@pytest.mark.parametrize("home", ["disc", "/var/tmp", 3, DiskHome, b"host", torch.device("cpu")])
def test_a_wrong_home_is_refused_by_its_value(home):
    """A wrong home is named, with what can be given; the model is unchanged."""
    model = small_model()
    with pytest.raises(ArgumentError, match="home="):
        memtile.tile(model, out_splits=2, home=home)

    assert type(model[0]) is nn.Linear
    assert not model._forward_pre_hooks


def test_a_closed_home_is_refused_before_anything_is_parked():
    """A home that was closed parks nothing, and the model is unchanged."""
    for home in (DiskHome(), HostHome()):
        home.close()
        model = small_model()
        with pytest.raises(HomeError, match="closed"):
            memtile.tile(model, out_splits=2, home=home)

        assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("has_gradients", [False, True])
def test_a_full_disk_leaves_the_model_unchanged(monkeypatch, has_gradients):
    """Room for all tiles, and for gradients that exist, is taken before the first is parked."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(700, 600), nn.Linear(600, 700)])
    if has_gradients:
        model(torch.randn(2, 700)).sum().backward()
    modules, home, real = list(model.modules()), DiskHome(), os.posix_fallocate
    weights = 2 * 700 * 600 * 4

    def nearly_full(fd: int, offset: int, size: int) -> None:
        if offset + size > weights * (1.5 if has_gradients else 0.9):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", nearly_full)
    with pytest.raises(HomeFullError):
        memtile.tile(model, out_splits=3, home=home)
    monkeypatch.undo()

    assert list(model.modules()) == modules
    assert not model._forward_pre_hooks
    memtile.tile(model, out_splits=3, home=home)
    assert len(weights_of(model)) == 6


def train(model: nn.Module) -> None:
    """A few steps of a plain torch optimizer."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(3):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(seed)
        model(torch.randn(5, 13, generator=generator)).square().sum().backward()
        optimizer.step()


def test_closing_waits_for_what_is_on_its_way_home(tmp_path, monkeypatch):
    """Closing a home waits for gradients that are still being written."""
    with DiskHome(tmp_path) as home:
        model = memtile.tile(small_model(), out_splits=3, home=home)
        train(model)
        flushed = []
        for ring in rings_of(home).all():
            flush = ring.flush
            monkeypatch.setattr(ring, "flush", lambda s=flush: flushed.append(s()))

    assert len(flushed) >= 2


@pytest.mark.parametrize("before", [{}, {"home": "host"}], ids=["in memory", "at home"])
def test_a_model_that_is_tiled_already_is_refused(before):
    """A model whose tiles are in memory is refused, and the message names the way out."""
    model = memtile.tile(small_model(), out_splits=3, **before)

    with pytest.raises(CannotTileError, match="untile"):
        memtile.tile(model, out_splits=3, home=DiskHome())


@pytest.mark.parametrize(("folder", "sentence"), [("", "folder=''"), (3, "folder=3")])
def test_a_home_without_a_place_is_refused(folder, sentence):
    """An empty folder name is refused: no file is made in the working directory by accident."""
    with pytest.raises(ArgumentError, match=f"{sentence} is no folder"):
        DiskHome(folder)
