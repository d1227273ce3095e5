"""Embeddings whose rows are parked."""

import copy
import mmap
import pickle

import pytest
import torch
from leftovers import check_nothing_is_left
from parked_layers import HOMES, assert_same_bits, gradients_of, home_called
from paths import assert_same
from torch import nn

import memtile
from memtile import TiledEmbedding
from memtile.errors import ParkedCopyWarning, ParkedError, TileDtypeError, TileIndexError
from memtile.geometry import Grid
from memtile.homes import allocation_of
from memtile.layers import ParkedEmbedding

nothing_is_left = pytest.fixture(autouse=True)(check_nothing_is_left)
in_every_home = pytest.mark.parametrize("home", HOMES)
by_rows = pytest.mark.parametrize("out_splits", [1, 4, 23])
IDS = [
    torch.tensor([[0, 22, 5], [7, 7, 11]]),
    torch.tensor([3], dtype=torch.int32),
    torch.empty(0, 2, dtype=torch.long),
]


def pair(out_splits: int, home: str, **options: object) -> tuple[nn.Embedding, TiledEmbedding]:
    """A seeded embedding, and its tiled form with parked rows."""
    torch.manual_seed(0)
    dense = nn.Embedding(23, 5, dtype=torch.float64, **options)
    found = memtile.homes.resolve_home(home_called(home), "cpu")
    return dense, TiledEmbedding.from_dense(dense, Grid.uniform(23, 5, out_splits), home=found)


@in_every_home
@by_rows
@pytest.mark.parametrize("ids", IDS, ids=["matrix", "int32", "none"])
@pytest.mark.parametrize(
    "options",
    [{}, {"padding_idx": 7}, {"padding_idx": -1}, {"scale_grad_by_freq": True}],
    ids=str,
)
def test_rows_and_gradients_are_the_dense_embeddings(home, out_splits, ids, options):
    """Rows bit for bit; gradients over two iterations, with padding and frequencies counted."""
    dense, tiled = pair(out_splits, home, **options)
    for _ in range(2):
        for module in (dense, tiled):
            rows = module(ids)
            (rows * torch.arange(5)).square().sum().backward()
        assert torch.equal(rows, dense(ids))

    assert_same(tiled.weight.grad + 0, dense.weight.grad)
    for p in tiled.parameters():
        assert allocation_of(p) is not None


class Advised:
    """Stands for the C library: notes for which bytes the kernel was given advice."""

    def __init__(self) -> None:
        self.areas: list[tuple[int, int]] = []

    def madvise(self, start, length, advice):
        assert advice == mmap.MADV_WILLNEED
        self.areas.append((start.value, start.value + length.value))


@pytest.fixture
def looked_up(monkeypatch):
    """Gives the areas that were read ahead in a lookup of rows 5, 7 and 22, and the first row."""
    tile = ParkedEmbedding(23, 1030, home=memtile.DiskHome())
    library = Advised()
    monkeypatch.setattr("memtile.homes.kernel._library", lambda: library)
    assert tile(torch.tensor([[7, 22], [5, 7]])).shape == (2, 2, 1030)
    return library.areas, tile.weight.data_ptr()


@pytest.mark.usefixtures("in_slabs")
def test_rows_are_read_ahead_at_once(looked_up):
    """The kernel is asked for the pages of each row, once, and for no others."""
    areas, first = looked_up

    rows = [(first + row * 4120, first + (row + 1) * 4120) for row in (5, 7, 22)]
    assert areas == [(begin - begin % mmap.PAGESIZE, end) for begin, end in rows]


def test_rows_in_the_page_cache_are_not_read_ahead(looked_up):
    """They are there: to ask would cost a call for each."""
    assert looked_up[0] == []


