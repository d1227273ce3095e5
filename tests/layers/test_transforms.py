"""Compilers and transforms: compile, export, vmap, functional_call, func, forward mode."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from paths import GRIDS, assert_same, grid_id, pair, path_of
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from memtile import TiledLinear
from memtile.testing import assert_as_accurate

SIXTEEN = [torch.bfloat16, torch.float16]


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

    assert_same(program.module()(x), dense(x))


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
        assert_same(out[k], call(one, given if batched == "weights" else x[k]))


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_vmap_in_16_bits_sums_in_float32(dtype: torch.dtype) -> None:
    """The path that transforms take keeps the accuracy of the others."""
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

    assert_same(y, 2 * dense(x))
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

    assert_same(torch.func.grad(loss(tiled))(x), torch.func.grad(loss(dense))(x))
    assert_same(torch.func.jacrev(tiled)(x), torch.func.jacrev(dense)(x))
    assert_same(torch.func.jacfwd(tiled)(x), torch.func.jacfwd(dense)(x))
    assert_same(torch.func.hessian(loss(tiled))(x[0]), torch.func.hessian(loss(dense))(x[0]))


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

    assert_same(tangent, t @ dense.weight.t())
    assert_same(unpacked, t @ dense.weight.t())
    assert_same(by_weight, dense(x))


def test_compiling_one_tile_is_honoured() -> None:
    """tile.compile() changes how the tile is called, so the composed path calls it."""
    dense, tiled = pair((2, 1), dtype=torch.float64)
    tiled.tile(0, 0).compile(backend="eager")
    x = torch.randn(5, 13, dtype=torch.float64)

    y = tiled(x)

    assert path_of(y) == "composed"
    assert_same(y, dense(x))


@pytest.mark.parametrize(
    "form", [{"combine_out_splits": False}, {"input_is_already_split": True}], ids=str
)
def test_every_form_of_the_call_compiles(form) -> None:
    """Lists of rows out and sequences of chunks in are part of one graph."""
    dense, tiled = pair((3, 2), dtype=torch.float64, **form)
    torch._dynamo.reset()
    compiled = torch.compile(tiled, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 13, dtype=torch.float64)

    out = compiled(x.split([7, 6], -1) if tiled.input_is_already_split else x)

    assert_same(out if isinstance(out, Tensor) else torch.cat(out, dim=-1), dense(x))


def test_hooked_tiles_compile() -> None:
    """A forward hook on a tile is traced with the layer."""
    dense, tiled = pair((3, 2), dtype=torch.float64)
    tiled.tile(0, 0).register_forward_hook(lambda _, __, out: 2 * out)
    tiled.tile(0, 1).register_forward_hook(lambda _, __, out: 2 * out)
    torch._dynamo.reset()
    x = torch.randn(5, 13, dtype=torch.float64)

    y = torch.compile(tiled, fullgraph=True, backend="aot_eager")(x)

    assert_same(y[:, :4], 2 * dense(x)[:, :4])
    assert_same(y[:, 4:], dense(x)[:, 4:])


def test_one_compiled_layer_takes_batches_of_any_size() -> None:
    """Dynamic shapes: no graph is broken and no batch size is baked in."""
    dense, tiled = pair((3, 2), dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(tiled, fullgraph=True, dynamic=True, backend="aot_eager")

    for tokens in (3, 5, 8):
        x = torch.randn(tokens, 13, dtype=torch.float64)
        assert_same(compiled(x), dense(x))


class LooksFirst(nn.Module):
    """Reads what models read about a weight in forward, as T5's feed-forward does."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        weight = self.layer.weight
        if isinstance(weight, Tensor) and x.dtype != weight.dtype:
            x = x.to(weight.dtype)
        out: Tensor = self.layer(x) if self.layer.bias is not None else x
        return out


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad])
def test_looking_at_the_weight_breaks_no_graph(context) -> None:
    """Reading `.weight.dtype` in a compiled or exported forward assembles nothing in the graph."""
    dense, tiled = pair((3, 1), dtype=torch.float64)
    model, x = LooksFirst(tiled), torch.randn(5, 13, dtype=torch.float64)
    graphs = []

    def keep(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    with context():
        compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
        assert_same(compiled(x).detach(), dense(x).detach())

    joins = [n for n in graphs[0].graph.nodes if n.target is torch.ops.aten.cat.default]
    assert [tuple(node.meta["val"].shape) for node in joins] == [(5, 11)]
    assert_same(torch.export.export(model, (x,)).module()(x), dense(x))


def test_a_weight_used_in_a_compiled_function_is_traced() -> None:
    """`F.linear(x, layer.weight)` compiles, and its gradients reach the tiles."""
    dense, tiled = pair((3, 2), dtype=torch.float64)
    torch._dynamo.reset()
    x = torch.randn(5, 13, dtype=torch.float64)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def product(x: Tensor) -> Tensor:
        return nn.functional.linear(x, tiled.weight)

    product(x).square().sum().backward()
    nn.functional.linear(x, dense.weight).square().sum().backward()

    assert_same(tiled.weight.grad, dense.weight.grad)
