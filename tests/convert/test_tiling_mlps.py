"""MLPs told by what their forward does, and what is done where a call is no MLP."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from leftovers import check_nothing_is_left
from torch import Tensor, nn
from torch.nn import functional

import memtile
from memtile.convert import select_linears, select_mlps, tiled_layers
from memtile.errors import ArgumentError
from memtile.layers import mlp_in_tiles
from memtile.testing import error_ratio, peak_allocated_bytes

nothing_is_left = pytest.fixture(autouse=True)(check_nothing_is_left)
WIDTH, INNER, OUT = 13, 29, 11


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of each call of `tiled_mlp`."""
    seen: list[dict[str, Any]] = []

    def noted(x: Tensor, *layers: Any, **options: Any) -> Tensor:
        seen.append(options)
        return memtile.tiled_mlp(x, *layers, **options, block_rows=3, block_features=4)

    monkeypatch.setattr(mlp_in_tiles, "tiled_mlp", noted)
    return seen


class Mlp(nn.Module):
    """Gate, up and down, and a forward that is given."""

    def __init__(self, forward: Callable[["Mlp", Tensor], Any], gated: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, OUT)
        if gated:
            self.gate = nn.Linear(WIDTH, INNER)
        self.act, self.dropout, self.scale = nn.GELU(), nn.Dropout(0.0), 1.5
        self.register_buffer("calls", torch.zeros(1))
        self.own = forward

    def forward(self, x: Tensor) -> Any:
        return self.own(self, x)


def plain(mlp: Any, x: Tensor) -> Tensor:
    return mlp.down(mlp.dropout(mlp.act(mlp.up(x))))


def gated(mlp: Any, x: Tensor) -> Tensor:
    return mlp.down(mlp.dropout(mlp.act(mlp.gate(x)) * mlp.up(x)))


def by_functions(mlp: Any, x: Tensor) -> Tensor:
    a = mlp.gate(x)
    h = torch.mul(mlp.up(input=x) if False else mlp.up(x), a * torch.sigmoid(1.702 * a))
    h = functional.dropout(h, 0.0, mlp.training)
    return functional.dropout(mlp.down(h), 0.0, mlp.training) * mlp.scale


def in_place(mlp: Any, x: Tensor) -> Tensor:
    h = mlp.up(x)
    h *= functional.relu(mlp.gate(x).mul_(2.0), inplace=True).clone()
    return mlp.down(h).mul_(2.0)


def powers(mlp: Any, x: Tensor) -> Tensor:
    h = mlp.up(x)
    inner = 0.79788456 * (h + 0.044715 * torch.pow(h, 3.0))
    return mlp.down((0.5 * h * (1.0 + torch.tanh(inner))).to(x.dtype).contiguous())


def as_t5(mlp: Any, x: Tensor) -> Tensor:
    h = mlp.dropout(functional.relu(mlp.up(x)))
    if isinstance(mlp.down.weight, Tensor) and h.dtype != mlp.down.weight.dtype:
        h = h.to(mlp.down.weight.dtype)
    return mlp.down(h)


TAKEN = {
    "plain": (plain, False),
    "gated": (gated, True),
    "by functions": (by_functions, True),
    "in place": (in_place, True),
    "powers": (powers, False),
    "as T5": (as_t5, False),
}


def softmax(mlp: Any, x: Tensor) -> Tensor:
    return mlp.down(mlp.gate(x).softmax(-1) * mlp.up(x))


def two_activations(mlp: Any, x: Tensor) -> Tensor:
    return mlp.down(mlp.act(mlp.gate(x)) * mlp.up(x).clamp(max=1.0))


def bilinear(mlp: Any, x: Tensor) -> Tensor:
    return mlp.down(mlp.gate(x) * mlp.up(x))


def residual(mlp: Any, x: Tensor) -> Tensor:
    return mlp.down(mlp.act(mlp.gate(x)) * mlp.up(x)) + x[..., :OUT]


def normed(mlp: Any, x: Tensor) -> Tensor:
    return mlp.down(mlp.act(mlp.gate(x.tanh())) * mlp.up(x))


def with_weights(mlp: Any, x: Tensor) -> Tensor:
    return functional.linear(mlp.act(mlp.gate(x)) * mlp.up(x), mlp.down.weight)


def counting(mlp: Any, x: Tensor) -> Tensor:
    mlp.calls.add_(1)
    return gated(mlp, x)


def by_value(mlp: Any, x: Tensor) -> Tensor:
    return gated(mlp, x) if x.sum().item() > 0 else mlp.down(mlp.up(x))


def through_a_view(mlp: Any, x: Tensor) -> Tensor:
    h = mlp.up(x)
    h.view(-1, INNER).relu_()
    return mlp.down(functional.silu(mlp.gate(x)) * h)


