"""An MLP without its intermediate activation: plain torch's output and gradients, in any blocks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import memtile
from memtile.errors import ArgumentError, TileDtypeError, TileShapeError
from memtile.ops import check_element_wise
from memtile.testing import error_ratio, peak_allocated_bytes

BLOCKS = [(None, None), (2, 4), (1, 1), (100, 5)]  # rows and features
TOKENS, WIDTH, INNER, OUT = 7, 5, 23, 3
NAMES = ["gate", "up", "down"]

in_every_block = pytest.mark.parametrize("blocks", BLOCKS, ids=str)


def relu_squared(x: Tensor) -> Tensor:
    return functional.relu(x).square()


ACTIVATIONS: list[Callable[[Tensor], Tensor]] = [
    functional.silu,
    functional.gelu,
    relu_squared,
    nn.ReLU(inplace=True),
    nn.GELU("tanh"),
    torch.tanh,
    nn.Identity(),
]


def linears(
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    sizes: tuple[int, int, int] = (WIDTH, INNER, OUT),
) -> dict[str, nn.Linear]:
    """Seeded layers of an MLP, by their names."""
    torch.manual_seed(0)
    width, inner, out = sizes
    shapes = {"gate": (width, inner), "up": (width, inner), "down": (inner, out)}
    return {name: nn.Linear(*s, bias=bias, dtype=dtype) for name, s in shapes.items()}


def batch(dtype: torch.dtype = torch.float64, tokens: int = TOKENS, width: int = WIDTH) -> Tensor:
    """An input that requires grad."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()


def dense(x: Tensor, layers: Any, activation: Any = functional.silu, gated: bool = True) -> Tensor:
    """The same by plain torch."""
    h = activation(layers["gate"](x)) * layers["up"](x) if gated else activation(layers["up"](x))
    y: Tensor = layers["down"](h)
    return y


def parameters_of(layers: Any, gated: bool = True) -> list[Tensor]:
    return [p for name in NAMES[not gated :] for p in layers[name].parameters()]


def tiled(
    x: Tensor, layers: Any, blocks: Any = (2, 4), gated: bool = True, **options: Any
) -> Tensor:
    """Ours, in small blocks."""
    gate = layers["gate"] if gated else None
    rows, features = blocks
    return memtile.tiled_mlp(
        x, gate, layers["up"], layers["down"], block_rows=rows, block_features=features, **options
    )


