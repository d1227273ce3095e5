"""Autograd through every path: what is kept, frozen, changed, used in part, derived twice."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from paths import GRIDS, PATHS, assert_same, grid_id, on_path, pair
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def gradients(layer: nn.Module) -> list[Tensor | None]:
    """The gradients of the dense weight and bias."""
    return [layer.weight.grad, layer.bias.grad]


@pytest.mark.parametrize("grid", GRIDS, ids=grid_id)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(grid: tuple[int, int], path: str, reentrant: bool) -> None:
    """Both kinds of checkpoint recompute the layer and give its gradients."""
    dense, tiled = pair(grid, dtype=torch.float64)
    on_path(path, tiled)
    x = torch.randn(5, 13, dtype=torch.float64, requires_grad=True)

    checkpoint(tiled, x, use_reentrant=reentrant).square().sum().backward()
    ours, x.grad = x.grad, None
    dense(x).square().sum().backward()

    assert_same(ours, x.grad)
    for a, b in zip(gradients(tiled), gradients(dense), strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(path: str, context: Callable[[], Any]) -> None:
    """no_grad and inference_mode give the same output without a graph."""
    dense, tiled = pair((3, 2), dtype=torch.float64)
    on_path(path, tiled)
    x = torch.randn(5, 13, dtype=torch.float64)

    with context():
        y = tiled(x)

    assert not y.requires_grad
    assert_same(y.clone(), dense(x))


@pytest.mark.parametrize("path", PATHS)
def test_post_accumulate_hooks_fire_once_per_backward(path: str) -> None:
    """Every tile's parameters see their gradient once: an optimizer in backward steps once."""
    _, tiled = pair((3, 2))
    on_path(path, tiled)
    fired: list[str] = []
    for name, parameter in tiled.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: fired.append(name))

    tiled(torch.randn(5, 13)).sum().backward()

    assert sorted(fired) == sorted(name for name, _ in tiled.named_parameters())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("input_needs", [True, False])
def test_frozen_tiles_and_inputs(path: str, input_needs: bool) -> None:
    """Frozen tiles get no gradient, the others theirs, with and without an input gradient."""
    dense, tiled = pair((3, 2), dtype=torch.float64)
    on_path(path, tiled)
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
            assert_same(tile.weight.grad, dense.weight.grad[tiled.grid.rect(row, column).index])
    assert (ours is None) == (not input_needs)
    if input_needs:
        assert_same(ours, x.grad)


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


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("grid", [(3, 2), (4, 1), (1, 3)], ids=grid_id)
def test_an_input_changed_after_forward_is_detected(path: str, grid: tuple[int, int]) -> None:
    """A wrong gradient is never given silently."""
    _, tiled = pair(grid)
    on_path(path, tiled)
    x = torch.randn(5, 13)
    y = tiled(x)
    x.add_(1)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("path", PATHS)
def test_a_weight_changed_after_forward_is_detected(path: str) -> None:
    """The versions of the weights are kept as nn.Linear keeps them."""
    _, tiled = pair((3, 2))
    on_path(path, tiled)
    y = tiled(torch.randn(5, 13, requires_grad=True))
    with torch.no_grad():
        tiled.tile(1, 1).weight.add_(1)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [(13,), (5, 13), (0, 13), (2, 0, 13), (2, 3, 13), (2, 3, 4, 13)])
def test_inputs_of_any_rank(path: str, shape: tuple[int, ...]) -> None:
    """1-D to 4-D inputs and empty batches, forward and backward."""
    dense, tiled = pair((3, 2), dtype=torch.float64)
    on_path(path, tiled)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    y = tiled(x)
    y.sum().backward()
    ours, x.grad = x.grad, None
    dense(x).sum().backward()

    assert y.shape == (*shape[:-1], 11)
    assert_same(y, dense(x))
    assert_same(ours, x.grad)
    assert_same(tiled.weight.grad, dense.weight.grad)


