"""Gradients through parked tiles: those of the dense layer, whoever asks for them and how."""

import copy

import pytest
import torch
from leftovers import check_nothing_is_left
from parked_layers import (
    HOMES,
    assert_same_bits,
    gradients_of,
    parked_form,
    parked_pair,
    weights_of,
)
from paths import GRIDS, assert_same, dense_gradients, grid_id
from torch import Tensor, nn

import memtile
from memtile.homes import allocation_of
from memtile.testing import assert_as_accurate

nothing_is_left = pytest.fixture(autouse=True)(check_nothing_is_left)
in_every_grid = pytest.mark.parametrize("grid", GRIDS, ids=grid_id)
ALL = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def batch(*lead: int, seed: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    """An input that requires grad."""
    generator = torch.Generator().manual_seed(seed)
    lead = lead or (5,)
    return torch.randn(*lead, 13, generator=generator, dtype=dtype).requires_grad_()


@in_every_grid
@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(5,), (2, 1, 3), (1,), (0,), ()], ids=str)
def test_outputs_and_gradients_are_the_dense_layers(grid, home, bias, lead):
    """In float64, for every grid and home, for no tokens and for a single vector."""
    dense, layer = parked_pair(grid, home, bias=bias)
    x = torch.randn(*lead, 13, dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()

    y, truth = layer(ours), dense(theirs)
    y.square().sum().backward()
    truth.square().sum().backward()

    assert y.shape == truth.shape
    assert_same(y, truth)
    assert_same(ours.grad, theirs.grad)
    gradients = list(dense_gradients(layer))
    assert_same(gradients[0], dense.weight.grad)
    if bias:
        assert_same(gradients[1], dense.bias.grad)


@in_every_grid
@pytest.mark.parametrize("dtype", ALL)
def test_every_dtype_is_as_accurate_as_the_dense_layer(grid, dtype):
    """16-bit weights too: at most twice the dense layer's error, output and gradients."""
    dense, layer = parked_pair(grid, shape=(130, 129), dtype=dtype)
    truth = copy.deepcopy(dense).double()
    x, g = torch.randn(140, 130, dtype=dtype), torch.randn(140, 129, dtype=dtype)
    results = []
    for module, kind in ((layer, dtype), (dense, dtype), (truth, torch.float64)):
        given = x.to(kind, copy=True).requires_grad_()
        y = module(given)
        y.backward(g.to(kind))
        results.append((y, given.grad, module.weight.grad))

    for ours, theirs, exact in zip(*results, strict=True):
        assert ours.dtype == dtype
        if dtype != torch.float64:
            assert_as_accurate(torch.as_tensor(ours + 0), theirs, exact, 2.0)
        else:
            assert_same(ours + 0, exact)


@in_every_grid
def test_homes_agree_bit_for_bit(grid):
    """The same grid gives the same bits wherever its tiles live, gradients at home included."""
    results = []
    for home in HOMES:
        _, layer = parked_pair(grid, home, dtype=torch.float32)
        x = batch(dtype=torch.float32)
        for _ in range(2):
            y = layer(x)
            y.square().sum().backward()
        results.append({"y": y.detach(), "x": x.grad, **gradients_of(layer)})

    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


def test_gradients_live_where_their_weights_live():
    """A gradient of a tile on disk is on disk; a bias and its gradient stay in memory."""
    _, layer = parked_pair((4, 1))
    layer(batch()).sum().backward()

    for tile in layer.modules():
        if isinstance(tile, memtile.layers.ParkedLinear):
            gradient = allocation_of(tile.weight.grad)
            assert gradient is not None
            assert gradient.home is tile.home
            assert allocation_of(tile.bias) is allocation_of(tile.bias.grad) is None


@in_every_grid
def test_gradcheck_and_gradgradcheck(grid):
    """First and second derivatives with respect to input, weights and biases are numerical ones."""
    _, layer = parked_pair(grid, shape=(5, 7))
    names = [n for n, _ in layer.named_parameters()]
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return layer(x)  # numerical gradients perturb the parked parameters themselves

    inputs = (x, *layer.parameters())
    assert names
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


# Who asks for gradients


@in_every_grid
def test_backward_for_the_input_alone_leaves_parameters_untouched(grid):
    """`backward(inputs=[x])` gives x its gradient, and no tile any, nor changes one it has."""
    dense, layer = parked_pair(grid)
    x = batch()
    layer(x).square().sum().backward(inputs=[x])
    assert all(p.grad is None for p in layer.parameters())

    layer(x.detach()).sum().backward()
    before = gradients_of(layer)
    layer(x).square().sum().backward(inputs=[x])

    assert_same_bits(gradients_of(layer), before)
    theirs = x.detach().clone().requires_grad_()
    dense(theirs).square().sum().backward()
    assert_same(x.grad / 2, theirs.grad)


@in_every_grid
def test_backward_for_one_weight_alone_gives_no_other_a_gradient(grid):
    """`backward(inputs=[p])` fills p.grad, at home, and leaves x and the other tiles alone."""
    dense, layer = parked_pair(grid)
    x, p = batch(), layer.tile(0, 0).weight

    layer(x).square().sum().backward(inputs=[p])

    assert x.grad is None
    assert [n for n, q in layer.named_parameters() if q.grad is not None] == [
        next(n for n, q in layer.named_parameters() if q is p)
    ]
    dense(x.detach()).square().sum().backward()
    assert_same(p.grad, dense.weight.grad[layer.grid.rect(0, 0).index])


@in_every_grid
def test_autograd_grad_returns_gradients_and_writes_none(grid):
    """With respect to weights, biases and x together, to x only, and to weights only."""
    dense, layer = parked_pair(grid)
    x = batch()
    expected = torch.autograd.grad(dense(x).square().sum(), [x, dense.weight, dense.bias])
    parameters = list(layer.parameters())

    everything = torch.autograd.grad(layer(x).square().sum(), [x, *parameters])
    (alone,) = torch.autograd.grad(layer(x).square().sum(), x)
    weights = torch.autograd.grad(layer(x).square().sum(), parameters)

    assert_same(everything[0], expected[0])
    assert_same_bits(alone, everything[0])
    for one, other in zip(weights, everything[1:], strict=True):
        assert_same_bits(one, other)
    first = layer.tile(0, 0).weight
    number = next(n for n, p in enumerate(parameters) if p is first)
    assert_same(weights[number], expected[1][layer.grid.rect(0, 0).index])
    assert all(p.grad is None for p in [x, *parameters])


@in_every_grid
@pytest.mark.parametrize("home", HOMES)
def test_double_backward_of_a_gradient_penalty(grid, home):
    """The gradient of the norm of the input gradient is the dense layer's."""
    dense, layer = parked_pair(grid, home)
    for module in (layer, dense):
        x = batch()
        (dx,) = torch.autograd.grad(module(x).tanh().sum(), x, create_graph=True)
        dx.square().sum().backward()

    gradients = list(dense_gradients(layer))
    assert_same(gradients[0], dense.weight.grad)
    assert_same(gradients[1], dense.bias.grad)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_backward_that_creates_a_graph_gives_gradients_with_one():
    """`backward(create_graph=True)` leaves gradients that can be differentiated again."""
    dense, layer = parked_pair((3, 2))
    x = batch()
    layer(x).tanh().sum().backward(create_graph=True)
    dense(x).tanh().sum().backward(create_graph=True)

    loss = sum(p.grad.square().sum() for p in weights_of(layer).values())
    (ours,) = torch.autograd.grad(loss, [layer.tile(0, 0).weight])
    (theirs,) = torch.autograd.grad(dense.weight.grad.square().sum(), [dense.weight])

    assert_same(ours, theirs[layer.grid.rect(0, 0).index])
    for p in [x, *layer.parameters(), *dense.parameters()]:
        p.grad = None  # or leaf and graph keep each other


@pytest.mark.parametrize("home", HOMES)
def test_gradients_from_elsewhere_are_added_to_those_at_home(home):
    """A penalty on the weights themselves, beside the layer's own gradient, loses neither."""
    torch.manual_seed(0)
    dense = nn.Linear(300, 310, dtype=torch.float64)
    layer = parked_form(dense, (3, 2), home)
    x = torch.randn(4, 300, dtype=torch.float64)
    for _ in range(3):
        for module in (layer, dense):
            penalty = sum(p.square().sum() for p in module.parameters())
            (module(x).tanh().sum() + penalty).backward()

        assert_same(layer.weight.grad + 0, dense.weight.grad)


@in_every_grid
def test_batches_of_gradients(grid):
    """`is_grads_batched=True` gives a Jacobian, as from the dense layer."""
    dense, layer = parked_pair(grid)
    x, seeds = batch(3), torch.randn(4, 3, 29, dtype=torch.float64)

    ours = torch.autograd.grad(layer(x), [x, layer.tile(0, 0).weight], seeds, is_grads_batched=True)
    theirs = torch.autograd.grad(dense(x), [x, dense.weight], seeds, is_grads_batched=True)

    rect = layer.grid.rect(0, 0).index
    assert_same(ours[0], theirs[0])
    assert_same(ours[1], theirs[1][(slice(None), *rect)])


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own jvp
@in_every_grid
def test_transforms_of_torch_func(grid):
    """vmap, grad, jacrev, jvp and forward-mode AD through parked tiles are the dense layer's."""
    dense, layer = parked_pair(grid)
    x = batch(4).detach()
    v = torch.randn_like(x)
    own = {n: p.detach() for n, p in layer.named_parameters()}

    assert_same(torch.vmap(layer)(x), dense(x))
    assert_same(torch.func.jacrev(layer)(x).flatten(), torch.func.jacrev(dense)(x).flatten())
    ours, theirs = torch.func.jvp(layer, (x,), (v,)), torch.func.jvp(dense, (x,), (v,))
    assert_same(ours[1], theirs[1])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, v)
        tangent = torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent
        assert_same(tangent, theirs[1])

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    gradients = torch.func.grad(loss)(own)
    layer(x).square().sum().backward()
    for name, p in layer.named_parameters():
        assert_same(gradients[name], p.grad)


@in_every_grid
def test_biases_train_alone(grid):
    """Over a frozen weight and an input without grad, as with LoRA's bias="all": the dense ones."""
    dense, layer = parked_pair(grid)
    for name, parameter in [*dense.named_parameters(), *layer.named_parameters()]:
        parameter.requires_grad_(name.endswith("bias"))
    x = batch().detach()

    layer(x).square().sum().backward()
    dense(x).square().sum().backward()

    biases = [p for name, p in layer.named_parameters() if name.endswith("bias")]
    assert_same(torch.cat([bias.grad for bias in biases]), dense.bias.grad)
    assert all(weight.grad is None for weight in weights_of(layer).values())
