"""A model in memory is tiled in place and turned back, bit for bit."""

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

import memtile
from memtile.convert import Integration, kinds
from memtile.errors import CannotTileError


class Net(nn.Module):
    """An embedding, two linears of which one stands at two places, and a tied head."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(23, 12, padding_idx=2, dtype=dtype)
        self.up = nn.Linear(12, 31, dtype=dtype)
        self.down = nn.Linear(31, 12, bias=False, dtype=dtype)
        self.again = self.up
        self.head = nn.Linear(12, 23, bias=False, dtype=dtype)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Logits."""
        x = self.embedding(ids)
        logits: Tensor = self.head(x + self.down(torch.tanh(self.up(x) + self.again(x))))
        return logits


IDS = torch.tensor([[0, 22, 5, 2], [7, 7, 11, 3]])
CUTS = [
    {"out_splits": 3},
    {"out_splits": 4, "in_splits": 3},
    {"max_tile_bytes": 130},
    {"out_splits": 1},
]


def parts(model: nn.Module) -> dict[str, tuple[object, ...]]:
    """The properties of each dense parameter that must not change."""
    return {n: (p.dtype, p.device, p.requires_grad) for n, p in model.named_parameters()}


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untile_gives_the_parameters_back_bit_for_bit(
    cut: dict[str, int], dtype: torch.dtype
) -> None:
    """tile then untile is the same model: names, bits, ties, modules."""
    model = Net(dtype)
    before = copy.deepcopy(model.state_dict())

    tiled = memtile.tile(model, **cut)  # type: ignore[arg-type]
    assert tiled is model
    assert isinstance(model.up, memtile.TiledLinear)
    memtile.untile(model)

    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert model.head.weight is model.embedding.weight
    assert model.again is model.up
    assert repr(model) == repr(Net(dtype))


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_a_tiled_model_computes_and_trains_as_the_dense_one(cut: dict[str, int]) -> None:
    """Output and all gradients, ties included, are as accurate as the dense model's own."""
    truth, dense = Net().double(), Net()
    tiled = memtile.tile(Net(), **cut)  # type: ignore[arg-type]

    for model in (truth, dense, tiled):
        model(IDS).square().sum().backward()
    memtile.untile(tiled)

    for (name, a), b, t in zip(
        tiled.named_parameters(), dense.parameters(), truth.parameters(), strict=True
    ):
        assert a.grad is not None
        assert b.grad is not None
        assert t.grad is not None
        ours, theirs = (a.grad - t.grad).norm(), (b.grad - t.grad).norm()
        assert ours <= 2 * theirs + torch.finfo(torch.float32).eps * t.grad.norm(), name


def test_ties_are_one_set_of_tiles() -> None:
    """Embedding and head share parameters, which are counted, stepped and saved once."""
    model = memtile.tile(Net(), out_splits=3)

    assert [p for p, _ in model.named_parameters() if p.startswith("head")] == []
    for o in range(3):
        assert model.head.linears[o][0].weight is model.embedding.embeddings[o].weight
    assert model.again is model.up


def test_frozen_mode_gradients_and_marks_survive_both_ways() -> None:
    """requires_grad, training mode, gradients and attributes of parameters stay."""
    model = Net()
    model(IDS).sum().backward()
    model.down.weight.requires_grad_(False)
    model.up.weight.decay = 0.5  # type: ignore[attr-defined]  # what optimizers set
    model.up.eval()
    before, gradients = parts(model), {n: p.grad for n, p in model.named_parameters()}

    memtile.tile(model, out_splits=3, in_splits=2)
    frozen = [p.requires_grad for p in model.down.parameters()]
    marks = [tile.weight.decay for _, tile in model.up.tiles()]  # type: ignore[union-attr]
    modes = model.up.training, model.down.training
    memtile.untile(model)

    assert frozen == [False] * 6
    assert marks == [0.5] * 6
    assert modes == (False, True)
    assert parts(model) == before
    assert model.up.weight.decay == 0.5  # type: ignore[union-attr]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradients[name])


