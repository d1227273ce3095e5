"""The one way to whole values: with an engine that keeps tiles in shards, everything still works.

The engine here is the smallest that can be: outside of `gathered` every parameter is empty, as
under DeepSpeed's ZeRO-3, and what is written without asking to write is lost.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from paths import GRIDS, grid_id, pair
from torch import Tensor, nn

from memtile import TiledEmbedding, TiledLinear
from memtile.layers import gathered, register_gatherer


class Engine:
    """Holds the values of the parameters that it was given; they are empty in between."""

    def __init__(self) -> None:
        self.values: dict[nn.Parameter, Tensor] = {}
        self.open: dict[nn.Parameter, int] = {}
        self.most_open = 0

    def shard(self, module: nn.Module) -> None:
        """Take the parameters of a module away."""
        for parameter in module.parameters():
            self.values[parameter] = parameter.detach().clone()
            self.open[parameter] = 0
            parameter.data = torch.empty(0)

    def shape_of(self, tensor: Tensor) -> tuple[int, ...] | None:
        """Its own parameters' whole shapes."""
        return tuple(self.values[tensor].shape) if tensor in self.values else None

    @contextmanager
    def gather(self, parameters: Sequence[nn.Parameter], write: bool) -> Iterator[None]:
        """Make them whole inside; keep what was written when asked to."""
        held = [parameter for parameter in parameters if parameter in self.values]
        for parameter in held:
            if not self.open[parameter]:
                parameter.data = self.values[parameter].clone()
            self.open[parameter] += 1
        self.most_open = max(self.most_open, sum(map(bool, self.open.values())))
        yield
        for parameter in held:
            if write:
                self.values[parameter] = parameter.detach().clone()
            self.open[parameter] -= 1
            if not self.open[parameter]:
                parameter.data = torch.empty(0)

    def assert_all_sharded(self) -> None:
        """Every gather was closed."""
        assert not any(self.open.values())
        assert all(parameter.numel() == 0 for parameter in self.values)


@pytest.fixture
def engine() -> Iterator[Engine]:
    """An engine that is asked wherever memtile touches whole values."""
    engine = Engine()
    unregister = register_gatherer(engine.gather, engine.shape_of)
    yield engine
    unregister()
    engine.assert_all_sharded()


@pytest.mark.parametrize("grid", GRIDS, ids=grid_id)
def test_the_weight_is_read_whole(engine, grid):
    """The handle's operations, its repr and `to_linear` see the values that the engine keeps."""
    dense, layer = pair(grid)
    engine.shard(layer)

    assert layer.weight.shape == (11, 13)
    with torch.no_grad():
        assert torch.equal(layer.weight + 0, dense.weight)
        assert torch.equal(layer.bias + 0, dense.bias)
    linear = layer.to_linear()
    assert torch.equal(linear.weight, dense.weight)
    assert torch.equal(linear.bias, dense.bias)


@pytest.mark.parametrize("grid", GRIDS, ids=grid_id)
@pytest.mark.parametrize("source", ["dense", "sharded dense", "tiles", "sharded tiles"])
def test_values_are_copied_whole_into_one_tile_after_the_other(engine, grid, source):
    """`copy_params_from` gathers its source, and each of its own tiles to be written."""
    dense, _ = pair((1, 1), seed=1)
    other = dense if "dense" in source else TiledLinear.from_linear(dense, 3, 4)
    expected = dense.weight.detach().clone()
    _, layer = pair(grid)
    engine.shard(layer)
    if source.startswith("sharded"):
        engine.shard(other)
    of_source = len(list(other.parameters())) if source.startswith("sharded") else 0

    layer.copy_params_from(other)

    with torch.no_grad():
        assert engine.most_open <= of_source + 1
        assert torch.equal(layer.weight + 0, expected)


@pytest.mark.parametrize("out_splits", [1, 4])
def test_starting_values_are_drawn_into_the_engines_tiles(engine, out_splits):
    """`reset_parameters` writes each tile through the engine: the dense layer's bits."""
    _, layer = pair((out_splits, 1))
    engine.shard(layer)
    torch.manual_seed(3)
    layer.reset_parameters()
    torch.manual_seed(3)
    dense = nn.Linear(13, 11)

    assert engine.most_open == 1
    with torch.no_grad():
        assert torch.equal(layer.weight + 0, dense.weight)
        assert torch.equal(layer.bias + 0, dense.bias)


@pytest.mark.parametrize("form", ["dense", "same grid", "other grid"])
@pytest.mark.parametrize("grid", GRIDS, ids=grid_id)
def test_every_form_of_a_checkpoint_is_loaded_through_the_engine(engine, grid, form):
    """Values go into one gathered tile after the other, whatever grid they come from."""
    dense, _ = pair((1, 1), seed=1)
    grids = {"same grid": grid, "other grid": (5, 4)}
    state = dense.state_dict()
    if form in grids:
        rows, columns = grids[form]
        state = TiledLinear.from_linear(dense, columns, rows).state_dict()
    _, layer = pair(grid)
    engine.shard(layer)

    layer.load_state_dict(state)

    assert engine.most_open == 1
    with torch.no_grad():
        assert torch.equal(layer.weight + 0, dense.weight)
        assert torch.equal(layer.bias + 0, dense.bias)


def test_an_embedding_goes_through_the_engine_too(engine):
    """Reset, load and read of row tiles."""
    torch.manual_seed(0)
    dense = nn.Embedding(11, 3, padding_idx=5)
    layer = TiledEmbedding(11, 3, padding_idx=5, out_splits=4)
    engine.shard(layer)
    layer.reset_parameters()
    with torch.no_grad():
        drawn = layer.weight + 0
    layer.load_state_dict(dense.state_dict())

    assert drawn[5].eq(0).all()
    assert drawn[4].ne(0).all()
    assert torch.equal(layer.to_embedding().weight, dense.weight)


def test_an_engine_that_is_taken_away_is_asked_no_more():
    """`register_gatherer` gives the function that ends it."""
    asked = []

    @contextmanager
    def gather(parameters: Sequence[nn.Parameter], write: bool) -> Iterator[None]:
        asked.append((len(parameters), write))
        yield

    parameter = nn.Parameter(torch.ones(1))
    unregister = register_gatherer(gather)
    with gathered([parameter], write=True):
        pass
    unregister()
    with gathered([parameter]):
        pass

    assert asked == [(1, True)]


def test_an_engine_is_asked_only_where_its_library_was_imported():
    """An engine of a library that nobody imported has no parameter: it is not called."""

    @contextmanager
    def refuse(parameters: Sequence[nn.Parameter], write: bool) -> Iterator[None]:
        raise AssertionError
        yield

    unregister = register_gatherer(refuse, library="imported_by_nobody")
    try:
        with gathered([nn.Parameter(torch.ones(1))]) as kept:
            assert kept
    finally:
        unregister()
