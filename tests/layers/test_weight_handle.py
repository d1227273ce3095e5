"""The handle that a read of `.weight` or `.bias` gives: free to look at, right to compute with."""

import copy
import pickle

import pytest
import torch
from paths import GRIDS, grid_id, pair
from torch import Tensor, nn

from memtile import TiledLinear
from memtile.errors import HandleError, TileShapeError
from memtile.layers import DenseHandle, TiledModule
from memtile.testing import LargestAllocation

LOOKS = {
    "shape": lambda w: w.shape,
    "size": lambda w: (w.size(), w.size(0), w.size(-1)),
    "dtype": lambda w: w.dtype,
    "device": lambda w: w.device,
    "layout": lambda w: w.layout,
    "ndim": lambda w: (w.ndim, w.dim()),
    "numel": lambda w: (w.numel(), w.nelement(), len(w)),
    "bytes": lambda w: (w.nbytes, w.itemsize, w.element_size()),
    "stride": lambda w: (w.stride(), w.is_contiguous(), w.storage_offset()),
    "requires_grad": lambda w: (w.requires_grad, w.is_leaf, w.grad_fn),
    "kind": lambda w: (w.is_cpu, w.is_cuda, w.is_meta, w.is_sparse, w.is_quantized),
    "type": lambda w: (w.type(), w.is_floating_point(), w.is_complex(), w.is_signed()),
    "device number": lambda w: w.get_device(),
    "missing": lambda w: (hasattr(w, "quant_state"), getattr(w, "ds_id", None)),
    "parameter": lambda w: (isinstance(w, Tensor), isinstance(w, nn.Parameter)),
}


@pytest.fixture
def nothing_is_assembled(monkeypatch) -> None:
    """Makes assembling the weight an error."""

    def refuse(layer: TiledModule, name: str) -> Tensor:
        raise AssertionError(f"{name} was assembled")

    monkeypatch.setattr(TiledModule, "dense_tensor", refuse)


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("look", LOOKS)
def test_looking_costs_nothing_and_gives_what_the_dense_parameter_gives(
    nothing_is_assembled, look, name
):
    """What libraries read about a weight, some on each forward, assembles nothing."""
    dense, layer = pair((3, 2), dtype=torch.bfloat16)

    with LargestAllocation() as largest:
        seen = LOOKS[look](getattr(layer, name))

    assert seen == LOOKS[look](getattr(dense, name))
    assert largest.nbytes == 0


def test_printing_assembles_nothing(nothing_is_assembled):
    """The repr names the layer and what is known without the values."""
    _, layer = pair((3, 2))

    assert repr(layer.weight) == (
        "DenseHandle(TiledLinear.weight, shape=(11, 13), dtype=torch.float32, device=cpu)"
    )


def test_a_handle_requires_grad_as_its_tiles_do():
    """Frozen tiles give a frozen handle; one trained tile is enough for the other."""
    _, layer = pair((3, 2))
    layer.requires_grad_(False)
    frozen = layer.weight.requires_grad
    layer.tile(2, 1).requires_grad_(True)

    assert frozen is False
    assert layer.weight.requires_grad is True


def test_the_version_of_a_handle_grows_when_any_tile_is_written(nothing_is_assembled):
    """Caches that watch `weight._version` see a change of the layer."""
    _, layer = pair((3, 2))
    before = layer.weight._version
    with torch.no_grad():
        layer.tile(2, 1).weight.zero_()

    assert layer.weight._version > before


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("look", ["shape", "dtype", "device", "ndim", "numel", "bytes", "stride"])
def test_looking_at_data_costs_nothing(nothing_is_assembled, look, name):
    """`layer.weight.data.ndim`, as PEFT asks, is what the dense parameter's is."""
    dense, layer = pair((3, 2), dtype=torch.bfloat16)
    data = getattr(layer, name).data

    assert LOOKS[look](data) == LOOKS[look](getattr(dense, name).data)
    assert (data.requires_grad, isinstance(data, nn.Parameter)) == (False, False)