def random(mlp: Any, x: Tensor) -> Tensor:
    return mlp.down(functional.rrelu(mlp.gate(x), training=True) * mlp.up(x))


def dropped(mlp: Any, x: Tensor) -> Tensor:
    return mlp.down(functional.gelu(functional.dropout(mlp.gate(x), 0.001)) * mlp.up(x))


def rounded(mlp: Any, x: Tensor) -> Tensor:
    return mlp.down(mlp.act(mlp.gate(x).to(torch.bfloat16)).to(x.dtype) * mlp.up(x))


def several(mlp: Any, x: Tensor) -> Any:
    return gated(mlp, x), x


LEFT = {
    softmax: "its activation is not element-wise",
    two_activations: "its forward gives down something else than the product",
    bilinear: "its forward has no activation between its linears",
    residual: "between what down gives and the result its forward uses something else",
    normed: "its forward calls gate, up, down; of an MLP each linear is called once",
    with_weights: "its forward uses a tensor that is neither its input nor made of it",
    counting: "its forward uses a tensor that is neither its input nor made of it",
    by_value: "its forward cannot be followed with shapes alone (RuntimeError",
    through_a_view: "its forward writes to a tensor by relu_",
    random: "its activation is not element-wise",
    dropped: "its activation is not element-wise",
    rounded: "its forward changes the dtype to torch.bfloat16",
    several: "its forward gives a tuple, no tensor",
}


def batch(*lead: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*(lead or (2, 4)), WIDTH, generator=generator, dtype=torch.float64)
    return x.requires_grad_()


