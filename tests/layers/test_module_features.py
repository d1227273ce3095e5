"""What torch does to modules, it does to a tiled one: autocast, copies, hooks, parametrizations."""

import copy
import io
import pickle

import pytest
import torch
from paths import GRIDS, PATHS, assert_same, grid_id, nothing, on_path, pair, path_of
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

from memtile import TiledLinear
from memtile.errors import TileDtypeError
from memtile.testing import assert_as_accurate

SIXTEEN = [torch.bfloat16, torch.float16]
ALL = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("grid", GRIDS, ids=grid_id)
@pytest.mark.parametrize("dtype", SIXTEEN)
def test_autocast_computes_in_16_bits_as_the_dense_layer(
    grid: tuple[int, int], dtype: torch.dtype
) -> None:
    """float32 weights: 16-bit output, float32 gradients, the dense accuracy × 1.5."""
    dense, tiled = pair(grid, (130, 129))
    x = torch.randn(140, 130, requires_grad=True)
    g = torch.randn(140, 129, dtype=dtype)
    results = []
    for layer in (dense, tiled):
        x.grad = None
        with torch.autocast("cpu", dtype):
            y = layer(x)
        y.backward(g)
        results.append((y, x.grad, layer.weight.grad))
    truth = copy.deepcopy(dense).double()
    truth.zero_grad()
    x64 = x.detach().double().requires_grad_()
    y64 = truth(x64)
    y64.backward(g.double())

    assert results[1][0].dtype == dtype
    assert results[1][1].dtype == results[1][2].dtype == torch.float32
    exact = (y64, x64.grad, truth.weight.grad)
    for ours, theirs, value in zip(results[1], results[0], exact, strict=True):
        assert value is not None
        assert_as_accurate(ours, theirs, value, 1.5)


class CastsOf(TorchDispatchMode):
    """Counts the casts of tensors of one shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and tuple(args[0].shape) == self.shape:
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("grid", GRIDS, ids=grid_id)
def test_autocast_casts_the_input_of_plain_tiles_once(grid):
    """One cast as in the dense layer, not one for each row of tiles."""
    _, tiled = pair(grid)
    x = torch.randn(9, 13)

    with CastsOf((9, 13)) as casts, torch.autocast("cpu", torch.bfloat16):
        tiled(x)

    assert casts.count == 1


@pytest.mark.parametrize(
    ("weights", "x"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
        (torch.float64, torch.float64),
    ],
)
def test_autocast_gives_the_dtype_that_the_dense_layer_gives(weights, x):
    """Mixed 16- and 32-bit operands are cast; float64 is left alone, as torch does."""
    dense, tiled = pair((3, 2), dtype=weights)
    given = torch.randn(4, 13).to(x)

    with torch.autocast("cpu", torch.bfloat16):
        assert tiled(given).dtype == dense(given).dtype


@pytest.mark.parametrize(
    ("weights", "x"), [(torch.float64, torch.float32), (torch.float32, torch.float64)]
)
def test_autocast_does_not_hide_a_dtype_that_it_leaves_alone(weights, x):
    """float64 beside float32 raises TileDtypeError, under autocast too."""
    _, tiled = pair((3, 2), dtype=weights)

    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(TileDtypeError, match=f"the input is {x}, the tiles are {weights}"),
    ):
        tiled(torch.randn(4, 13).to(x))


def test_grad_scaler_unscales_and_steps() -> None:
    """GradScaler with autocast finds finite gradients, steps, and skips a step with an infinity."""
    _, tiled = pair((3, 2))
    optimizer = torch.optim.SGD(tiled.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = tiled.to_linear().weight.detach().clone()

    with torch.autocast("cpu", torch.bfloat16):
        loss = tiled(torch.randn(5, 13)).float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    stepped = tiled.to_linear().weight.detach().clone()
    optimizer.zero_grad()
    scaler.scale(tiled(torch.full((1, 13), torch.inf)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()

    assert not torch.equal(stepped, before)
    assert torch.equal(tiled.to_linear().weight, stepped)
    assert scaler.get_scale() == 512.0


@pytest.mark.parametrize("path", PATHS)
def test_copies_are_independent_and_equal(path: str) -> None:
    """deepcopy, pickle and torch.save give a layer of its own with the same bits."""
    _, tiled = pair((3, 2))
    tiled.tile(0, 0).weight.requires_grad_(False)
    buffer = io.BytesIO()
    torch.save(tiled, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(tiled),
        pickle.loads(pickle.dumps(tiled)),
        torch.load(buffer, weights_only=False),
    ]
    x = torch.randn(5, 13)
    expected = on_path(path, tiled)(x)

    for copied in copies:
        assert torch.equal(on_path(path, copied)(x), expected)
        assert repr(copied) == repr(tiled)
        assert not copied.tile(0, 0).weight.requires_grad
        with torch.no_grad():
            copied.tile(0, 0).weight.zero_()
    assert torch.equal(tiled(x), expected)


def test_the_meta_device_and_back() -> None:
    """Shapes without memory; to_empty and reset_parameters make a real layer of it."""
    tiled = TiledLinear(13, 11, in_splits=2, out_splits=3, device="meta")

    assert tiled(torch.randn(5, 13, device="meta")).shape == (5, 11)
    assert tiled.weight.is_meta
    tiled.to_empty(device="cpu")
    tiled.reset_parameters()

    bound = 13**-0.5
    assert tiled.weight.abs().max() <= bound
    assert tiled(torch.randn(5, 13)).isfinite().all()


@pytest.mark.parametrize("dtype", ALL)
def test_to_changes_every_tile(dtype: torch.dtype) -> None:
    """Module.to converts all tiles, and the layer works in the new dtype."""
    _, tiled = pair((3, 2))

    tiled.to(dtype)

    assert tiled.weight.dtype == dtype
    assert tiled(torch.randn(5, 13, dtype=dtype)).dtype == dtype


def test_layer_hooks_and_tile_hooks_run() -> None:
    """Forward and full backward hooks run on the layer and on each tile, once per call."""
    _, tiled = pair((3, 2))
    calls: list[str] = []
    for name, module in [("layer", tiled), *((f"tile{i}", t) for i, t in tiled.tiles())]:
        module.register_forward_hook(lambda *_, name=name: calls.append(f"forward {name}"))
        module.register_full_backward_hook(lambda *_, name=name: calls.append(f"back {name}"))

    y = tiled(torch.randn(5, 13, requires_grad=True))
    y.sum().backward()

    assert path_of(y) == "composed"
    expected = {"layer", *(f"tile{i}" for i, _ in tiled.tiles())}
    assert sorted(calls) == sorted(f"{way} {n}" for way in ("forward", "back") for n in expected)


def test_global_hooks_see_every_tile() -> None:
    """A global forward hook is called for each tile: the fused path is not taken."""
    _, tiled = pair((3, 2))
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))

    try:
        tiled(torch.randn(5, 13))
    finally:
        handle.remove()

    assert [m for m in seen if isinstance(m, nn.Linear)] == [tile for _, tile in tiled.tiles()]


def test_a_hook_may_change_a_tiles_result() -> None:
    """What a hook returns is what is written into the output."""
    dense, tiled = pair((2, 1), dtype=torch.float64)
    tiled.tile(1, 0).register_forward_hook(lambda _, __, out: 2 * out)
    x = torch.randn(5, 13, dtype=torch.float64)

    y = tiled(x)

    assert_same(y[:, :6], dense(x)[:, :6])
    assert_same(y[:, 6:], 2 * dense(x)[:, 6:])


def test_parametrizations_of_a_tile_are_honoured() -> None:
    """A parametrized tile computes with its computed weight, and its originals get gradients."""
    dense, tiled = pair((2, 2), dtype=torch.float64)

    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    nn.utils.parametrize.register_parametrization(tiled.tile(0, 1), "weight", Double())
    expected = dense.weight.detach().clone()
    expected[:6, 7:] *= 2
    x = torch.randn(5, 13, dtype=torch.float64)

    y = tiled(x)
    y.sum().backward()

    assert_same(y, nn.functional.linear(x, expected, dense.bias))
    assert_same(tiled.weight.detach(), expected)
    assert tiled.tile(0, 1).parametrizations.weight.original.grad is not None


def test_weight_norm_on_a_tile() -> None:
    """torch's weight_norm of one tile changes no value and trains."""
    dense, tiled = pair((2, 2), dtype=torch.float64)
    nn.utils.parametrizations.weight_norm(tiled.tile(0, 0))
    x = torch.randn(5, 13, dtype=torch.float64)

    assert_same(tiled(x), dense(x))