def test_data_gives_the_values_without_a_graph():
    """Copies, casts and sums of `.data` and of `.grad.data` are the dense ones, detached."""
    dense, layer = pair((3, 2))
    for module in (dense, layer):
        module(torch.ones(4, 13)).sum().backward()

    assert torch.equal(layer.weight.data.clone(), dense.weight)
    assert layer.weight.data.double().requires_grad is False
    assert torch.equal(layer.bias.grad.data + 0, dense.bias.grad)
    assert layer.weight.data.grad is None


OPERATIONS = {
    "linear": lambda w, x: nn.functional.linear(x, w),
    "matmul": lambda w, x: x @ w.t(),
    "sum": lambda w, x: w.sum() * x.sum(),
    "slice": lambda w, x: w[1:4].square() * x.mean(),
    "cat": lambda w, x: torch.cat([w, 2 * w]) * x.mean(),
    "cast": lambda w, x: w.to(torch.float32).double() * x.mean(),
    "norm": lambda w, x: torch.linalg.matrix_norm(w) * x.sum(),
    "operand": lambda w, x: x.new_ones(11, 13).add_(w) * x.mean(),
    "keyword": lambda w, x: x.new_ones(11, 13).add_(other=w) * x.mean(),
    "einsum": lambda w, x: torch.einsum("ni,oi->no", x, w),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("grid", GRIDS, ids=grid_id)
def test_any_operation_gives_the_dense_result_and_the_tiles_gradients(grid, operation):
    """The first operation assembles the weight; gradients reach each tile as in the dense layer."""
    dense, layer = pair(grid, dtype=torch.float64)
    x = torch.randn(4, 13, dtype=torch.float64)

    result = OPERATIONS[operation](layer.weight, x)
    expected = OPERATIONS[operation](dense.weight, x)
    result.sum().backward()
    expected.sum().backward()

    assert type(result) is Tensor
    assert torch.equal(result, expected)
    assert torch.equal(layer.weight.grad, dense.weight.grad)


@pytest.mark.parametrize("grid", GRIDS, ids=grid_id)
def test_a_layer_can_be_called_through_its_handles(grid):
    """`F.linear(x, layer.weight, layer.bias)` is the dense call, with exact gradients."""
    dense, layer = pair(grid, dtype=torch.float64)
    x = torch.randn(4, 13, dtype=torch.float64)

    nn.functional.linear(x, layer.weight, layer.bias).square().sum().backward()
    dense(x).square().sum().backward()

    assert torch.equal(layer.weight.grad, dense.weight.grad)
    assert torch.equal(layer.bias.grad, dense.bias.grad)


def test_without_gradients_the_assembled_weight_is_a_plain_tensor():
    """Under `no_grad`, `detach` and frozen tiles nothing is recorded."""
    _, layer = pair((3, 2))
    with torch.no_grad():
        copied = layer.weight.clone()

    assert copied.requires_grad is False
    assert layer.weight.detach().requires_grad is False
    assert torch.equal(layer.weight.detach(), copied)


def test_the_gradient_is_assembled_and_none_while_a_tile_has_none():
    """`.grad` is the dense gradient once every tile has one."""
    dense, layer = pair((3, 2), combine_out_splits=False)
    x = torch.randn(4, 13)
    layer(x)[0].sum().backward()
    partly = layer.weight.grad
    layer.zero_grad()
    sum(row.sum() for row in layer(x)).backward()
    dense(x).sum().backward()

    assert partly is None
    assert layer.weight.grad.shape == dense.weight.shape
    assert torch.equal(layer.weight.grad, layer.weight.grad + 0)


@pytest.mark.parametrize(
    "write",
    [
        lambda weight: weight.grad.zero_(),
        lambda weight: weight.grad.mul_(0.5),
        lambda weight: weight.grad.data.mul_(0.5),
        lambda weight: nn.utils.clip_grad_norm_([weight], 0.1),
        lambda weight: torch._foreach_mul_([weight.grad], 0.5),
    ],
)
def test_writing_to_the_gradient_of_a_handle_is_refused(write):
    """The tiles' gradients would not change, so neither zeroing nor clipping passes silently."""
    _, layer = pair((3, 2))
    layer(torch.randn(4, 13)).sum().backward()
    before = [parameter.grad.clone() for parameter in layer.parameters()]

    with pytest.raises(HandleError, match="is refused"):
        write(layer.weight)

    assert all(torch.equal(p.grad, b) for p, b in zip(layer.parameters(), before, strict=True))


def test_autograd_grad_with_respect_to_a_handle_is_refused():
    """An assembled copy is not in the graph: the answer would be None."""
    _, layer = pair((3, 2))

    with pytest.raises(HandleError, match=r"autograd.grad"):
        torch.autograd.grad(layer(torch.randn(4, 13)).sum(), layer.weight, allow_unused=True)


INITIALISERS = [
    "uniform_",
    "normal_",
    "zeros_",
    "ones_",
    "eye_",
    "xavier_uniform_",
    "xavier_normal_",
    "kaiming_uniform_",
    "kaiming_normal_",
    "trunc_normal_",
    "orthogonal_",
]
WRITES = {
    "method": lambda w: w.zero_(),
    "add_": lambda w: w.add_(1.0),
    "copy_": lambda w: w.copy_(torch.zeros(11, 13)),
    "requires_grad_": lambda w: w.requires_grad_(False),
    "detach_": lambda w: w.detach_(),
    "item": lambda w: w.__setitem__(0, 1.0),
    "plus": lambda w: w.__iadd__(1.0),
    "out": lambda w: torch.add(torch.zeros(11, 13), 1.0, out=w),
    "foreach": lambda w: torch._foreach_add_([w], 1.0),
    "data": lambda w: w.data.mul_(2.0),
    "item of data": lambda w: w.data.__setitem__(0, 1.0),
    "set data of data": lambda w: setattr(w.data, "data", torch.zeros(11, 13)),
    "set data": lambda w: setattr(w, "data", torch.zeros(11, 13)),
    "set grad": lambda w: setattr(w, "grad", None),
    "set requires_grad": lambda w: setattr(w, "requires_grad", False),
    "data_ptr": lambda w: w.data_ptr(),
    "storage": lambda w: w.untyped_storage(),
    "hook": lambda w: w.register_hook(print),
    "accumulation hook": lambda w: w.register_post_accumulate_grad_hook(print),
    "retain": lambda w: w.retain_grad(),
    "share": lambda w: w.share_memory_(),
    **{f"init {name}": getattr(nn.init, name) for name in INITIALISERS},
    "init constant_": lambda w: nn.init.constant_(w, 1.0),
    "init sparse_": lambda w: nn.init.sparse_(w, 0.5),
}


@pytest.mark.parametrize("write", WRITES)
def test_what_would_silently_change_nothing_is_refused(write):
    """In-place operations, on `.data` too, `nn.init`, hooks: an error with the way out."""
    _, layer = pair((3, 2))
    layer.name_in_model = "model.layers.0.up_proj"
    before = layer.weight.detach().clone()

    with pytest.raises(
        HandleError, match=r"model\.layers\.0\.up_proj\.weight(\.data)?: .*refused"
    ) as raised:
        WRITES[write](layer.weight)

    assert "layer.copy_params_from(linear)" in str(raised.value)
    assert isinstance(raised.value, RuntimeError)
    assert torch.equal(layer.weight, before)
    assert layer.tile(0, 0).weight.requires_grad


@pytest.mark.parametrize("write", ["method", "foreach", "data", "init normal_"])
def test_the_same_is_refused_without_gradients(write):
    """`no_grad`, under which initialisers and optimizers write, makes no difference."""
    _, layer = pair((3, 2))

    with torch.no_grad(), pytest.raises(HandleError):
        WRITES[write](layer.weight)


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize(
    "value", [nn.Parameter(torch.zeros(11, 13)), torch.zeros(11), None], ids=["2-d", "1-d", "None"]
)
def test_an_assignment_is_refused_with_the_way_to_tie(name, value):
    """`layer.weight = other` never reaches a property of a module: it is caught, not ignored."""
    _, layer = pair((3, 2))

    with pytest.raises(HandleError, match=rf"TiledLinear\.{name} = .*share_tiles_with\(other\)"):
        setattr(layer, name, value)


def test_tying_a_layer_to_itself_again_is_no_error():
    """`tie_weights` of a model whose ties are tiles assigns what is there: nothing to do."""
    _, layer = pair((3, 1))
    _, other = pair((3, 1), bias=False)
    other.share_tiles_with(layer)

    layer.weight = layer.weight
    other.weight = layer.weight
    layer.bias = layer.bias
    other.bias = None

    assert other.tile(2, 0).weight is layer.tile(2, 0).weight


def test_assigning_another_layers_handle_is_refused():
    """Equal shapes are not enough: the tiles themselves must be the same."""
    _, layer = pair((3, 2))
    _, other = pair((3, 2))

    with pytest.raises(HandleError):
        layer.weight = other.weight


def test_a_shared_layer_is_trained_through_both_uses():
    """`share_tiles_with` is a tie: one set of tiles gets both gradients."""
    dense, layer = pair((3, 1), dtype=torch.float64)
    _, other = pair((3, 1), dtype=torch.float64, seed=1)
    other.share_tiles_with(layer)
    x = torch.randn(4, 13, dtype=torch.float64)

    (layer(x).sum() + other(2 * x).sum()).backward()
    (dense(x).sum() + dense(2 * x).sum()).backward()

    torch.testing.assert_close(layer.weight.grad, dense.weight.grad)


def test_a_layer_without_bias_has_none_to_read():
    """`.bias` is None, as in `nn.Linear(bias=False)`."""
    layer = TiledLinear(13, 11, bias=False, in_splits=2)

    assert layer.bias is None
    assert hasattr(layer, "weight")


def test_tiles_without_a_weight_give_no_handle():
    """A `linear_cls` that keeps its weight elsewhere: `hasattr` says no, as for any module."""

    class Inner(nn.Module):
        def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
            super().__init__()
            self.inner = nn.Linear(in_features, out_features, bias)

    layer = TiledLinear(13, 11, in_splits=2, linear_cls=Inner)

    assert not hasattr(layer, "weight")
    assert layer.bias is None


def test_tiles_whose_weight_is_a_method_give_no_handle():
    """torch's quantized linears have a method of this name: the layer computes and loads on."""

    class Quantized(nn.Module):
        def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
            super().__init__()
            self.kept = nn.Parameter(torch.ones(out_features, in_features))

        def weight(self) -> Tensor:
            return self.kept

        def forward(self, input: Tensor) -> Tensor:
            return nn.functional.linear(input, self.kept)

    layer = TiledLinear(13, 11, in_splits=2, linear_cls=Quantized)

    assert not hasattr(layer, "weight")
    assert layer(torch.ones(2, 13)).eq(13).all()
    layer.load_state_dict(layer.state_dict())


def test_shards_of_a_parallel_linear_are_not_assembled_wrongly():
    """Tiles that hold a part of their span have a dense shape, but no dense value on one rank."""

    class Half(nn.Linear):
        def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
            super().__init__(in_features, out_features // 2, bias)

    layer = TiledLinear(12, 8, out_splits=2, linear_cls=Half)

    assert layer.weight.shape == (8, 12)
    with pytest.raises(TileShapeError, match=r"\(4, 12\), not the whole \(8, 12\)"):
        layer.weight.sum()


def test_a_copied_or_pickled_handle_is_an_ordinary_tensor():
    """A copy has values of its own, without the layer."""
    dense, layer = pair((3, 2))

    for other in (
        copy.deepcopy(layer.weight),
        copy.copy(layer.weight),
        pickle.loads(pickle.dumps(layer.weight)),
    ):
        assert not isinstance(other, DenseHandle)
        assert torch.equal(other, dense.weight)