@in_every_home
def test_it_starts_as_in_memory(home):
    """The same bits under the same seed, the padding row zero."""
    layers = []
    for options in ({}, {"home": home_called(home)}):
        torch.manual_seed(4)
        layers.append(TiledEmbedding(23, 5, padding_idx=9, out_splits=4, **options))

    assert_same_bits(dict(layers[1].state_dict()), dict(layers[0].state_dict()))
    assert not layers[1].weight[9].any()


@in_every_home
@by_rows
def test_writes_between_passes_are_seen(home, out_splits):
    """Through `.data`, in place, in training, evaluation and inference."""
    dense, tiled = pair(out_splits, home)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        tiled(IDS[0])
        for p in [*tiled.parameters(), *dense.parameters()]:
            p.data.mul_(2)
        with mode():
            assert torch.equal(tiled(IDS[0]), dense(IDS[0]))


@by_rows
def test_a_tile_written_between_forward_and_backward_raises(out_splits):
    """As linears do: the gradient would be of other values."""
    _, tiled = pair(out_splits, "disk")
    rows = tiled(IDS[0])
    with torch.no_grad():
        tiled.tile(0, 0).weight.zero_()

    with pytest.raises(ParkedError, match="modified between its forward"):
        rows.sum().backward()


@by_rows
def test_second_derivatives_and_batches_of_gradients(out_splits):
    """create_graph and is_grads_batched go through autograd and are the dense embedding's."""
    dense, tiled = pair(out_splits, "disk")
    found = []
    for module in (dense, tiled):
        weights = list(module.parameters())
        rows = module(IDS[0])
        first = torch.autograd.grad(rows.pow(3).sum(), weights, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), weights)
        seeds = torch.ones(2, *rows.shape, dtype=torch.float64)
        jacobian = torch.autograd.grad(module(IDS[0]), weights, seeds, is_grads_batched=True)
        found.append((torch.cat(second), torch.cat(jacobian, 1)))

    assert_same(found[1][0], found[0][0])
    assert_same(found[1][1], found[0][1])


@by_rows
def test_gradients_are_asked_for_in_every_way(out_splits):
    """`backward(inputs=…)` of others leaves rows alone; frozen rows get none; hooks fire once."""
    _, tiled = pair(out_splits, "disk")
    scale = torch.ones(5, dtype=torch.float64, requires_grad=True)
    (tiled(IDS[0]) * scale).sum().backward(inputs=[scale])
    assert all(p.grad is None for p in tiled.parameters())

    calls: list[int] = []
    for number, p in enumerate(tiled.parameters()):
        p.register_post_accumulate_grad_hook(lambda p, n=number: calls.append(n))
    tiled(IDS[0]).sum().backward()
    assert sorted(calls) == list(range(out_splits))

    before = gradients_of(tiled)
    tiled.requires_grad_(False)
    assert not tiled(IDS[0]).requires_grad
    assert_same_bits(gradients_of(tiled), before)


def test_wrong_ids_are_refused():
    """Floats, ids below zero and past the end, and the layer goes on."""
    for out_splits in (1, 4):
        dense, tiled = pair(out_splits, "disk")
        with pytest.raises(TileDtypeError):
            tiled(torch.ones(2))
        for wrong in (-1, 23):
            with pytest.raises(TileIndexError):
                tiled(torch.tensor([wrong]))
        assert torch.equal(tiled(IDS[0]), dense(IDS[0]))


def test_transforms_and_copies():
    """vmap reads the rows; a copy is an ordinary embedding; alone it is an nn.Embedding."""
    dense, tiled = pair(4, "disk")
    assert torch.equal(torch.vmap(tiled)(IDS[0]), dense(IDS[0]))
    for copied in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        with pytest.warns(ParkedCopyWarning):
            reference = copied(tiled)
        assert {type(t) for _, t in reference.tiles()} == {nn.Embedding}
        assert torch.equal(reference(IDS[0]), dense(IDS[0]))
    alone = ParkedEmbedding(23, 5, padding_idx=3, home=memtile.homes.DiskHome())

    assert not alone(torch.tensor([3])).any()
    assert "home=" in repr(alone)
