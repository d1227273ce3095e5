"""What torch does to a module, it does to a tiled one: compilers, transforms, hooks, copies."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from walks import GRIDS, grid_id, nothing, pair, walk_of, walking

from memtile import TiledLinear
from memtile.testing import assert_as_accurate

SIXTEEN = [torch.bfloat16, torch.float16]
ALL = [torch.float64, torch.float32, *SIXTEEN]


def gradients(layer: nn.Module) -> list[Tensor | None]:
    """The gradients of the dense weight and bias."""
    return [layer.weight.grad, layer.bias.grad]


def same(ours: Tensor | None, theirs: Tensor | None) -> None:
    """Equal to within the rounding of float64: any real difference is far larger."""
    assert ours is not None
    assert theirs is not None
    assert (ours - theirs).norm() <= 1e3 * torch.finfo(torch.float64).eps * theirs.norm()


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


def test_autocast_casts_the_input_once_and_weights_from_its_cache() -> None:
    """Plain tiles get an input that is cast already: one cast, not one for each row of tiles."""
    _, tiled = pair((4, 1))
    seen = []
    for _, tile in tiled.tiles():
        tile.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    x = torch.randn(3, 13)

    with torch.autocast("cpu", torch.bfloat16):
        tiled(x)

    assert seen == [torch.float32] * 4  # hooked tiles see what they were given
    assert tiled(x).dtype == torch.float32


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


@pytest.mark.parametrize("grid", GRIDS, ids=grid_id)
@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 1.1), (torch.bfloat16, 1.5)])
def test_compile_fullgraph(grid: tuple[int, int], dtype: torch.dtype, factor: float) -> None:
    """One graph without breaks, as accurate as the dense layer in output and gradients."""
    dense, tiled = pair(grid, (130, 129), dtype=dtype)
    truth = copy.deepcopy(dense).double()
    torch._dynamo.reset()
    compiled = torch.compile(tiled, fullgraph=True, backend="aot_eager")
    x, g = torch.randn(140, 130, dtype=dtype), torch.randn(140, 129, dtype=dtype)

    outputs = []
    for layer in (compiled, dense, truth):
        like = next(layer.parameters())
        outputs.append(layer(x.to(like.dtype)))
        outputs[-1].backward(g.to(like.dtype))

    assert_as_accurate(*outputs, factor)
    grads = tiled.weight.grad, dense.weight.grad, truth.weight.grad
    assert_as_accurate(*(grad for grad in grads if grad is not None), factor)


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict: bool) -> None:
    """torch.export traces the layer whole, and the program computes what the layer computes."""
    dense, tiled = pair((3, 2), dtype=torch.float64)
    x = torch.randn(5, 13, dtype=torch.float64)

    program = torch.export.export(tiled, (x,), strict=strict)

    same(program.module()(x), dense(x))


def weights_of(tiled: TiledLinear, count: int) -> dict[str, Tensor]:
    """`count` different sets of tile parameters, stacked."""
    return {
        name: torch.stack([parameter.detach() * (k + 1) for k in range(count)])
        for name, parameter in tiled.named_parameters()
    }


@pytest.mark.parametrize("grid", GRIDS, ids=grid_id)
@pytest.mark.parametrize("batched", ["inputs", "weights", "both"])
def test_vmap(grid: tuple[int, int], batched: str) -> None:
    """vmap over inputs, over weights, over both equals a loop."""
    _, tiled = pair(grid, dtype=torch.float64)
    x = torch.randn(3, 5, 13, dtype=torch.float64)
    stacked = weights_of(tiled, 3)

    def call(weights: dict[str, Tensor], one: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(tiled, weights, (one,))
        return out

    own = dict(tiled.named_parameters())
    dims: dict[str, tuple[Any, Any]] = {"inputs": (None, 0), "weights": (0, None), "both": (0, 0)}
    weights = own if batched == "inputs" else stacked
    given = x[0] if batched == "weights" else x

    out = torch.vmap(call, in_dims=dims[batched])(weights, given)

    for k in range(3):
        one = own if batched == "inputs" else {n: w[k] for n, w in stacked.items()}
        same(out[k], call(one, given if batched == "weights" else x[k]))


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_vmap_in_16_bits_sums_in_float32(dtype: torch.dtype) -> None:
    """The walk that transforms take keeps the accuracy of the others."""
    dense, tiled = pair((1, 16), (160, 129), dtype=dtype)
    x = torch.randn(4, 40, 160, dtype=dtype)
    truth = copy.deepcopy(dense).double()(x.double())

    assert_as_accurate(torch.vmap(tiled)(x), dense(x), truth, 1.5)


def test_functional_call_uses_the_tensors_it_is_given() -> None:
    """Swapped parameters compute, and their gradients reach the given tensors."""
    dense, tiled = pair((3, 2), dtype=torch.float64)
    given = {n: (2 * p).detach().requires_grad_() for n, p in tiled.named_parameters()}
    x = torch.randn(5, 13, dtype=torch.float64)

    y = torch.func.functional_call(tiled, given, (x,))
    y.sum().backward()

    same(y, 2 * dense(x))
    assert all(tensor.grad is not None for tensor in given.values())
    assert all(parameter.grad is None for parameter in tiled.parameters())


# torch's own forward-mode AD scripts a decomposition the first time it is used.
uses_forward_mode = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


@uses_forward_mode
def test_func_grad_and_jacobians() -> None:
    """torch.func.grad, jacrev and jacfwd agree with the dense layer."""
    dense, tiled = pair((3, 2), dtype=torch.float64)
    x = torch.randn(5, 13, dtype=torch.float64)

    def loss(layer: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: layer(x).square().sum()

    same(torch.func.grad(loss(tiled))(x), torch.func.grad(loss(dense))(x))
    same(torch.func.jacrev(tiled)(x), torch.func.jacrev(dense)(x))
    same(torch.func.jacfwd(tiled)(x), torch.func.jacfwd(dense)(x))
    same(torch.func.hessian(loss(tiled))(x[0]), torch.func.hessian(loss(dense))(x[0]))


@uses_forward_mode
@pytest.mark.parametrize("grid", GRIDS, ids=grid_id)
def test_forward_mode(grid: tuple[int, int]) -> None:
    """torch.func.jvp and dual tensors give the dense tangent, in input and in weights."""
    dense, tiled = pair(grid, dtype=torch.float64)
    x, t = torch.randn(2, 5, 13, dtype=torch.float64)

    _, tangent = torch.func.jvp(tiled, (x,), (t,))
    own = dict(tiled.named_parameters())
    _, by_weight = torch.func.jvp(
        lambda w: torch.func.functional_call(tiled, w, (x,)), (own,), (own,)
    )
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, t)
        unpacked = torch.autograd.forward_ad.unpack_dual(tiled(dual)).tangent

    same(tangent, t @ dense.weight.t())
    same(unpacked, t @ dense.weight.t())
    same(by_weight, dense(x))


@pytest.mark.parametrize("grid", GRIDS, ids=grid_id)
@pytest.mark.parametrize("walk", ["fused", "composed", "points"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(grid: tuple[int, int], walk: str, reentrant: bool) -> None:
    """Both kinds of checkpoint recompute the layer and give its gradients."""
    dense, tiled = pair(grid, dtype=torch.float64)
    walking(walk, tiled)
    x = torch.randn(5, 13, dtype=torch.float64, requires_grad=True)

    checkpoint(tiled, x, use_reentrant=reentrant).square().sum().backward()
    ours, x.grad = x.grad, None
    dense(x).square().sum().backward()

    same(ours, x.grad)
    for a, b in zip(gradients(tiled), gradients(dense), strict=True):
        same(a, b)


@pytest.mark.parametrize("walk", ["fused", "composed", "points"])
def test_copies_are_independent_and_equal(walk: str) -> None:
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
    expected = walking(walk, tiled)(x)

    for copied in copies:
        assert torch.equal(walking(walk, copied)(x), expected)
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

    assert walk_of(y) == "composed"
    expected = {"layer", *(f"tile{i}" for i, _ in tiled.tiles())}
    assert sorted(calls) == sorted(f"{way} {n}" for way in ("forward", "back") for n in expected)


def test_global_hooks_see_every_tile() -> None:
    """A global forward hook is called for each tile: the fused walk steps aside."""
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

    same(y[:, :6], dense(x)[:, :6])
    same(y[:, 6:], 2 * dense(x)[:, 6:])


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

    same(y, nn.functional.linear(x, expected, dense.bias))
    same(tiled.weight.detach(), expected)
    assert tiled.tile(0, 1).parametrizations.weight.original.grad is not None


def test_weight_norm_on_a_tile() -> None:
    """torch's weight_norm of one tile changes no value and trains."""
    dense, tiled = pair((2, 2), dtype=torch.float64)
    nn.utils.parametrizations.weight_norm(tiled.tile(0, 0))
    x = torch.randn(5, 13, dtype=torch.float64)

    same(tiled(x), dense(x))


