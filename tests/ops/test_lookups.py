"""Lookups in a vocabulary cut into row tiles."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import embedding

from memtile.geometry import Grid
from memtile.ops import gather_rows, gather_rows_statically, gather_some_rows
from memtile.ops.embedding import Lookup

FORMS = [gather_rows, gather_rows_statically, gather_some_rows]
IDS = [
    torch.tensor([[0, 6, 2], [2, 3, 6]]),
    torch.tensor([5]),
    torch.tensor(4),
    torch.zeros(0, dtype=torch.long),
    torch.zeros(2, 0, dtype=torch.int32),
]


def tables(tiles: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Tensor]]:
    """A dense table of 7 rows of 3, and its tiles as leaves."""
    torch.manual_seed(0)
    table = torch.randn(7, 3, dtype=dtype, requires_grad=True)
    spans = Grid.uniform(7, 3, tiles).out_spans
    return table, [table[span.as_slice()].detach().clone().requires_grad_() for span in spans]


def gathered(form, ids: Tensor, tiles: list[Tensor]) -> Tensor:
    """The rows of the ids through one of the forms."""
    lookups: list[Lookup] = [lambda rows, tile=tile: embedding(rows, tile) for tile in tiles]
    spans = Grid.uniform(7, 3, len(tiles)).out_spans
    if form is gather_rows_statically:
        return form(ids, lookups, spans)
    return form(ids, lookups, spans, 3)


@pytest.mark.parametrize("ids", IDS, ids=lambda ids: str(tuple(ids.shape)))
@pytest.mark.parametrize("tiles", [1, 2, 7])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_bits_of_the_dense_lookup(form, tiles, ids):
    """Each id lies in one tile, so nothing is summed: the rows are identical."""
    table, cut = tables(tiles)

    rows = gathered(form, ids, cut)

    assert rows.shape == (*ids.shape, 3)
    assert torch.equal(rows, embedding(ids, table))


@pytest.mark.parametrize("tiles", [1, 2, 7])
@pytest.mark.parametrize("form", [gather_rows, gather_rows_statically])
def test_first_and_second_derivatives_of_a_lookup_are_exact(form, tiles):
    """gradcheck and gradgradcheck pass for every tile, also for one that no id touches."""
    _, cut = tables(tiles)
    ids = torch.tensor([[0, 1, 1], [6, 0, 6]])

    assert gradcheck(lambda *some: gathered(form, ids, list(some)), cut)
    assert gradgradcheck(lambda *some: gathered(form, ids, list(some)), cut)


@pytest.mark.parametrize("form", [gather_rows, gather_rows_statically])
def test_a_tile_that_no_id_touches_gets_a_gradient_of_zeros(form):
    """Zero, not None: a dense embedding gives untouched rows zeros, and DDP waits for all."""
    _, cut = tables(3)

    gathered(form, torch.tensor([0, 1]), cut).sum().backward()

    assert [bool(tile.grad.any()) for tile in cut] == [True, False, False]


def test_without_gradients_only_tiles_that_hold_an_id_are_asked():
    """Inference does not call the other tiles; without ids it calls the first one."""
    asked: list[int] = []
    spans = Grid.uniform(7, 3, 3).out_spans

    def lookup(tile: int) -> Lookup:
        return lambda rows: asked.append(tile) or torch.zeros(*rows.shape, 3)

    lookups = [lookup(tile) for tile in range(3)]
    gather_some_rows(torch.tensor([6, 0, 5]), lookups, spans, 3)
    gather_some_rows(torch.zeros(0, dtype=torch.long), lookups, spans, 3)

    assert asked == [0, 2, 0]