def test_a_forward_replaced_on_a_tile_is_honoured() -> None:
    """An overridden method makes a tile more than plain."""
    dense, tiled = pair((2, 1), dtype=torch.float64)
    tile = tiled.tile(0, 0)
    tile.forward = lambda x: torch.zeros(*x.shape[:-1], 6, dtype=x.dtype)  # type: ignore[method-assign]
    x = torch.randn(5, 13, dtype=torch.float64)

    y = tiled(x)

    assert y[:, :6].eq(0).all()
    assert_same(y[:, 6:], dense(x)[:, 6:])


def test_tiles_of_different_dtypes_are_left_to_the_tiles() -> None:
    """A layer with one float64 tile is not plain: torch itself says that dtypes differ."""
    _, tiled = pair((2, 1))
    tiled.tile(1, 0).double()

    with pytest.raises(RuntimeError, match="dtype"):
        tiled(torch.randn(5, 13))


def test_nothing_is_a_hook() -> None:
    """The hook that forces the composed path changes no bit in float64 beyond rounding."""
    dense, tiled = pair((3, 2), dtype=torch.float64)
    tiled.tile(0, 0).register_forward_hook(nothing)
    x = torch.randn(5, 13, dtype=torch.float64)

    assert_same(tiled(x), dense(x))


def test_pruning_a_tile_is_honoured() -> None:
    """torch's pruning replaces a tile's weight by a masked one: the layer computes with it."""
    _, tiled = pair((3, 2), dtype=torch.float64)
    prune.l1_unstructured(tiled.tile(1, 1), "weight", amount=0.5)
    x = torch.randn(5, 13, dtype=torch.float64)

    y = tiled(x)
    y.sum().backward()

    assert (tiled.tile(1, 1).weight == 0).sum() == 12
    assert_same(y, nn.functional.linear(x, tiled.weight, tiled.bias))
    assert (tiled.tile(1, 1).weight_orig.grad == 0).sum() >= 12


def test_a_layer_works_where_torch_swaps_parameters() -> None:
    """`set_swap_module_params_on_conversion`: conversion and every form of loading still work."""
    dense, tiled = pair((3, 2))
    _, other = pair((2, 3), seed=1)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        other.load_state_dict(dense.state_dict())
        tiled.load_state_dict(other.state_dict())
        tiled.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)

    assert torch.equal(tiled.weight, dense.weight.double())