def test_each_replaced_layer_is_freed_before_the_next_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The peak is the model and one layer: at most one dense weight is alive beside its tiles."""
    model = nn.Sequential(*(nn.Linear(9, 9, bias=False) for _ in range(6)))
    gc.collect()
    dense = [weakref.ref(layer.weight) for layer in model]
    alive: list[int] = []
    make = memtile.TiledLinear.from_dense.__func__  # type: ignore[attr-defined]

    def watched(cls: type, *args: object) -> nn.Module:
        alive.append(sum(ref() is not None for ref in dense))
        made: nn.Module = make(cls, *args)
        return made

    monkeypatch.setattr(memtile.TiledLinear, "from_dense", classmethod(watched))
    memtile.tile(model, out_splits=2)

    assert alive == [6, 5, 4, 3, 2, 1]
    assert all(ref() is None for ref in dense)


def test_each_tiled_layer_is_freed_before_the_next_dense_one_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """untile holds no more than the model and one layer either."""
    model = memtile.tile(
        nn.Sequential(*(nn.Linear(9, 9, bias=False) for _ in range(5))), out_splits=2
    )
    tiles = [weakref.ref(layer.tile(0, 0).weight) for layer in model]  # type: ignore[operator]
    alive: list[int] = []
    back = memtile.TiledLinear.to_dense

    def watched(self: memtile.TiledLinear, weight: nn.Parameter | None = None) -> nn.Module:
        alive.append(sum(ref() is not None for ref in tiles))
        return back(self, weight)

    monkeypatch.setattr(memtile.TiledLinear, "to_dense", watched)
    memtile.untile(model)

    assert alive == [5, 4, 3, 2, 1]


def test_tiling_twice_tiles_only_what_is_dense() -> None:
    """A tiled layer's own tiles are not candidates."""
    model = memtile.tile(Net(), out_splits=3, modules=["up"])
    tile = model.up.tile(0, 0)  # type: ignore[operator]

    memtile.tile(model, out_splits=2)

    assert model.up.tile(0, 0) is tile  # type: ignore[operator]
    assert model.down.out_splits == 2


def test_a_bare_linear_is_refused_with_the_way_out() -> None:
    """The root cannot be replaced in place."""
    with pytest.raises(CannotTileError, match="from_linear"):
        memtile.tile(nn.Linear(3, 4), out_splits=2)
    with pytest.raises(CannotTileError, match="to_linear"):
        memtile.untile(memtile.TiledLinear(3, 4))


def test_a_layer_frozen_in_part_cannot_be_untiled_and_says_so() -> None:
    """One dense parameter cannot be half frozen; the layer is left whole."""
    model = memtile.tile(Net(), out_splits=3)
    model.down.tile(1, 0).weight.requires_grad_(False)  # type: ignore[operator]

    with pytest.raises(
        CannotTileError, match="down cannot be untiled: some tiles of its weight require"
    ):
        memtile.untile(model)

    assert isinstance(model.down, memtile.TiledLinear)
    assert model(IDS).shape == (2, 4, 23)


def test_errors_name_the_layer_in_its_model() -> None:
    """A wrong width deep inside a model is reported with the layer's full name."""
    model = nn.ModuleDict({"block": nn.ModuleDict({"proj": nn.Linear(10, 7)})})
    memtile.tile(model, out_splits=2)

    with pytest.raises(memtile.errors.TileShapeError, match=r"block\.proj: the input is 9 wide"):
        model["block"]["proj"](torch.randn(2, 9))  # type: ignore[index]


def test_an_integration_is_asked_only_where_its_library_was_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Until then no module can be one of its: it keeps nothing, and is told of no replacement."""

    def refuse(*given: object) -> dict[str, str]:
        raise AssertionError

    unknown = Integration("imported_by_nobody", keeps=refuse, replaced=refuse)  # type: ignore[arg-type]
    monkeypatch.setattr(kinds, "_integrations", [*kinds._integrations, unknown])

    model = memtile.untile(memtile.tile(Net(), out_splits=2))

    assert type(model.up) is nn.Linear