@pytest.mark.parametrize("walk", ["fused", "composed", "points"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(walk: str, context: Callable[[], Any]) -> None:
    """no_grad and inference_mode give the same output without a graph."""
    dense, tiled = pair((3, 2), dtype=torch.float64)
    walking(walk, tiled)
    x = torch.randn(5, 13, dtype=torch.float64)

    with context():
        y = tiled(x)

    assert not y.requires_grad
    same(y.clone(), dense(x))


@pytest.mark.parametrize("walk", ["fused", "composed", "points"])
def test_post_accumulate_hooks_fire_once_per_backward(walk: str) -> None:
    """Every tile's parameters see their gradient once: an optimizer in backward steps once."""
    _, tiled = pair((3, 2))
    walking(walk, tiled)
    fired: list[str] = []
    for name, parameter in tiled.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: fired.append(name))

    tiled(torch.randn(5, 13)).sum().backward()

    assert sorted(fired) == sorted(name for name, _ in tiled.named_parameters())


@pytest.mark.parametrize("walk", ["fused", "composed", "points"])
@pytest.mark.parametrize("input_needs", [True, False])
def test_frozen_tiles_and_inputs(walk: str, input_needs: bool) -> None:
    """Frozen tiles get no gradient, the others theirs, with and without an input gradient."""
    dense, tiled = pair((3, 2), dtype=torch.float64)
    walking(walk, tiled)
    tiled.tile(1, 0).weight.requires_grad_(False)
    tiled.tile(2, 1).bias.requires_grad_(False)
    x = torch.randn(5, 13, dtype=torch.float64, requires_grad=input_needs)

    tiled(x).square().sum().backward()
    ours, x.grad = x.grad, None
    dense(x).square().sum().backward()

    assert tiled.tile(1, 0).weight.grad is None
    assert tiled.tile(2, 1).bias.grad is None
    for (row, column), tile in tiled.tiles():
        if tile.weight.requires_grad:
            same(tile.weight.grad, dense.weight.grad[tiled.grid.rect(row, column).index])
    assert (ours is None) == (not input_needs)
    if input_needs:
        same(ours, x.grad)


@pytest.mark.parametrize("frozen", ["weights", "input"])
def test_what_is_frozen_is_not_kept_for_backward(frozen: str) -> None:
    """With frozen weights the input is not saved, with a frozen input the weights are not."""
    _, tiled = pair((3, 2))
    x = torch.randn(5, 13, requires_grad=frozen == "weights")
    tiled.requires_grad_(frozen == "input")
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        tiled(x)

    kept = {tensor.untyped_storage().data_ptr() for tensor in saved}
    weights = {tile.weight.untyped_storage().data_ptr() for _, tile in tiled.tiles()}
    assert kept == (weights if frozen == "weights" else {x.untyped_storage().data_ptr()})


@pytest.mark.parametrize("walk", ["fused", "composed", "points"])
@pytest.mark.parametrize("grid", [(3, 2), (4, 1), (1, 3)], ids=grid_id)
def test_an_input_changed_after_forward_is_detected(walk: str, grid: tuple[int, int]) -> None:
    """A wrong gradient is never given silently."""
    _, tiled = pair(grid)
    walking(walk, tiled)
    x = torch.randn(5, 13)
    y = tiled(x)
    x.add_(1)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("walk", ["fused", "composed", "points"])
def test_a_weight_changed_after_forward_is_detected(walk: str) -> None:
    """The versions of the weights are kept as nn.Linear keeps them."""
    _, tiled = pair((3, 2))
    walking(walk, tiled)
    y = tiled(torch.randn(5, 13, requires_grad=True))
    with torch.no_grad():
        tiled.tile(1, 1).weight.add_(1)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("walk", ["fused", "composed", "points"])
@pytest.mark.parametrize("shape", [(13,), (5, 13), (0, 13), (2, 0, 13), (2, 3, 13), (2, 3, 4, 13)])
def test_inputs_of_any_rank(walk: str, shape: tuple[int, ...]) -> None:
    """1-D to 4-D inputs and empty batches, forward and backward."""
    dense, tiled = pair((3, 2), dtype=torch.float64)
    walking(walk, tiled)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    y = tiled(x)
    y.sum().backward()
    ours, x.grad = x.grad, None
    dense(x).sum().backward()

    assert y.shape == (*shape[:-1], 11)
    same(y, dense(x))
    same(ours, x.grad)
    same(tiled.weight.grad, dense.weight.grad)


@pytest.mark.parametrize("walk", ["fused", "composed", "points"])
def test_inputs_and_gradients_that_are_not_contiguous(walk: str) -> None:
    """Transposed, strided and expanded tensors compute as their contiguous copies."""
    dense, tiled = pair((3, 2), dtype=torch.float64)
    walking(walk, tiled)
    base = torch.randn(26, 6, 5, dtype=torch.float64)

    for x in (
        base[::2].permute(1, 2, 0),
        base[:13].permute(2, 1, 0),
        base[:13, 0, :1].t().expand(4, 13),
    ):
        leaf = x.detach().requires_grad_()
        y = tiled(leaf)
        y.backward(torch.ones(11, dtype=torch.float64).expand_as(y))
        ours, leaf.grad = leaf.grad, None
        expected = dense(leaf)
        expected.sum().backward()

        same(y, expected)
        same(ours, leaf.grad)


@pytest.mark.parametrize("walk", ["fused", "composed", "points"])
@pytest.mark.parametrize("columns", [1, 2])
def test_one_row_of_an_uncombined_output_may_be_used(walk: str, columns: int) -> None:
    """Rows that the loss does not reach get no gradient or zeros; the used one gets its own."""
    dense, tiled = pair((3, columns), dtype=torch.float64, combine_out_splits=False)
    walking(walk, tiled)
    x = torch.randn(5, 13, dtype=torch.float64, requires_grad=True)

    rows = tiled(x)
    rows[1].square().sum().backward()
    ours, x.grad = x.grad, None
    dense(x)[:, 4:8].square().sum().backward()

    assert [tuple(row.shape) for row in rows] == [(5, 4), (5, 4), (5, 3)]
    same(ours, x.grad)
    unused = tiled.tile(0, 0).weight.grad
    assert unused is None or unused.eq(0).all()


@pytest.mark.parametrize("walk", ["fused", "composed"])
def test_rows_of_an_uncombined_output_may_be_changed_in_place(walk: str) -> None:
    """They are tensors of their own, not views of one another."""
    _, tiled = pair((3, 2), combine_out_splits=False)
    rows = walking(walk, tiled)(torch.randn(5, 13))
    before = rows[1].detach().clone()

    rows[0].mul_(2)
    rows[0].sum().backward()

    assert torch.equal(rows[1], before)


def test_compiling_one_tile_is_honoured() -> None:
    """tile.compile() changes how the tile is called, so the composed walk calls it."""
    dense, tiled = pair((2, 1), dtype=torch.float64)
    tiled.tile(0, 0).compile(backend="eager")
    x = torch.randn(5, 13, dtype=torch.float64)

    y = tiled(x)

    assert walk_of(y) == "composed"
    same(y, dense(x))


def test_a_forward_replaced_on_a_tile_is_honoured() -> None:
    """An overridden method makes a tile more than plain."""
    dense, tiled = pair((2, 1), dtype=torch.float64)
    tile = tiled.tile(0, 0)
    tile.forward = lambda x: torch.zeros(*x.shape[:-1], 6, dtype=x.dtype)  # type: ignore[method-assign]
    x = torch.randn(5, 13, dtype=torch.float64)

    y = tiled(x)

    assert y[:, :6].eq(0).all()
    same(y[:, 6:], dense(x)[:, 6:])


def test_create_graph_through_the_fused_walk() -> None:
    """A gradient penalty trains: the gradient's gradient is the dense one."""
    dense, tiled = pair((3, 2), dtype=torch.float64)
    x = torch.randn(5, 13, dtype=torch.float64, requires_grad=True)
    for layer in (tiled, dense):
        (gx,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
        gx.square().sum().backward(inputs=list(layer.parameters()))

    for a, b in zip(gradients(tiled), gradients(dense), strict=True):
        same(a, b)


@pytest.mark.parametrize("walk", ["fused", "composed"])
def test_backward_of_some_inputs_only(walk: str) -> None:
    """backward(inputs=…) and autograd.grad reach what they name and leave the rest alone."""
    dense, tiled = pair((3, 2), dtype=torch.float64)
    walking(walk, tiled)
    x = torch.randn(5, 13, dtype=torch.float64, requires_grad=True)
    one = tiled.tile(1, 1).weight

    tiled(x).sum().backward(inputs=[one])
    (by_grad,) = torch.autograd.grad(tiled(x).sum(), [one])
    dense(x).sum().backward()

    assert [n for n, p in tiled.named_parameters() if p.grad is not None] == ["linears.1.1.weight"]
    same(one.grad, by_grad)
    same(one.grad, dense.weight.grad[tiled.grid.rect(1, 1).index])


def test_gradients_accumulate_over_calls() -> None:
    """Two backward passes add up, and a layer used twice in one graph adds both uses."""
    dense, tiled = pair((3, 2), dtype=torch.float64)
    x = torch.randn(2, 5, 13, dtype=torch.float64)
    for layer in (tiled, dense):
        (layer(x[0]) * layer(x[1])).sum().backward()
        layer(x[0]).sum().backward()

    same(tiled.weight.grad, dense.weight.grad)


def test_tiles_of_different_dtypes_are_left_to_the_tiles() -> None:
    """A layer with one float64 tile is not plain: torch itself says that dtypes differ."""
    _, tiled = pair((2, 1))
    tiled.tile(1, 0).double()

    with pytest.raises(RuntimeError, match="dtype"):
        tiled(torch.randn(5, 13))


def test_nothing_is_a_hook() -> None:
    """The hook that forces the composed walk changes no bit in float64 beyond rounding."""
    dense, tiled = pair((3, 2), dtype=torch.float64)
    tiled.tile(0, 0).register_forward_hook(nothing)
    x = torch.randn(5, 13, dtype=torch.float64)

    same(tiled(x), dense(x))
