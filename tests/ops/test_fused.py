"""The fused path's mathematics: one autograd function for a whole layer."""

import pytest
import torch
from paths import grid_id
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from memtile.geometry import Grid
from memtile.ops import FusedSpec, fused_linear

TINY_GRIDS = [(1, 1), (1, 3), (4, 1), (3, 2)]
IN_FEATURES, OUT_FEATURES = 5, 7


def operands(
    spec: FusedSpec, lead: tuple[int, ...] = (2,), seed: int = 0
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Float64 leaves: the inputs, the weights row by row, the biases."""
    torch.manual_seed(seed)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    widths = [span.size for span in spec.grid.in_spans] if spec.chunks > 1 else [IN_FEATURES]
    inputs = [leaf(*lead, width) for width in widths]
    weights = [leaf(*spec.grid.rect(*index).shape) for index in spec.grid.indices()]
    biases = [leaf(span.size) for span in spec.grid.out_spans] if spec.has_bias else []
    return inputs, weights, biases


def flat(spec: FusedSpec, *leaves: Tensor) -> Tensor | tuple[Tensor, ...]:
    """The layer as a function of all its leaves, for gradcheck."""
    first_bias = spec.bias(0)
    return fused_linear(
        spec, leaves[: spec.chunks], leaves[spec.chunks : first_bias], leaves[first_bias:]
    )


def spec_of(
    grid: tuple[int, int], *, split: bool = False, combine: bool = True, bias: bool = True
) -> FusedSpec:
    """The form of a call on a tiny layer."""
    whole = Grid.uniform(OUT_FEATURES, IN_FEATURES, *grid)
    return FusedSpec(whole, whole.in_splits if split else 1, combine, bias)


@pytest.mark.parametrize(
    "form", [{}, {"split": True}, {"combine": False}, {"bias": False}], ids=str
)
@pytest.mark.parametrize("grid", TINY_GRIDS, ids=grid_id)
def test_first_and_second_derivatives_are_exact(grid, form):
    """gradcheck and gradgradcheck pass in every form of the call, for every operand."""
    spec = spec_of(grid, **form)
    leaves = [leaf for group in operands(spec) for leaf in group]

    assert gradcheck(lambda *tensors: flat(spec, *tensors), leaves)
    assert gradgradcheck(lambda *tensors: flat(spec, *tensors), leaves)


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 1, 3), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("grid", TINY_GRIDS, ids=grid_id)
def test_any_number_of_leading_dimensions_gives_what_the_dense_product_gives(grid, lead):
    """Vectors, batches, sequences and empty batches: the shape and the values of F.linear."""
    spec = spec_of(grid)
    inputs, weights, biases = operands(spec, lead)
    columns = [weights[row * grid[1] : (row + 1) * grid[1]] for row in range(grid[0])]
    dense = torch.cat([torch.cat(row, dim=1) for row in columns])

    output = fused_linear(spec, inputs, weights, biases)

    expected = torch.nn.functional.linear(inputs[0], dense, torch.cat(biases))
    assert output.shape == expected.shape == (*lead, OUT_FEATURES)
    torch.testing.assert_close(output, expected)  # float64: 1e-7 relative


@pytest.mark.parametrize("frozen", ["inputs", "weights", "biases"])
@pytest.mark.parametrize("grid", TINY_GRIDS, ids=grid_id)
def test_the_derivatives_are_exact_with_frozen_operands(grid, frozen):
    """A frozen input, weight or bias gets no gradient and changes no other one."""
    spec = spec_of(grid)
    groups = dict(zip(("inputs", "weights", "biases"), operands(spec), strict=True))
    for leaf in groups[frozen]:
        leaf.requires_grad_(False)
    leaves = [leaf for group in groups.values() for leaf in group]

    assert gradcheck(lambda *tensors: flat(spec, *tensors), leaves)
    assert gradgradcheck(lambda *tensors: flat(spec, *tensors), leaves)


@pytest.mark.parametrize(
    ("needs", "kept"),
    [
        ("inputs", {"weights"}),
        ("weights", {"inputs"}),
        ("biases", set()),
        ("all", {"inputs", "weights"}),
    ],
)
def test_only_what_backward_reads_is_kept(needs, kept):
    """The input is saved for weight gradients, weights for the input's, biases never."""
    spec = spec_of((3, 2))
    groups = dict(zip(("inputs", "weights", "biases"), operands(spec), strict=True))
    for name, leaves in groups.items():
        for leaf in leaves:
            leaf.requires_grad_(needs in (name, "all"))

    output = fused_linear(spec, *groups.values())

    saved = {id(tensor) for tensor in output.grad_fn.saved_tensors if tensor is not None}
    expected = {id(leaf) for name in kept for leaf in groups[name]}
    assert saved == expected


@pytest.mark.parametrize("grid", [(4, 1), (3, 2)], ids=grid_id)
def test_rows_without_a_gradient_are_left_out(grid):
    """Of separate rows only those used in the loss give gradients; the others' tiles have None."""
    spec = spec_of(grid, combine=False)
    inputs, weights, biases = operands(spec)

    fused_linear(spec, inputs, weights, biases)[1].sum().backward()

    used = [number // grid[1] == 1 for number in range(len(weights))]
    assert [weight.grad is not None for weight in weights] == used
    assert [bias.grad is not None for bias in biases] == [row == 1 for row in range(grid[0])]
    expected = torch.cat([weights[grid[1] + i].sum(0) for i in range(grid[1])])
    torch.testing.assert_close(inputs[0].grad, expected.expand_as(inputs[0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("grid", TINY_GRIDS, ids=grid_id)
def test_sixteen_bit_results_and_gradients_keep_their_dtype(grid, dtype):
    """Float32 sums stay inside: the output and every gradient have the dtype of the operands."""
    spec = spec_of(grid)
    groups = [[leaf.detach().to(dtype).requires_grad_() for leaf in g] for g in operands(spec)]

    output = fused_linear(spec, *groups)
    output.sum().backward()

    assert output.dtype == dtype
    assert all(leaf.grad.dtype == dtype for group in groups for leaf in group)


def test_a_second_backward_without_retain_graph_is_refused():
    """Saved tensors are freed by a backward pass, as for any operation of torch."""
    spec = spec_of((3, 2))
    output = fused_linear(spec, *operands(spec))
    output.sum().backward()

    with pytest.raises(RuntimeError, match="second time"):
        output.sum().backward()