@pytest.mark.parametrize("path", PATHS)
def test_inputs_and_gradients_that_are_not_contiguous(path: str) -> None:
    """Transposed, strided and expanded tensors compute as their contiguous copies."""
    dense, tiled = pair((3, 2), dtype=torch.float64)
    on_path(path, tiled)
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

        assert_same(y, expected)
        assert_same(ours, leaf.grad)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("columns", [1, 2])
def test_one_row_of_an_uncombined_output_may_be_used(path: str, columns: int) -> None:
    """Rows that the loss does not reach get no gradient or zeros; the used one gets its own."""
    dense, tiled = pair((3, columns), dtype=torch.float64, combine_out_splits=False)
    on_path(path, tiled)
    x = torch.randn(5, 13, dtype=torch.float64, requires_grad=True)

    rows = tiled(x)
    rows[1].square().sum().backward()
    ours, x.grad = x.grad, None
    dense(x)[:, 4:8].square().sum().backward()

    assert [tuple(row.shape) for row in rows] == [(5, 4), (5, 4), (5, 3)]
    assert_same(ours, x.grad)
    unused = tiled.tile(0, 0).weight.grad
    assert unused is None or unused.eq(0).all()


@pytest.mark.parametrize("path", ["fused", "composed"])
def test_rows_of_an_uncombined_output_may_be_changed_in_place(path: str) -> None:
    """They are tensors of their own, not views of one another."""
    _, tiled = pair((3, 2), combine_out_splits=False)
    rows = on_path(path, tiled)(torch.randn(5, 13))
    before = rows[1].detach().clone()

    rows[0].mul_(2)
    rows[0].sum().backward()

    assert torch.equal(rows[1], before)