def assert_same_with_gradients(ours: Tensor, truth: Tensor, inputs: Any, *theirs: Any) -> None:
    """Values and gradients of float64 agree, for random gradients of the results."""
    upstream = torch.randn(truth.shape, dtype=torch.float64)
    found = torch.autograd.grad(ours, inputs, upstream, retain_graph=True)
    expected = torch.autograd.grad(truth, *(theirs or (inputs,)), upstream)
    for a, b in zip((ours, *found), (truth, *expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@in_every_block
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda of: getattr(of, "__name__", str(of)))
@pytest.mark.parametrize("gated", [True, False])
def test_output_and_gradients_are_plain_torchs(
    gated: bool, activation: Any, bias: bool, blocks: Any
):
    """Of every activation, gated and plain, with biases and without, in any blocks."""
    x, layers = batch(), linears(bias)
    ours = tiled(x, layers, blocks, gated, activation=activation)
    truth = dense(x, layers, activation, gated)

    assert_same_with_gradients(ours, truth, [x, *parameters_of(layers, gated)])


@pytest.mark.parametrize("blocks", [(None, None), (3, 2)], ids=str)
@pytest.mark.parametrize("gated", [True, False])
def test_derivatives_of_both_orders_against_differences(gated: bool, blocks: Any):
    """`gradcheck` and `gradgradcheck`, with dropout of the same seed."""
    layers = linears(sizes=(3, 5, 2))
    x = batch(tokens=4, width=3)

    def run(*inputs: Tensor) -> Tensor:
        torch.manual_seed(3)
        x, *weights = inputs
        gate = weights.pop(0) if gated else None
        return memtile.tiled_mlp(
            x,
            gate,
            *weights,
            activation=functional.gelu,
            dropout=0.5,
            block_rows=blocks[0],
            block_features=blocks[1],
        )

    weights = [layers[name].weight for name in NAMES[not gated :]]
    assert torch.autograd.gradcheck(run, (x, *weights))
    assert torch.autograd.gradgradcheck(run, (x, *weights))


def test_dropout_zeroes_as_many_as_it_says_and_keeps_the_mean():
    """Another mask at each call, in each block; none in evaluation; all at 1."""
    inner = 4096
    up, down = torch.ones(inner, 1), torch.ones(1, inner)
    x = torch.ones(64, 1)
    options: dict[str, Any] = {"activation": nn.Identity(), "block_rows": 16, "block_features": 512}

    torch.manual_seed(0)
    first, second = (memtile.tiled_mlp(x, None, up, down, dropout=0.25, **options) for _ in "ab")

    assert not torch.equal(first, second)
    assert len(first.unique()) > 32  # rows of other blocks get other masks
    spread = (inner * 0.25 / 0.75) ** 0.5
    assert abs(first.mean() - inner) < 5 * spread / 64**0.5
    assert 0.5 * spread < first.std() < 1.5 * spread
    assert not memtile.tiled_mlp(x, None, up, down, dropout=1.0, **options).any()
    module = memtile.TiledMLP(None, nn.Linear(1, 8), nn.Linear(8, 1), dropout=0.5)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


@pytest.mark.parametrize("trained", [["x"], ["gate"], ["up"], ["down"], ["bias"], ["x", "down"]])
def test_what_is_frozen_gets_no_gradient(trained: list[str]):
    """And the others get theirs: a frozen input does not freeze the weights."""
    x, layers = batch().requires_grad_("x" in trained), linears()
    for name in NAMES:
        layers[name].weight.requires_grad_(name in trained)
        layers[name].bias.requires_grad_("bias" in trained)
    leaves = [x, *parameters_of(layers)]
    learnt = [leaf for leaf in leaves if leaf.requires_grad]

    tiled(x, layers).backward(torch.ones(TOKENS, OUT, dtype=torch.float64))
    truth = torch.autograd.grad(dense(x, layers).sum(), learnt)

    for leaf, expected in zip(learnt, truth, strict=True):
        torch.testing.assert_close(leaf.grad, expected, rtol=1e-12, atol=1e-12)
    assert all(leaf.grad is None for leaf in leaves if not leaf.requires_grad)


def test_frozen_weights_skip_their_products():
    """Gate and up are one product: 5 in backward, 3 for the input only, 2 for `down` only."""
    x, layers = (
        batch(dtype=torch.float32, tokens=64, width=32),
        linears(False, torch.float32, (32, 64, 32)),
    )

    def products() -> int:
        with torch.profiler.profile() as profiler:
            tiled(x, layers, (None, None)).sum().backward()
        return sum(
            event.count
            for event in profiler.key_averages()
            if event.key in ("aten::mm", "aten::addmm")
        )

    assert products() == 2 + 5
    for name in NAMES:
        layers[name].requires_grad_(False)
    assert products() == 2 + 3
    x.requires_grad_(False)
    layers["down"].requires_grad_()
    assert products() == 2 + 2


def test_leading_dimensions_and_strides():
    """Any rank, one token, inputs and upstream gradients that are not contiguous."""
    layers = linears()
    x = torch.randn(WIDTH, 3, 2, dtype=torch.float64).requires_grad_()
    turned = x.permute(2, 1, 0)
    ours, truth = tiled(turned, layers), dense(turned, layers)

    assert ours.shape == (2, 3, OUT)
    assert_same_with_gradients(ours, truth, [x, *parameters_of(layers)])
    torch.testing.assert_close(tiled(turned[1, 2], layers), truth[1, 2])
    expanded = torch.autograd.grad(tiled(turned, layers).sum(), x)
    torch.testing.assert_close(expanded, torch.autograd.grad(dense(turned, layers).sum(), x))


def test_no_tokens():
    """The output is empty, and gradients are zero."""
    x, layers = batch(tokens=0), linears()
    y = tiled(x, layers)
    y.sum().backward()

    assert y.shape == (0, OUT)
    assert x.grad.shape == (0, WIDTH)
    assert all(not p.grad.any() for p in parameters_of(layers))


def test_without_gradients_nothing_is_kept():
    """Under `no_grad` the output has no graph; with one, only the input is saved."""
    x, layers = batch(), linears()
    with torch.no_grad():
        assert not tiled(x, layers).requires_grad
    saved: list[Tensor] = []

    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = tiled(x, layers)

    assert [t.data_ptr() for t in saved] == [x.data_ptr()]
    y.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()


def test_a_weight_that_is_written_to_before_backward_is_refused():
    """As by torch's own layers: gradients would be of other values."""
    x, layers = batch(), linears()
    y = tiled(x, layers)
    with torch.no_grad():
        layers["up"].weight.mul_(2)

    with pytest.raises(RuntimeError, match="modified between its forward"):
        y.sum().backward()


def test_layers_that_give_no_tensor_are_refused():
    """Such as those whose bias comes apart."""

    class Pair(nn.Linear):
        def forward(self, input: Tensor) -> Any:
            return functional.linear(input, self.weight), self.bias

    up = memtile.TiledLinearReturnBias(5, 23, linear_cls=Pair)
    with pytest.raises(ArgumentError, match="a layer gives a tuple; gate, up and down must each"):
        memtile.tiled_mlp(torch.ones(2, 5), None, up, nn.Linear(23, 5))


def test_batched_gradients():
    """`is_grads_batched=True` gives what one backward after another gives."""
    x, layers = batch(), linears()
    upstream = torch.randn(3, TOKENS, OUT, dtype=torch.float64)
    inputs = [x, *parameters_of(layers)]
    y = tiled(x, layers)

    found = torch.autograd.grad(y, inputs, upstream, is_grads_batched=True, retain_graph=True)

    for number, one in enumerate(upstream):
        expected = torch.autograd.grad(y, inputs, one, retain_graph=True)
        torch.testing.assert_close([each[number] for each in found], list(expected))


# Precision and memory


@pytest.mark.parametrize("tiles", [4, 16, 64, 256])
@pytest.mark.parametrize("direction", ["rows", "features"])
def test_16_bits_lose_no_more_than_plain_16_bits(direction: str, tiles: int):
    """Output and gradients are within 1.5 × of plain bf16's error, over many tiles either way."""
    tokens, inner = (1024, 256) if direction == "rows" else (256, 1024)
    layers = linears(False, torch.bfloat16, (64, inner, 128))
    x = batch(torch.bfloat16, tokens, 64)
    exact = linears(False, torch.bfloat16, (64, inner, 128))
    for layer in exact.values():
        layer.double()
    x64 = x.detach().double().requires_grad_()
    upstream = torch.randn(tokens, 128, generator=torch.Generator().manual_seed(4))

    def results(run: Any, x: Tensor, layers: Any, **options: Any) -> tuple[Tensor, ...]:
        y = run(x, layers, **options)
        own = [x, *parameters_of(layers)]
        return y, *torch.autograd.grad(y, own, upstream.to(x.dtype))

    blocks = (tokens // tiles, None) if direction == "rows" else (None, inner // tiles)
    ours = results(tiled, x, layers, blocks=blocks)

    plain, truth = results(dense, x, layers), results(dense, x64, exact)
    for a, b, c in zip(ours, plain, truth, strict=True):
        assert a.dtype == torch.bfloat16
        assert error_ratio(a, b, c) <= 1.5


def test_autocast_computes_products_in_its_dtype():
    """float32 weights: the bits of a bf16 MLP, in backward too, and gradients in float32."""
    x, layers = batch(torch.float32, 40, 32), linears(True, torch.float32, (32, 70, 24))
    x16 = x.detach().bfloat16().requires_grad_()
    rounded = {name: copy_of(layer).bfloat16() for name, layer in layers.items()}
    tiled(x16, rounded, (None, 16)).sum().backward()

    with torch.autocast("cpu", torch.bfloat16):
        ours = tiled(x, layers, (None, 16))
    ours.sum().backward()

    assert ours.dtype == torch.bfloat16
    assert x.grad.dtype == torch.float32
    assert torch.equal(x.grad.bfloat16(), x16.grad)
    for a, b in zip(parameters_of(layers), parameters_of(rounded), strict=True):
        assert a.grad.dtype == torch.float32
        assert torch.equal(a.grad.bfloat16(), b.grad)


def copy_of(layer: nn.Linear) -> nn.Linear:
    made = nn.Linear(layer.in_features, layer.out_features)
    made.load_state_dict(layer.state_dict())
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_is_that_of_the_formula(dtype: torch.dtype):
    """Gradients, output, the input's gradient in float32, three blocks, strips: never N × I."""
    tokens, width, inner, features = 1024, 256, 4096, 256
    layers = linears(False, dtype, (width, inner, width))
    x, upstream = batch(dtype, tokens, width), torch.randn(tokens, width).to(dtype)
    rows = tokens * width
    weights = 3 * width * inner * dtype.itemsize
    blocks = 3 * tokens * features * dtype.itemsize
    sums = rows * (4 + dtype.itemsize) + 3 * width * features * 4  # dx, y; up, down, a product
    strips = 11 * 4 * (1 << 16)

    def step() -> None:
        tiled(x, layers, (None, features)).backward(upstream)

    step()
    for leaf in (x, *parameters_of(layers)):
        leaf.grad = None

    assert peak_allocated_bytes(step) <= weights + sums + blocks + strips
    assert weights + sums + blocks + strips < weights + 3 * tokens * inner * dtype.itemsize


# Checkpoints, compilers, transforms, the module, errors


@pytest.mark.parametrize(("reentrant", "times"), [(False, 2), (True, 3)])
def test_inside_an_outer_checkpoint(reentrant: bool, times: int):
    """Values are right; one that is not reentrant computes no third forward."""
    x, layers = batch(), linears()
    calls: list[int] = []

    def activation(z: Tensor) -> Tensor:
        calls.append(z.shape[1])
        return functional.silu(z)

    def block(x: Tensor) -> Tensor:
        return x[:, :OUT] + tiled(x.tanh(), layers, (None, 4), activation=activation, dropout=0.5)

    check_element_wise(activation, INNER)  # as the first call does
    calls.clear()
    torch.manual_seed(5)
    y = checkpoint(block, x, use_reentrant=reentrant)
    y.sum().backward()

    assert sum(calls) == times * INNER
    found = [leaf.grad for leaf in (x, *parameters_of(layers))]
    torch.manual_seed(5)
    expected = torch.autograd.grad(block(x).sum(), [x, *parameters_of(layers)])
    torch.testing.assert_close(found, list(expected))


@pytest.mark.parametrize("splits", [1, 3])
def test_compiled_without_graph_breaks(splits: int):
    """`torch.compile(fullgraph=True)` gives the same, of dense and of tiled layers."""
    x, layers = batch(), linears()
    mlp = memtile.TiledMLP(*tiled_layers(layers, splits))
    truth = dense(x, layers)

    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    ours = compiled(x)

    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(ours.sum(), [x, *mlp.parameters()])
    torch.testing.assert_close(found, torch.autograd.grad(mlp(x).sum(), [x, *mlp.parameters()]))


def tiled_layers(layers: Any, splits: int) -> list[memtile.TiledLinear]:
    """Gate and up over rows, down over columns."""
    return [
        memtile.TiledLinear.from_linear(
            layer, **{"in_splits" if name == "down" else "out_splits": splits}
        )
        for name, layer in layers.items()
    ]


def test_function_transforms():
    """`torch.func.grad`, and `vmap` of it, are right."""
    x, layers = batch().detach(), linears()
    weights = [layers[name].weight.detach() for name in NAMES]

    def loss(x: Tensor, *weights: Tensor) -> Tensor:
        return memtile.tiled_mlp(x, *weights).square().sum()

    def truth(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return ((functional.silu(x @ gate.t()) * (x @ up.t())) @ down.t()).square().sum()

    places = (0, 1, 2, 3)
    expected = torch.func.grad(truth, places)(x, *weights)
    torch.testing.assert_close(torch.func.grad(loss, places)(x, *weights), expected)
    each = torch.func.vmap(torch.func.grad(loss), (0, None, None, None))
    both = torch.stack([x, 2 * x])
    torch.testing.assert_close(each(both, *weights)[0], expected[0])


def test_the_module_is_the_function():
    """Its layers' parameters are its own, under the names gate, up and down."""
    x, layers = batch(), linears()
    for gate in (layers["gate"], None):
        mlp = memtile.TiledMLP(gate, layers["up"], layers["down"], activation=nn.GELU())
        truth = dense(x, layers, functional.gelu, gate is not None)
        assert_same_with_gradients(mlp(x), truth, [x, *mlp.parameters()])
        names = {name.split(".")[0] for name, _ in mlp.named_parameters()}
        assert names == set(NAMES[gate is None :])
    assert "activation" in repr(memtile.TiledMLP(None, layers["up"], layers["down"]))


def row_tiles(splits: int = 3) -> memtile.TiledLinear:
    return memtile.TiledLinear(WIDTH, INNER, out_splits=splits)


def test_the_module_takes_no_tensors_that_it_would_not_train():
    """Parameters are its own."""
    gate, up, down = (nn.Parameter(torch.ones(s)) for s in ((23, 5), (23, 5), (5, 23)))

    assert len(list(memtile.TiledMLP(gate, up, down).parameters())) == 3
    with pytest.raises(ArgumentError, match=r"up is a Tensor.* its weight as a Parameter"):
        memtile.TiledMLP(gate, up.detach(), down)


def test_an_activation_without_a_derivative():
    """A step function: the layers before it get zeros."""
    up, down = nn.Linear(5, 23), nn.Linear(23, 5)
    x = torch.ones(2, 5, requires_grad=True)
    y = memtile.tiled_mlp(x, None, up, down, activation=lambda z: (z > 0).to(z.dtype))
    y.sum().backward()

    assert not x.grad.any()
    torch.testing.assert_close(down.weight.grad[0], (up(x) > 0).sum(0).float())


def _norm(z: Tensor) -> Tensor:
    """Of a width that it knows."""
    return functional.layer_norm(z, (INNER,))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.ones(2, 4)}, TileShapeError, "4 wide"),
        ({"input": torch.ones(2, 5).double()}, TileDtypeError, "float64"),
        ({"input": 3}, TileDtypeError, "must be a tensor"),
        ({"gate": torch.ones(22, 5)}, TileShapeError, r"gate \(22, 5\)"),
        ({"down": torch.ones(5, 22)}, TileShapeError, r"down \(5, 22\)"),
        ({"up": torch.ones(23)}, TileShapeError, "two dimensions"),
        ({"gate": row_tiles(), "up": row_tiles(4)}, TileShapeError, "must be cut alike"),
        ({"gate": row_tiles(), "up": row_tiles()}, TileShapeError, r"\[0, 23\] \(down\)"),
        ({"down": memtile.TiledLinear(23, 5, out_splits=2)}, TileShapeError, "columns only"),
        ({"dropout": 1.5}, ArgumentError, "dropout=1.5"),
        ({"block_rows": 0}, ArgumentError, "block_rows=0"),
        ({"block_features": 2.0}, ArgumentError, "block_features=2.0"),
        ({"activation": "silu"}, ArgumentError, "activation='silu'"),
        ({"activation": nn.PReLU()}, ArgumentError, "has parameters"),
        ({"activation": lambda z: z.sum()}, ArgumentError, "must be element-wise"),
        ({"activation": lambda z: z.softmax(-1)}, ArgumentError, "is not element-wise"),
        ({"activation": lambda z: z.cumsum(-1)}, ArgumentError, "is not element-wise"),
        ({"activation": lambda z: z.cumsum(0)}, ArgumentError, "is not element-wise"),
        ({"activation": lambda z: z - z[:1]}, ArgumentError, "is not element-wise"),
        ({"activation": lambda z: z - z[..., :1]}, ArgumentError, "is not element-wise"),
        ({"activation": lambda z: z * z.shape[0]}, ArgumentError, "is not element-wise"),
        ({"activation": _norm}, ArgumentError, "is not element-wise"),
        ({"activation": nn.Dropout(0.1)}, ArgumentError, "dropout is an option"),
        ({"activation": nn.Softplus}, ArgumentError, "gives a Softplus for"),
        ({"dropout": None}, ArgumentError, "dropout=None"),
        ({"up": None}, ArgumentError, "up is a NoneType; it must be a linear layer"),
        ({"gate": "gate"}, ArgumentError, "gate is a str"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments_say_what_is_right(change: Any, error: Any, message: str):
    """Each by its own error."""
    given: dict[str, Any] = {"input": torch.ones(2, 5), "gate": torch.ones(23, 5)}
    given |= {"up": torch.ones(23, 5), "down": torch.ones(5, 23), **change}

    with pytest.raises(error, match=message):
        memtile.tiled_mlp(**given)
