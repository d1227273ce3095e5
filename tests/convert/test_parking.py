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
from memtile.errors import ArgumentError, CannotTileError, HomeError, HomeFullError, SealError
from memtile.homes import DiskHome, HostHome, berth_of
from memtile.layers import ParkedEmbedding, ParkedLinear
from memtile.transfer import ferries_of

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
    """Values are the old bits, ties are ties, every module is ordinary, no hook of ours is left."""
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
    """Hooks do not pile up, and each home is gone with its tiles."""
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
        assert berth_of(m.weight) is not None


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
        own, berth = berth_of(p), berth_of(p.grad)
        assert own is not None
        assert berth is not None
        assert berth.home is own.home


@pytest.mark.parametrize("home", ["disc", "/var/tmp", 3, DiskHome, b"host", torch.device("cpu")])
def test_a_wrong_home_is_refused_by_its_value(home):
    """What is no home is named, with what can be given; the model is unchanged."""
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


# Kept homes


def train(model: nn.Module) -> None:
    """A few steps of an optimizer that knows nothing of homes."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(3):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(seed)
        model(torch.randn(5, 13, generator=generator)).square().sum().backward()
        optimizer.step()


def test_a_kept_home_restores_what_was_trained(tmp_path):
    """Closed, reopened and given to an untrained model: the trained weights' bits, twice over."""
    with DiskHome(tmp_path, keep=True) as home:
        model = memtile.tile(small_model(), out_splits=3, in_splits=2, home=home)
        train(model)
        trained = {n: p.detach().clone() for n, p in weights_of(model).items()}
    for _ in range(2):
        with DiskHome.reopen(tmp_path) as home:
            again = memtile.tile(small_model(seed=1), out_splits=3, in_splits=2, home=home)
            assert_same_bits({n: p.detach() for n, p in weights_of(again).items()}, trained)
            train(again)
            trained = {n: p.detach().clone() for n, p in weights_of(again).items()}


def test_a_kept_home_restores_a_tied_model(tmp_path):
    """Tied tiles are recorded once, under the first of their names."""
    batch = inputs("llama-tied")
    with DiskHome(tmp_path, keep=True) as home:
        model = memtile.tile(build("llama-tied"), out_splits=3, home=home)
        with torch.no_grad():
            for p in weights_of(model).values():
                p.mul_(1.5)
            expected = model(**batch).logits
    with DiskHome.reopen(tmp_path) as home:
        again = memtile.tile(build("llama-tied"), out_splits=3, home=home)

        with torch.no_grad():
            assert torch.equal(again(**batch).logits, expected)


@pytest.mark.parametrize(
    ("model", "splits", "difference"),
    [
        (lambda: small_model(), 2, r"0\.linears\.0\.0\.weight"),
        (lambda: small_model().double(), 3, r"torch.float64"),
        (lambda: nn.Sequential(nn.Linear(13, 29), nn.Linear(29, 7)), 3, "it has no"),
        (lambda: nn.Sequential(nn.Linear(13, 29), nn.Tanh()), 3, r"which the model has not"),
        (lambda: nn.Sequential(*small_model(), nn.Linear(7, 3)), 3, r"it has no '3\.linears"),
    ],
)
def test_another_model_is_refused_by_name_and_unchanged(tmp_path, model, splits, difference):
    """The first tile that differs is named; nothing was replaced, and the file is as it was."""
    with DiskHome(tmp_path, keep=True) as home:
        kept = memtile.tile(small_model(), out_splits=3, home=home)
    assert weights_of(kept)
    sealed, other = (tmp_path / "tiles.memtile").read_bytes(), model()
    modules = list(other.modules())
    home = DiskHome.reopen(tmp_path)

    with pytest.raises(SealError, match=difference):
        memtile.tile(other, out_splits=splits, home=home)

    assert list(other.modules()) == modules
    home.keep = False
    home.close()
    assert (tmp_path / "tiles.memtile").read_bytes() == sealed


def test_a_damaged_kept_home_is_refused_before_anything_is_replaced(tmp_path):
    """One flipped bit of one tile: it is named, and the model keeps its dense modules."""
    with DiskHome(tmp_path, keep=True) as home:
        kept = memtile.tile(small_model(), out_splits=3, home=home)
        label = max(weights_of(kept))
    home = DiskHome.reopen(tmp_path)
    with open(tmp_path / "tiles.memtile", "r+b") as file:
        file.seek(home.sealed.entries[label].offset)
        (byte,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 4]))
    model = small_model()
    modules = list(model.modules())

    with pytest.raises(SealError, match=label.replace(".", r"\.")):
        memtile.tile(model, out_splits=3, home=home)

    assert list(model.modules()) == modules
    home.keep = False
    home.close()


def test_a_kept_home_whose_model_is_gone_is_not_sealed(tmp_path):
    """There is nothing to seal: it says so with the first tile's name, and no file is left."""
    home = DiskHome(tmp_path, keep=True)
    model = memtile.tile(small_model(), out_splits=3, home=home)
    memtile.untile(model)

    with pytest.raises(SealError, match=r"tiles are gone.*close the home while the model is alive"):
        home.close()

    assert not list(tmp_path.iterdir())
    memtile.tile(model, out_splits=3, home=home)
    home.close()
    assert [file.name for file in tmp_path.iterdir()] == ["tiles.memtile"]


def test_closing_waits_for_what_is_on_its_way_home(tmp_path, monkeypatch):
    """A gradient that was still being written is at home once the home is closed, or it says so."""
    with DiskHome(tmp_path) as home:
        model = memtile.tile(small_model(), out_splits=3, home=home)
        train(model)
        settled = []
        for ferry in ferries_of(home).all():
            settle = ferry.settle
            monkeypatch.setattr(ferry, "settle", lambda s=settle: settled.append(s()))

    assert len(settled) >= 2


def test_a_reopened_home_that_got_no_tiles_leaves_the_file(tmp_path):
    """Refused or not used, closing it does not replace what was kept with nothing."""
    with DiskHome(tmp_path, keep=True) as home:
        kept = memtile.tile(small_model(), out_splits=3, home=home)
    assert weights_of(kept)
    sealed = (tmp_path / "tiles.memtile").read_bytes()

    with DiskHome.reopen(tmp_path) as home, pytest.raises(SealError):
        memtile.tile(small_model(), out_splits=2, home=home)

    assert (tmp_path / "tiles.memtile").read_bytes() == sealed


@pytest.mark.parametrize("before", [{}, {"home": "host"}], ids=["in memory", "at home"])
def test_a_model_that_is_tiled_already_is_refused(before):
    """It would stay where it is: said, with the way out."""
    model = memtile.tile(small_model(), out_splits=3, **before)

    with pytest.raises(CannotTileError, match="untile"):
        memtile.tile(model, out_splits=3, home=DiskHome())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"keep": True}, r"needs a folder of its own"),
        ({"folder": ""}, r"folder='' is no folder"),
        ({"folder": 3}, r"folder=3 is no folder"),
    ],
)
def test_a_home_without_a_place_is_refused(arguments, sentence):
    """No file in a shared folder by accident, none in the working directory."""
    with pytest.raises(ArgumentError, match=sentence):
        DiskHome(**arguments)
