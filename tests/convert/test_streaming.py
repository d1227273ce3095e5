"""A dense tensor passes between a file and the tiles that hold it, piece by piece."""

import pytest
import torch
from torch import nn

import memtile
from memtile.checkpoints import Checkpoint, write_checkpoint
from memtile.convert import streaming
from memtile.convert.streaming import bring_in, outgoing
from memtile.errors import CheckpointError
from memtile.optim import dense_parameters
from memtile.testing import LargestAllocation

GRIDS = [(1, 1), (1, 4), (5, 1), (3, 4)]
HOMES = ["memory", "host", "disk"]


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    """A piece is a few rows, so that small tensors pass in many."""
    monkeypatch.setattr(streaming, "PIECE_BYTES", 200)


def layer(grid, home, folder, *, bias=True):
    """A linear of 23 × 13 in this grid."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(13, 23, bias))
    homes = {"memory": None, "host": "host", "disk": memtile.DiskHome(folder)}
    return memtile.tile(model, out_splits=grid[0], in_splits=grid[1], home=homes[home])


def written(model, folder):
    """The dense tensors of a model, written to a file and read back."""
    write_checkpoint(folder, [outgoing(dense, dense.name) for dense in dense_parameters(model)])
    return {name: stored.read() for name, stored in Checkpoint.open(folder).items()}


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("grid", GRIDS)
def test_tiles_of_any_grid_go_out_as_the_dense_tensor(grid, home, tmp_path):
    """Every element comes in the order of the dense tensor, from wherever the tiles live."""
    model = layer(grid, home, tmp_path)

    found = written(model, tmp_path / "out")

    dense = memtile.untile(model)[0]
    assert torch.equal(found["0.weight"], dense.weight)
    assert torch.equal(found["0.bias"], dense.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("grid", GRIDS)
def test_a_dense_tensor_comes_in_to_tiles_of_any_grid(grid, home, dtype, tmp_path):
    """Values are converted to the tiles' dtype, and autograd is told of the write."""
    source = nn.Linear(13, 23, dtype=dtype)
    out = written(nn.Sequential(source), tmp_path / "in")
    stored = Checkpoint.open(tmp_path / "in")
    model = layer(grid, home, tmp_path)
    versions = [parameter._version for parameter in model.parameters()]

    for dense in dense_parameters(model):
        bring_in(dense, stored[dense.name])

    assert all(p._version > v for p, v in zip(model.parameters(), versions, strict=True))
    found = memtile.untile(model)[0]
    assert torch.equal(found.weight, out["0.weight"].float())
    assert torch.equal(found.bias, out["0.bias"].float())


def test_a_turned_weight_goes_both_ways(tmp_path):
    """A Conv1D's (in, out) comes out of its tiles and into them as it is kept densely."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    source = nn.Sequential(Conv1D(23, 13))
    expected = source[0].weight.detach().clone()
    model = memtile.tile(source, out_splits=3, in_splits=2)
    assert torch.equal(written(model, tmp_path)["0.weight"], expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()

    for dense in dense_parameters(model):
        bring_in(dense, Checkpoint.open(tmp_path)[dense.name])

    assert torch.equal(memtile.untile(model)[0].weight, expected)


def test_what_is_held_for_each_part_can_be_another_tensor(tmp_path):
    """Moments of tiles are written and read as values are."""
    model = layer((3, 2), "memory", tmp_path, bias=False)
    held = {id(p): torch.randn_like(p) for p in model.parameters()}
    (dense,) = dense_parameters(model)
    moments = [outgoing(dense, "m", lambda part: held[id(part.parameter)])]
    write_checkpoint(tmp_path, moments)
    other = {id(p): torch.zeros_like(p) for p in model.parameters()}

    bring_in(dense, Checkpoint.open(tmp_path)["m"], lambda part: other[id(part.parameter)])

    assert all(torch.equal(other[key], held[key]) for key in held)


@pytest.mark.parametrize("grid", GRIDS)
def test_nothing_larger_than_a_piece_is_allocated(grid, tmp_path):
    """Neither way takes more memory than a few rows, whatever the home's own pieces are."""
    model = layer(grid, "host", tmp_path, bias=False)
    written(model, tmp_path)
    (dense,), stored = dense_parameters(model), Checkpoint.open(tmp_path)["0.weight"]

    with LargestAllocation() as largest:
        write_checkpoint(tmp_path, [outgoing(dense, "w")])
        bring_in(dense, stored)

    assert largest.nbytes <= 200


def test_tiles_of_two_dtypes_are_refused(tmp_path):
    """Tiles of different dtypes are refused."""
    model = layer((3, 1), "memory", tmp_path)
    model[0].linears[0][0].double()
    dense = dense_parameters(model)[0]

    with pytest.raises(CheckpointError, match=r"the tiles of w are torch\.float32 and"):
        outgoing(dense, "w")


def test_shards_of_a_parallel_linear_are_refused(tmp_path):
    """A shard of a parallel linear is refused."""
    model = layer((3, 1), "memory", tmp_path)
    model[0].linears[0][0].weight = nn.Parameter(torch.ones(4, 13))

    with pytest.raises(CheckpointError, match="a shard of a parallel linear"):
        outgoing(dense_parameters(model)[0], "w")


def test_a_tensor_without_elements_and_a_scalar_pass(tmp_path):
    """Odd shapes of untiled parameters are read and written."""
    model = nn.Module()
    model.none = nn.Parameter(torch.empty(0, 4))
    model.scalar = nn.Parameter(torch.tensor(3.0))
    model.turned = nn.Parameter(torch.arange(6.0).view(2, 3).t())

    found = written(model, tmp_path)

    assert all(torch.equal(found[name], value) for name, value in model.named_parameters())
    with torch.no_grad():
        model.turned.zero_()
        model.scalar.zero_()
    for dense in dense_parameters(model):
        bring_in(dense, Checkpoint.open(tmp_path)[dense.name])
    assert torch.equal(model.turned, torch.arange(6.0).view(2, 3).t())
    assert model.scalar.item() == 3