def test_create_graph_through_the_fused_path() -> None:
    """A gradient penalty trains: the gradient's gradient is the dense one."""
    dense, tiled = pair((3, 2), dtype=torch.float64)
    x = torch.randn(5, 13, dtype=torch.float64, requires_grad=True)
    for layer in (tiled, dense):
        (gx,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
        gx.square().sum().backward(inputs=list(layer.parameters()))

    for a, b in zip(gradients(tiled), gradients(dense), strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("path", ["fused", "composed"])
def test_backward_of_some_inputs_only(path: str) -> None:
    """backward(inputs=…) and autograd.grad reach what they name and leave the rest alone."""
    dense, tiled = pair((3, 2), dtype=torch.float64)
    on_path(path, tiled)
    x = torch.randn(5, 13, dtype=torch.float64, requires_grad=True)
    one = tiled.tile(1, 1).weight

    tiled(x).sum().backward(inputs=[one])
    (by_grad,) = torch.autograd.grad(tiled(x).sum(), [one])
    dense(x).sum().backward()

    assert [n for n, p in tiled.named_parameters() if p.grad is not None] == ["linears.1.1.weight"]
    assert_same(one.grad, by_grad)
    assert_same(one.grad, dense.weight.grad[tiled.grid.rect(1, 1).index])


def test_gradients_accumulate_over_calls() -> None:
    """Two backward passes add up, and a layer used twice in one graph adds both uses."""
    dense, tiled = pair((3, 2), dtype=torch.float64)
    x = torch.randn(2, 5, 13, dtype=torch.float64)
    for layer in (tiled, dense):
        (layer(x[0]) * layer(x[1])).sum().backward()
        layer(x[0]).sum().backward()

    assert_same(tiled.weight.grad, dense.weight.grad)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("grid", GRIDS, ids=grid_id)
def test_first_and_second_derivatives_of_a_layer_are_exact(grid, path):
    """gradcheck and gradgradcheck with respect to the input and every tile's parameters."""
    _, tiled = pair(grid, (5, 4), dtype=torch.float64)
    on_path(path, tiled)
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    leaves = (x, *tiled.parameters())  # changed in place, so the layer need not be given them

    assert torch.autograd.gradcheck(lambda x, *_: tiled(x), leaves)
    assert torch.autograd.gradgradcheck(lambda x, *_: tiled(x), leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_an_input_that_backward_does_not_need_may_be_changed(path, dtype):
    """With frozen weights the input is free to be written to, as with the dense layer."""
    _, tiled = pair((3, 2), dtype=dtype)
    on_path(path, tiled)
    leaf = torch.randn(5, 13, dtype=dtype, requires_grad=True)
    gradient = torch.randn(5, 11, dtype=dtype)
    changed, kept = leaf * 1, leaf * 1
    tiled.requires_grad_(False)

    output = tiled(changed)
    changed.mul_(0)
    (ours,) = torch.autograd.grad(output, leaf, gradient)
    (without_change,) = torch.autograd.grad(tiled(kept), leaf, gradient)

    assert torch.equal(ours, without_change)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("grid", GRIDS, ids=grid_id)
def test_an_output_may_be_changed_in_place(grid, path):
    """`relu_` and `mul_` on the output have the gradients of the dense layer."""
    dense, tiled = pair(grid, dtype=torch.float64)
    on_path(path, tiled)
    x = torch.randn(5, 13, dtype=torch.float64, requires_grad=True)

    (ours,) = torch.autograd.grad(tiled(x).mul_(3).relu_().sum(), x)
    (theirs,) = torch.autograd.grad(dense(x).mul_(3).relu_().sum(), x)

    assert_same(ours, theirs)


class Tagged(Tensor):
    """A tensor subclass, as libraries use to carry more than values."""


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("combine", [True, False])
def test_a_tensor_subclass_keeps_its_class_and_its_gradients(path, combine):
    """A subclass of Tensor is computed with by its own rules: class and gradients come out."""
    dense, tiled = pair((3, 2), dtype=torch.float64, combine_out_splits=combine)
    on_path(path, tiled)
    plain = torch.randn(5, 13, dtype=torch.float64)
    x = plain.clone().as_subclass(Tagged).requires_grad_()

    output = tiled(x) if combine else torch.cat(tiled(x), dim=-1)
    output.square().sum().backward()
    dense(plain).square().sum().backward()

    assert type(output) is Tagged
    assert_same(tiled.weight.grad, dense.weight.grad)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("grid", [(3, 2), (1, 3)], ids=grid_id)
def test_complex_gradients_have_their_conjugates(path, grid):
    """A complex layer is differentiated as the dense one, whichever path is asked for."""
    dense, tiled = pair(grid, dtype=torch.complex128)
    on_path(path, tiled)
    x = torch.randn(5, 13, dtype=torch.complex128, requires_grad=True)
    factor = torch.randn(5, 11, dtype=torch.complex128)

    (tiled(x) * factor).abs().sum().backward()
    ours, x.grad = x.grad, None
    (dense(x) * factor).abs().sum().backward()

    assert_same(ours, x.grad)
    assert_same(tiled.weight.grad, dense.weight.grad)


@pytest.mark.parametrize("path", PATHS)
def test_batched_gradients(path):
    """A vectorized Jacobian runs a batch of gradients through one backward."""
    dense, tiled = pair((3, 2), dtype=torch.float64)
    on_path(path, tiled)
    x = torch.randn(13, dtype=torch.float64)

    jacobian = torch.autograd.functional.jacobian(tiled, x, vectorize=True)

    assert_same(jacobian, dense.weight)


@pytest.mark.parametrize("create_graph", [True, False])
def test_a_gradient_that_never_arrives_stops_quietly(create_graph):
    """Where a later node gives no gradient, the layer has none to give, at any order."""
    _, tiled = pair((3, 2))

    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            return None

    x = torch.randn(5, 13, requires_grad=True)

    (gradient,) = torch.autograd.grad(
        Stop.apply(tiled(x)).sum() + x.sum(), x, create_graph=create_graph
    )

    assert torch.equal(gradient, torch.ones_like(x))


def test_a_bias_in_another_column_is_added_in_every_path():
    """A tile that someone put there with a bias of its own is called, not overlooked."""
    _, tiled = pair((1, 2), dtype=torch.float64)
    tiled.linears[0][0] = nn.Linear(7, 11, dtype=torch.float64)
    x = torch.randn(5, 13, dtype=torch.float64)

    expected = tiled.linears[0][0](x[:, :7]) + tiled.linears[0][1](x[:, 7:])

    assert_same(tiled(x), expected)
