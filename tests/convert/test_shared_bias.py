"""A bias that modules share stays whole and shared; the weights beside it become tiles."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import memtile
from memtile.errors import TileSizeWarning


class Bert(nn.Module):
    """A head tied with its embedding, whose bias is a parameter of the model too, as BERT's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.middle = nn.Embedding(23, 12), nn.Linear(12, 12)
        self.head = nn.Linear(12, 23)
        self.head.weight = self.embedding.weight
        self.bias = self.head.bias
        self.double()
        with torch.no_grad():
            self.bias.normal_()

    def forward(self, ids: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.head(torch.tanh(self.middle(self.embedding(ids))))
        return logits


IDS = torch.tensor([[0, 22, 5, 2], [7, 7, 11, 3]])
CUTS = [{"out_splits": 3}, {"out_splits": 1}, {"home": "host"}, {"out_splits": 4, "home": "host"}]


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_weights_are_tied_tiles_and_the_bias_is_one_parameter(cut: dict[str, object]) -> None:
    """Output and gradients are the dense model's, and `untile` gives everything back."""
    dense, model = Bert(), memtile.tile(Bert(), **cut)

    for each in (dense, model):
        each(IDS).square().sum().backward()
    head, embedding = model.head, model.embedding
    assert isinstance(head, memtile.TiledLinear)
    assert isinstance(embedding, memtile.TiledEmbedding)
    assert head.bias is model.bias
    assert head.tile(0, 0).weight is embedding.tile(0, 0).weight
    torch.testing.assert_close(model(IDS), dense(IDS))
    torch.testing.assert_close(model.bias.grad, dense.bias.grad)
    torch.testing.assert_close(embedding.weight.grad + 0, dense.embedding.weight.grad)

    memtile.untile(model)
    assert model.head.bias is model.bias
    assert model.head.weight is model.embedding.weight
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in dense.named_parameters()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_whole_bias_rounds_as_the_dense_one(dtype: torch.dtype) -> None:
    """Under autocast the output is of its dtype; in 16 bits it is as accurate as a linear's."""
    linear, x = nn.Linear(64, 301), torch.randn(256, 64)
    model = nn.ModuleDict({"one": linear, "two": nn.Linear(64, 301)})
    model["two"].bias = linear.bias
    model.to(dtype)
    truth = nn.functional.linear(x.to(dtype).double(), linear.weight.double(), linear.bias.double())
    dense = linear(x.to(dtype))
    tiled = memtile.tile(copy.deepcopy(model), out_splits=4, in_splits=2)

    error, floor = (
        (y.double() - truth).square().mean().sqrt() for y in (tiled["one"](x.to(dtype)), dense)
    )
    assert error <= 2 * floor
    with torch.autocast("cpu", dtype):
        assert tiled.float()["one"](x).dtype == dtype


def test_checkpoints_have_both_names(tmp_path: Path) -> None:
    """State dicts, dense items and saved folders name the bias wherever the dense model does."""
    dense, model = Bert(), memtile.tile(Bert(), out_splits=3, home="host")
    with torch.no_grad():
        dense.bias.add_(1.0)
        dense.embedding.weight.mul_(2.0)

    assert set(dict(memtile.dense_state_dict(model))) == set(dense.state_dict())
    model.load_state_dict(dense.state_dict())
    assert torch.equal(model.bias, dense.bias)
    memtile.save_checkpoint(model, tmp_path)
    other = memtile.tile(Bert(), out_splits=2)
    memtile.load_checkpoint(other, tmp_path)

    assert other.head.bias is other.bias
    found, expected = dict(memtile.dense_state_dict(other)), dense.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    torch.testing.assert_close(other(IDS), dense(IDS), rtol=1e-12, atol=1e-12)
    filled = memtile.empty_model(Bert)
    memtile.tile(filled, out_splits=2, checkpoint=tmp_path)
    torch.testing.assert_close(filled(IDS), dense(IDS), rtol=1e-12, atol=1e-12)


def test_tiles_of_a_bias_load_into_a_whole_one() -> None:
    """A checkpoint of tiles, of a model whose bias nothing shared."""
    linear = nn.Linear(12, 23).double()
    layer = memtile.tile(Bert(), out_splits=3).head
    layer.load_state_dict(memtile.TiledLinear.from_linear(linear, out_splits=4).state_dict())

    assert torch.equal(layer.bias, linear.bias)
    assert torch.equal(layer.weight, linear.weight)
    for assign in (False, True):
        layer.load_state_dict(layer.state_dict(), assign=assign)
        assert torch.equal(layer.bias, linear.bias)


def test_an_optimizer_steps_a_whole_bias_once() -> None:
    """Training gives the dense run's parameters, also from its optimizer's state."""
    dense, model = Bert(), memtile.tile(Bert(), out_splits=3, home="host")
    plain = torch.optim.AdamW(dense.parameters(), lr=0.1)
    ours = memtile.TileOptimizer(model, torch.optim.AdamW, lr=0.1)
    for _ in range(2):
        for each, optimizer in ((dense, plain), (model, ours)):
            each(IDS).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        ours.load_state_dict(plain.state_dict())

    torch.testing.assert_close(model.bias, dense.bias)
    torch.testing.assert_close(model.embedding.weight + 0, dense.embedding.weight)


def test_what_stays_in_memory_beside_a_home_is_said() -> None:
    """A weight larger than all that went home; nothing is said where the rest is small."""
    model = nn.ModuleDict({"norms": nn.Embedding(90, 12, max_norm=1.0), "linear": nn.Linear(12, 9)})

    with pytest.warns(TileSizeWarning, match=r"in memory.* of 432 bytes.*norms\.weight.*max_norm"):
        memtile.tile(model, home="host")