def assert_same_step(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    """Results, and gradients of input and parameters, agree in float64."""
    found, truth = ours(x), theirs(x)
    upstream = torch.randn(truth.shape, dtype=torch.float64)
    own, expected = (
        torch.autograd.grad(y, [x, *mlp.parameters()], upstream, allow_unused=True)
        for y, mlp in ((found, ours), (truth, theirs))
    )
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lead", [(2, 4), (3,), (1, 1, 5), ()], ids=str)
@pytest.mark.parametrize("form", TAKEN)
def test_forms_of_an_mlp(form: str, lead: tuple[int, ...], calls: list[Any]):
    """Modules and functions, in place and not, whatever order; inputs of any rank."""
    dense = Mlp(*TAKEN[form]).double()
    ours = memtile.tile_mlps(copy.deepcopy(dense))

    x = batch(*(lead or (2, 4))) if lead else batch(1)[0].detach().requires_grad_()
    assert_same_step(ours, dense, x)
    assert len(calls) == 1
    assert str(select_mlps(ours)[0]).startswith("yes ")


@pytest.mark.parametrize("forward", LEFT, ids=lambda forward: forward.__name__)
def test_what_is_no_mlp(forward: Any):
    """It is left alone, with the reason, and its forward did nothing to it."""
    mlp = Mlp(forward)
    (decision,) = select_mlps(mlp)

    assert not decision.taken
    assert decision.reason.startswith(LEFT[forward])
    assert not mlp.calls.any()
    with pytest.raises(ArgumentError, match="Mlp has no MLP that can be computed by tiles"):
        memtile.tile_mlps(mlp)
    assert type(mlp) is Mlp


def test_what_the_module_is_when_it_is_called(calls: list[Any]):
    """Another activation, dropout, mode, an activation with parameters, hooks, more arguments."""
    dense = Mlp(gated).double()
    ours, x = memtile.tile_mlps(copy.deepcopy(dense)), batch()
    for mlp in (dense, ours):
        mlp.act = nn.Tanh()
    assert_same_step(ours, dense, x)
    for mlp in (dense, ours):
        mlp.dropout.p = 0.5
    ours(x)
    assert [each["dropout"] for each in calls] == [0.0, 0.5]
    for mlp in (dense, ours):
        mlp.eval()
    assert_same_step(ours, dense, x)
    assert len(calls) == 3

    def not_tiled() -> None:
        assert_same_step(ours, dense, x)
        assert len(calls) == 3

    hook = ours.gate.register_forward_hook(lambda *given: None)
    not_tiled()
    hook.remove()
    hook = nn.modules.module.register_module_forward_hook(lambda *given: None)
    not_tiled()
    hook.remove()
    for mlp in (dense, ours):
        mlp.act = nn.PReLU(dtype=torch.float64)
    not_tiled()
    for mlp in (dense, ours):
        mlp.act = nn.GELU()
    torch.testing.assert_close(torch.func.vmap(ours)(x), dense(x))
    for mlp in (dense, ours):
        mlp.own = by_value
    not_tiled()
    with pytest.raises(TypeError, match="positional argument"):
        ours(x, x)


def test_hooks_of_the_module_itself_are_called(calls: list[Any]):
    """As of any module; its result is what they see."""
    seen: list[Tensor] = []
    ours = memtile.tile_mlps(Mlp(gated).double())
    ours.register_forward_hook(lambda mlp, given, result: seen.append(result))
    y = ours(batch())

    assert seen[0] is y
    assert len(calls) == 1


def test_dropout_is_one_of_the_mlps(calls: list[Any]):
    """The mask of forward is that of backward."""
    mlp = Mlp(plain, False).double()
    mlp.dropout.p = 0.5
    memtile.tile_mlps(mlp)

    def run(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return mlp(x)

    assert torch.autograd.gradcheck(run, (batch(3),))
    assert calls[0]["dropout"] == 0.5


def test_sequences_and_compilers(calls: list[Any]):
    """`nn.Sequential` is an MLP too; `torch.compile(fullgraph=True)` takes its own forward."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(WIDTH, INNER), nn.SiLU(), nn.Linear(INNER, OUT)).double()
    ours = memtile.tile_mlps(copy.deepcopy(dense))
    assert_same_step(ours, dense, batch())
    assert len(calls) == 1
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(batch()), dense(batch()))
    assert len(calls) == 1


def test_autocast_and_16_bits(calls: list[Any]):
    """In bfloat16 results are as accurate as the module's own; under autocast they are bfloat16."""
    dense = Mlp(gated)
    x = batch(64).float().detach()
    ours = memtile.tile_mlps(copy.deepcopy(dense))
    with torch.autocast("cpu", torch.bfloat16):
        found, plain = ours(x), dense(x)
    assert found.dtype == plain.dtype == torch.bfloat16
    assert error_ratio(found, plain, copy.deepcopy(dense).double()(x.double())) <= 1.5
    ours, x = ours.bfloat16(), x.bfloat16()
    exact = copy.deepcopy(dense).bfloat16().double()(x.double())
    assert error_ratio(ours(x), dense.bfloat16()(x), exact) <= 1.5
    assert len(calls) == 2


def test_layers_that_are_cut_otherwise_are_left_alone(calls: list[Any]):
    """With the reason, and with the module's own forward."""
    dense = nn.ModuleDict({"mlp": Mlp(gated)}).double()
    ours = memtile.tile(copy.deepcopy(dense), out_splits=3)
    (decision,) = select_mlps(ours)
    assert not decision.taken
    assert decision.reason.endswith("down over columns only (in_splits)")
    right = memtile.tile(copy.deepcopy(dense), out_splits=3, tile_mlps=True)
    grids = sorted(str(layer.grid) for _, layer in tiled_layers(right))
    assert grids == ["1×3", "3×1", "3×1"]
    for splits, computed in ({"in_splits": 3}, 0), ({"out_splits": 3}, 1):
        memtile.tile(memtile.tile_mlps(memtile.untile(right)), **splits)  # after it
        x = batch()
        torch.testing.assert_close(right["mlp"](x), dense["mlp"](x))
        assert len(calls) == computed
    assert sorted(str(layer.grid) for _, layer in tiled_layers(right)) == grids


@pytest.mark.parametrize("size", [1, 7, 29 * 8, 10**6])
def test_the_largest_tile_of_an_mlp(size: int):
    """No tile is above the size; where a feature is, all are cut as without MLPs, and told so."""
    model = nn.ModuleDict({"mlp": Mlp(gated)}).double()
    plain = [d.grid for d in select_linears(model, max_tile_bytes=8 * size)]
    warns = pytest.warns(memtile.errors.TileSizeWarning, match="has no MLP that can be computed")
    with warns if size < WIDTH else nullcontext():
        memtile.tile(model, max_tile_bytes=8 * size, tile_mlps=True)

    grids = [layer.grid for _, layer in tiled_layers(model)]
    assert all(
        w.numel() <= size
        for _, e in tiled_layers(model)
        for w in e.tile_parameters("weight").values()
    )
    assert (grids == [grid for grid in plain if grid]) == (size < WIDTH or size == 10**6)


def test_the_intermediate_activation_does_not_exist(monkeypatch: pytest.MonkeyPatch):
    """A step takes less than one tensor of rows × intermediate, beyond gradients."""
    monkeypatch.undo()
    tokens, width, inner = 2048, 64, 2048
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))
    x = torch.randn(tokens, width, requires_grad=True)
    memtile.tile_mlps(mlp)

    def step() -> None:
        mlp(x).sum().backward()

    step()
    assert peak_allocated_bytes(step) < tokens * inner * 4 + 8 * mlp[0].weight.nbytes
