"""A head's loss without logits: torch's own loss and gradients, in any block size and option."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import memtile
from memtile.errors import (
    ArgumentError,
    TileDtypeError,
    TileIndexError,
    TileShapeError,
)
from memtile.testing import LargestAllocation, error_ratio, peak_allocated_bytes

BLOCKS = [(None, None), (2, 3), (1, 1), (7, 5)]  # rows and classes
TOKENS, WIDTH, CLASSES = 7, 5, 23


def leaves(
    seed: int = 0, dtype: torch.dtype = torch.float64, shape: tuple[int, int, int] | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, bias and targets, of which some are ignored."""
    tokens, width, classes = shape or (TOKENS, WIDTH, CLASSES)
    torch.manual_seed(seed)
    x = torch.randn(tokens, width).to(dtype).requires_grad_()
    weight = torch.randn(classes, width).to(dtype).requires_grad_()
    bias = torch.randn(classes).to(dtype).requires_grad_()
    target = torch.randint(classes, (tokens,))
    target[2] = -100
    return x, weight, bias, target


def dense_loss(
    x: Tensor,
    head: Tensor,
    bias: Tensor | None,
    target: Tensor,
    softcap: Any = None,
    **options: Any,
) -> Tensor:
    """torch's own, with a soft cap."""
    logits = functional.linear(x, head, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return functional.cross_entropy(logits, target, **options)


def assert_same_with_gradients(ours: Tensor, truth: Tensor, inputs: list[Tensor]) -> None:
    """Values and gradients of float64 agree, for random gradients of the results."""
    upstream = torch.randn(truth.shape, dtype=torch.float64)
    found = torch.autograd.grad(ours, inputs, upstream, retain_graph=True)
    expected = torch.autograd.grad(truth, inputs, upstream)
    for a, b in zip((ours, *found), (truth, *expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_option_is_torchs(reduction: str, blocks: tuple[Any, Any]):
    """Classes or probabilities, weights, smoothing, soft cap, bias: loss and all gradients."""
    for kind, weighted, smoothing, softcap in itertools.product(
        ["classes", "probabilities"], [False, True], [0.0, 0.2, 1.0], [None, 1.5]
    ):
        x, weight, bias, target = leaves()
        if kind == "probabilities":
            target = torch.rand(TOKENS, CLASSES, dtype=torch.float64)
        factors = torch.rand(CLASSES, dtype=torch.float64) if weighted else None
        options: dict[str, Any] = {"weight": factors, "reduction": reduction}
        options |= {"label_smoothing": smoothing, "softcap": softcap}

        truth = dense_loss(x, weight, bias, target, **options)
        ours = memtile.linear_cross_entropy(
            x,
            weight,
            target,
            linear_bias=bias,
            block_rows=blocks[0],
            block_classes=blocks[1],
            **options,
        )

        assert_same_with_gradients(ours, truth, [x, weight, bias])


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_log_probabilities_and_entropy(blocks: tuple[Any, Any]):
    """They and the log-sum-exp are those of the logits, each with its gradients."""
    x, weight, bias, target = leaves()
    logits = 1.3 * functional.linear(x, weight, bias)
    logs = logits.log_softmax(1)
    chosen = logs.gather(1, target.clamp(min=0)[:, None])[:, 0]
    truth = [
        torch.where(target >= 0, chosen, 0.0),
        -(logs.exp() * logs).sum(1),
        logits.logsumexp(1),
    ]

    found = memtile.token_log_probabilities(
        x,
        weight,
        target,
        linear_bias=bias,
        logit_scale=1.3,
        block_rows=blocks[0],
        block_classes=blocks[1],
    )

    assert found._fields == ("log_probabilities", "entropy", "log_sum_exp")
    ours, theirs = torch.stack(found), torch.stack(truth)
    assert_same_with_gradients(ours, theirs, [x, weight, bias])


def test_z_loss_and_scale():
    """The square of the log-sum-exp is added to the loss of each token that counts."""
    x, weight, _, target = leaves()
    logits = 0.7 * functional.linear(x, weight)
    penalty = 0.1 * logits.logsumexp(1).square()[target >= 0].mean()
    truth = functional.cross_entropy(logits, target) + penalty

    ours = memtile.linear_cross_entropy(x, weight, target, z_loss=0.1, logit_scale=0.7)

    assert_same_with_gradients(ours, truth, [x, weight])


@pytest.mark.parametrize("block_rows", [None, 2])
def test_first_and_second_derivatives_are_numerical_ones(block_rows: int | None):
    """With respect to input, weight and bias, for a loss with every term."""
    x, weight, bias, target = leaves(shape=(4, 3, 6))

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        options: dict[str, Any] = {"linear_bias": bias, "softcap": 2.0, "block_rows": block_rows}
        tokens = memtile.token_log_probabilities(x, weight, target, **options)
        loss = memtile.linear_cross_entropy(
            x, weight, target, z_loss=0.1, label_smoothing=0.1, block_classes=4, **options
        )
        return loss + torch.stack(tokens).square().sum()

    assert torch.autograd.gradcheck(function, (x, weight, bias))
    assert torch.autograd.gradgradcheck(function, (x, weight, bias))


# Faults of other implementations


def test_a_scaled_loss_scales_every_gradient():
    """Scaled before or after the loss is taken: the head's gradient too."""
    x, weight, bias, target = leaves()
    loss = memtile.linear_cross_entropy(x, weight, target, linear_bias=bias, block_classes=4)
    plain = torch.autograd.grad(loss, (x, weight, bias), retain_graph=True)

    scaled = torch.autograd.grad(0.25 * loss, (x, weight, bias))

    for a, b in zip(scaled, plain, strict=True):
        torch.testing.assert_close(a, 0.25 * b, rtol=1e-14, atol=0)


def test_backward_twice_gives_the_same_gradients():
    """`retain_graph=True` keeps everything that a second backward needs."""
    x, weight, _, target = leaves()
    loss = memtile.linear_cross_entropy(x, weight, target, block_classes=4)

    first = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (x, weight))

    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_uneven_ignored_tokens_are_no_mean_of_means():
    """Blocks of rows with unequal numbers of tokens, one of them wholly ignored."""
    x, weight, _, target = leaves(shape=(9, 5, 23))
    target[1:7] = -100
    truth = dense_loss(x, weight, None, target)

    for rows in (1, 2, 3, 9):
        ours = memtile.linear_cross_entropy(x, weight, target, block_rows=rows)
        torch.testing.assert_close(ours, truth, rtol=1e-13, atol=0)
        expected = torch.autograd.grad(truth, (x, weight), retain_graph=True)
        found = torch.autograd.grad(ours, (x, weight))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
        assert not found[0][1:7].any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_where_all_is_ignored_the_mean_is_nan_and_gradients_are_zero(reduction: str):
    """As torch has it."""
    x, weight, bias, target = leaves()
    target.fill_(-100)

    ours = memtile.linear_cross_entropy(
        x, weight, target, linear_bias=bias, reduction=reduction, label_smoothing=0.1
    )
    ours.sum().backward()

    assert ours.isnan().all() if reduction == "mean" else not ours.any()
    assert not any(each.grad.any() for each in (x, weight, bias))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_tokens_at_all(reduction: str):
    """An empty input gives torch's results, and zeros for the weight's gradient."""
    x, weight, _, target = leaves()
    x, target = x[:0], target[:0]

    ours = memtile.linear_cross_entropy(x, weight, target, reduction=reduction)
    truth = dense_loss(x, weight, None, target, reduction=reduction)
    ours.sum().backward()

    torch.testing.assert_close(ours, truth, equal_nan=True)
    assert not weight.grad.any()


def test_without_gradients_nothing_is_changed():
    """Under `no_grad` gradients that are there stay, of inputs and weights that require them."""
    x, weight, _, target = leaves()
    memtile.linear_cross_entropy(x, weight, target).backward()
    before = x.grad.clone(), weight.grad.clone()

    with torch.no_grad():
        loss = memtile.linear_cross_entropy(x, weight, target)

    assert not loss.requires_grad
    assert torch.equal(x.grad, before[0])
    assert torch.equal(weight.grad, before[1])


@pytest.mark.parametrize("frozen", ["input", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient(frozen: str):
    """And the others get theirs: a frozen input does not freeze the head."""
    names = dict(zip(["input", "weight", "bias"], leaves()[:3], strict=True))
    names[frozen].requires_grad_(False)
    target = leaves()[3]
    x, weight, bias = names.values()
    ours = memtile.linear_cross_entropy(x, weight, target, linear_bias=bias)
    truth = dense_loss(x, weight, bias, target)

    trained = [each for name, each in names.items() if name != frozen]
    assert_same_with_gradients(ours, truth, trained)
    assert names[frozen].grad is None


def test_accumulated_means_with_a_global_count():
    """Steps of uneven tokens, divided by the tokens of all: the loss of all tokens at once."""
    x, weight, _, target = leaves(shape=(9, 5, 23))
    truth = dense_loss(x, weight, None, target)
    count = (target != -100).sum()

    parts = [
        memtile.linear_cross_entropy(x[rows], weight, target[rows], num_items=count)
        for rows in (slice(0, 4), slice(4, 9))
    ]

    assert_same_with_gradients(parts[0] + parts[1], truth, [x, weight])
    whole = memtile.linear_cross_entropy(x, weight, target, num_items=int(count))
    torch.testing.assert_close(whole, truth)


def test_leading_dimensions_and_strides():
    """Any rank, a single token, inputs that are not contiguous, other whole-number targets."""
    torch.manual_seed(0)
    weight = torch.randn(CLASSES, WIDTH, dtype=torch.float64).requires_grad_()
    x = torch.randn(WIDTH, 3, 2, dtype=torch.float64).requires_grad_()
    target = torch.randint(CLASSES, (2, 3))
    turned = x.permute(2, 1, 0)

    ours = memtile.linear_cross_entropy(
        turned, weight.t().clone().t(), target.int(), reduction="none"
    )
    truth = functional.cross_entropy(
        (turned @ weight.t()).permute(0, 2, 1), target, reduction="none"
    )

    assert ours.shape == (2, 3)
    assert_same_with_gradients(ours, truth, [x, weight])
    one = memtile.linear_cross_entropy(turned[1, 2], weight, target[1, 2])
    torch.testing.assert_close(one, ours[1, 2])


# Precision and memory


@pytest.mark.parametrize("block_classes", [3, 64, None])
@pytest.mark.parametrize("block_rows", [16, None])
def test_16_bits_lose_no_more_than_plain_16_bits(block_rows: Any, block_classes: Any):
    """The loss is within 1e-3 of float64, gradients within 1.5 × of plain bf16, in any blocks."""
    x, weight, _, target = leaves(dtype=torch.bfloat16, shape=(192, 96, 256))
    exact = [each.detach().double().requires_grad_() for each in (x, weight)]
    truth = dense_loss(*exact, None, target)
    truth64 = torch.autograd.grad(truth, exact)
    dense = torch.autograd.grad(dense_loss(x, weight, None, target), (x, weight))

    loss = memtile.linear_cross_entropy(
        x, weight, target, block_rows=block_rows, block_classes=block_classes
    )
    ours = torch.autograd.grad(loss, (x, weight))

    assert loss.dtype == torch.float32
    assert abs(loss.item() / truth.item() - 1) < 1e-3
    for a, b, c in zip(ours, dense, truth64, strict=True):
        assert a.dtype == torch.bfloat16
        assert error_ratio(a, b, c) <= 1.5


def test_autocast_computes_products_in_its_dtype():
    """float32 weights: the bits of a bf16 head's loss, and gradients in float32."""
    x, weight, bias, target = leaves(dtype=torch.float32, shape=(40, 32, 70))
    rounded = [each.detach().bfloat16().requires_grad_() for each in (x, weight, bias)]
    truth = memtile.linear_cross_entropy(*rounded[:2], target, linear_bias=rounded[2])
    truth.backward()

    with torch.autocast("cpu", torch.bfloat16):
        ours = memtile.linear_cross_entropy(x, weight, target, linear_bias=bias)
    ours.backward()

    assert torch.equal(ours, truth)
    assert weight.grad.dtype == x.grad.dtype == torch.float32
    assert torch.equal(weight.grad.bfloat16(), rounded[1].grad)
    assert torch.equal(x.grad.bfloat16(), rounded[0].grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_is_that_of_the_formula(dtype: torch.dtype):
    """Gradients, one block of logits and strips of it: never the logits, nor a slice of them."""
    tokens, width, classes, rows, some = 512, 64, 8192, 256, 512
    x, weight, _, target = leaves(dtype=dtype, shape=(tokens, width, classes))
    strip = 3 * 4 * (1 << 18)  # float32: values, exponentials, and what is cast
    block = rows * some * dtype.itemsize
    gradients = (tokens + classes) * width * dtype.itemsize
    sums = 4 * width * (tokens + 2 * some) + 4 * 8 * tokens * classes // some  # in float32

    def step() -> None:
        loss = memtile.linear_cross_entropy(x, weight, target, block_rows=rows, block_classes=some)
        loss.backward()

    step()
    x.grad = weight.grad = None
    peak = peak_allocated_bytes(step)
    with LargestAllocation() as largest:
        step()

    assert peak <= gradients + sums + block + strip
    assert peak < tokens * classes * dtype.itemsize
    assert largest.nbytes <= classes * width * dtype.itemsize


# Compilers, transforms, the module, errors


def test_function_transforms():
    """`torch.func.grad`, `vmap` of it, and batched gradients are right."""
    x, weight, _, target = (each.detach() for each in leaves())
    both = torch.stack([x, 2 * x])

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return memtile.linear_cross_entropy(x, weight, target, block_rows=2)

    def truth(x: Tensor, weight: Tensor) -> Tensor:
        return dense_loss(x, weight, None, target)

    expected = torch.func.grad(truth, argnums=(0, 1))(x, weight)
    torch.testing.assert_close(torch.func.grad(loss, argnums=(0, 1))(x, weight), expected)
    per_sample = torch.func.vmap(torch.func.grad(loss), (0, None))(both, weight)
    torch.testing.assert_close(per_sample[0], expected[0])
    x.requires_grad_()
    upstream = torch.rand(3, TOKENS, dtype=torch.float64)
    losses = memtile.linear_cross_entropy(x, weight, target, reduction="none")
    (batched,) = torch.autograd.grad(losses, x, upstream, is_grads_batched=True, retain_graph=True)
    for one, gradient in zip(upstream, batched, strict=True):
        torch.testing.assert_close(
            torch.autograd.grad(losses, x, one, retain_graph=True)[0], gradient
        )


def test_the_module_is_the_function():
    """With its options; its head's parameters are its own, its weights a buffer."""
    x, _, _, target = leaves()
    head = torch.nn.Linear(WIDTH, CLASSES, dtype=torch.float64)
    factors = torch.rand(CLASSES, dtype=torch.float64)
    module = memtile.LinearCrossEntropy(head, weight=factors, label_smoothing=0.1, softcap=3.0)
    options: dict[str, Any] = {"weight": factors, "label_smoothing": 0.1, "softcap": 3.0}

    truth = dense_loss(x, head.weight, head.bias, target, **options)

    assert_same_with_gradients(module(x, target), truth, [x, *module.parameters()])
    whole = memtile.linear_cross_entropy(x, head, target, num_items=3, **options)
    assert torch.equal(module(x, target, num_items=3), whole)
    assert [name for name, _ in module.named_buffers()] == ["weight"]


@pytest.mark.parametrize("splits", [None, 3])
def test_replaced_parameters_get_their_gradients(splits: int | None):
    """Those of `torch.func.functional_call`, which are gone in backward."""
    x, weight, _, target = leaves()
    head: Any = torch.nn.Linear(WIDTH, CLASSES, bias=False, dtype=torch.float64)
    if splits:
        head = memtile.TiledLinear.from_linear(head, out_splits=splits)
    module = memtile.LinearCrossEntropy(head)
    names = [name for name, _ in module.named_parameters()]
    others = dict(
        zip(names, weight.chunk(1) if splits is None else weight.tensor_split(3), strict=True)
    )
    ours = torch.func.functional_call(module, others, (x, target))

    assert_same_with_gradients(ours, dense_loss(x, weight, None, target), [x, weight])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target": torch.tensor([0, 23])}, TileIndexError, "the classes are 0 to 22"),
        ({"target": torch.tensor([0, -1])}, TileIndexError, "a target is -1"),
        ({"target": torch.tensor([0])}, TileShapeError, r"must be \(2,\)"),
        ({"target": torch.ones(2, 5)}, TileShapeError, "probabilities are"),
        ({"target": torch.ones(2, 23, requires_grad=True)}, ArgumentError, "target.detach"),
        ({"target": torch.tensor([True, False])}, TileDtypeError, "int64"),
        ({"input": torch.ones(2, 4)}, TileShapeError, "4 wide"),
        ({"input": torch.ones(2, 5).double()}, TileDtypeError, "float64"),
        ({"linear_weight": torch.ones(23, 2, 5)}, TileShapeError, "further dimensions"),
        ({"linear_weight": torch.nn.Tanh()}, ArgumentError, "how many classes"),
        ({"linear_bias": torch.ones(3)}, TileShapeError, r"must be \(23,\)"),
        ({"weight": torch.ones(3)}, TileShapeError, "one for each class"),
        ({"target": None}, TileDtypeError, "the target is a NoneType"),
        ({"input": [1.0] * 5}, TileDtypeError, "the input is a list"),
        ({"linear_weight": torch.ones(5)}, TileShapeError, "must have two dimensions"),
        ({"linear_weight": torch.ones(5, 23)}, TileShapeError, "5 wide.*in_features is 23"),
        ({"weight": [1.0] * 23}, TileShapeError, "weight is a list"),
        ({"reduction": "max"}, ArgumentError, "reduction='max'"),
        ({"label_smoothing": 1.5}, ArgumentError, "label_smoothing=1.5"),
        ({"label_smoothing": None}, ArgumentError, "label_smoothing=None"),
        ({"ignore_index": None}, ArgumentError, "such as -100"),
        ({"z_loss": "much"}, ArgumentError, "z_loss='much'"),
        ({"logit_scale": torch.ones((), requires_grad=True)}, ArgumentError, "multiply the input"),
        ({"num_items": 3, "reduction": "sum"}, ArgumentError, "num_items=3"),
        ({"softcap": 0.0}, ArgumentError, "softcap=0.0"),
        ({"block_rows": 0}, ArgumentError, "block_rows=0"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments_say_what_is_right(change: Any, error: type, message: str):
    """Each by its own error, before anything is computed."""
    given: dict[str, Any] = {"input": torch.ones(2, 5), "linear_weight": torch.ones(23, 5)}
    given |= {"target": torch.tensor([1, 2]), **change}

    with pytest.raises(error, match=message):
        memtile.linear_cross_entropy(**given)
