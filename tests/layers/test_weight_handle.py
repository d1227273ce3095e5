"""The handle that a read of `.weight` or `.bias` gives: free to look at, right to compute with."""

import copy
import pickle

import pytest
import torch
import transformers
from parked_layers import HOMES, assert_same_bits, parked_pair
from paths import GRIDS, grid_id, pair
from torch import Tensor, nn

import memtile
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


@pytest.mark.parametrize("home", [None, *HOMES])
@pytest.mark.parametrize(
    "write",
    [
        lambda weight: weight.grad.zero_(),
        lambda weight: weight.grad.mul_(0.5),
        lambda weight: weight.grad.data.mul_(0.5),
        lambda weight: weight.grad[2:5].mul_(0.5),
        lambda weight: nn.utils.clip_grad_norm_([weight], 0.1),
        lambda weight: torch._foreach_mul_([weight.grad], 0.5),
        lambda weight: setattr(weight, "grad", None),
    ],
)
def test_the_gradient_is_written_through_its_handle(write, home):
    """Zeroing, scaling and clipping reach the tiles' gradients, also those at home."""
    dense, layer = pair((3, 2)) if home is None else parked_pair((3, 2), home)
    x = torch.randn(4, 13, dtype=dense.weight.dtype)
    for module in (dense, layer):
        module(x).sum().backward()
        module.weight.grad.copy_(torch.arange(dense.weight.numel()).view_as(dense.weight))
        write(module.weight)

    assert_same_bits(layer.weight.grad, dense.weight.grad)


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
    "itself": lambda w: w.mul_(w),
    "copy_": lambda w: w.copy_(torch.ones_like(w)),
    "item": lambda w: w.__setitem__(0, 1.0),
    "rows": lambda w: w[2:5].normal_(),
    "one of a row": lambda w: w[-1][:2].fill_(3.0),
    "transposed": lambda w: w.t()[1].zero_(),
    "T": lambda w: w.T[1:3].zero_(),
    "viewed": lambda w: w.view(-1)[::3].zero_(),
    "columns": lambda w: w[:, 3].zero_(),
    "mask": lambda w: w.__setitem__(w > 0, 0.0),
    "masked": lambda w: w.masked_fill_(w > 0, 2.0),
    "index": lambda w: w.__setitem__(torch.tensor([1, 7]), 1.0),
    "plus": lambda w: w.__iadd__(1.0),
    "out": lambda w: torch.add(torch.zeros_like(w), 1.0, out=w),
    "foreach": lambda w: torch._foreach_add_([w], 1.0),
    "data": lambda w: w.data.mul_(2.0),
    "drawn data": lambda w: w.data.normal_(),
    "row of data": lambda w: w.data[3].zero_(),
    "item of data": lambda w: w.data.__setitem__(0, 1.0),
    "rows of data": lambda w: w.data.__setitem__(slice(0, 5), w.data[5:10]),
    "detached": lambda w: w.detach().mul_(2.0),
    "set data": lambda w: setattr(w, "data", torch.ones_like(w)),
    **{f"init {name}": getattr(nn.init, name) for name in INITIALISERS},
    "init constant_": lambda w: nn.init.constant_(w, 1.0),
    "init sparse_": lambda w: nn.init.sparse_(w, 0.5),
    "init of a row": lambda w: nn.init.zeros_(w[4]),
}


@pytest.mark.parametrize("home", [None, "disk"])
@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_reaches_the_tiles(write, home):
    """In-place operations, `nn.init`, on `.data` and on views: the dense layer's values."""
    dense, layer = pair((3, 2)) if home is None else parked_pair((3, 2), home)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        for weight in (dense.weight, layer.weight):
            torch.manual_seed(1)
            WRITES[write](weight)

    assert not torch.equal(layer.weight, before)
    assert_same_bits(layer.weight.detach() + 0, dense.weight.detach())
    assert layer.weight.requires_grad
    assert all(type(p) is nn.Parameter for p in layer.parameters())


@pytest.mark.parametrize("write", ["drawn data", "row of data", "detached", "init normal_"])
@pytest.mark.parametrize("kind", ["bias", "transposed"])
def test_biases_and_transposed_weights_are_written_too(kind, write):
    """A bias, and the weight of a Conv1D."""
    if kind == "bias":
        (dense, layer), name = pair((3, 2)), "bias"
    else:
        dense, name = transformers.pytorch_utils.Conv1D(7, 5), "weight"
        layer = memtile.tile(nn.Sequential(copy.deepcopy(dense)), out_splits=3, in_splits=2)[0]
    for module in (dense, layer):
        torch.manual_seed(1)
        WRITES[write](getattr(module, name))

    assert torch.equal(getattr(layer, name), getattr(dense, name))


def test_what_is_written_in_place_is_given_back():
    """`w.zero_()` gives `w`, as torch does; `+=` reaches the layer."""
    _, layer = pair((3, 2))
    with torch.no_grad():
        weight = layer.weight
        given = weight.zero_()
        layer.weight += 2.0

    assert given is weight
    assert layer.tile(2, 1).weight.eq(2).all()


def test_freezing_and_dropping_the_gradient_reach_the_tiles():
    """`weight.requires_grad = False`, `requires_grad_()` and `weight.grad = None`."""
    _, layer = pair((3, 2))
    layer(torch.ones(1, 13)).sum().backward()
    weight = layer.weight
    weight.grad = None
    weight.requires_grad = False
    frozen = (
        weight.requires_grad,
        [p.requires_grad for p in layer.tile_parameters("weight").values()],
    )
    layer.weight.requires_grad_()

    assert frozen == (False, [False] * 6)
    assert layer.weight.requires_grad
    assert layer.weight.grad is None
    assert layer.bias.grad is not None


def test_marks_of_all_tiles_are_read_from_the_handle():
    """transformers asks a parameter whether it is initialised."""
    _, layer = pair((3, 2))
    unmarked = hasattr(layer.weight, "_is_hf_initialized") and layer.weight._is_hf_initialized
    for tile in layer.tile_parameters("weight").values():
        tile._is_hf_initialized = True

    assert unmarked is False
    assert layer.weight._is_hf_initialized is True


REFUSED = {
    "detach_": lambda w: w.detach_(),
    "transposition": lambda w: w.t_(),
    "another shape": lambda w: w.resize_(3),
    "set data of data": lambda w: setattr(w.data, "data", torch.zeros(11, 13)),
    "data of another shape": lambda w: setattr(w, "data", torch.zeros(11, 14)),
    "data of another dtype": lambda w: setattr(w, "data", torch.zeros(11, 13).double()),
    "set grad": lambda w: setattr(w, "grad", torch.zeros(11, 13)),
    "data_ptr": lambda w: w.data_ptr(),
    "storage": lambda w: w.untyped_storage(),
    "hook": lambda w: w.register_hook(print),
    "accumulation hook": lambda w: w.register_post_accumulate_grad_hook(print),
    "retain": lambda w: w.retain_grad(),
    "share": lambda w: w.share_memory_(),
}


@pytest.mark.parametrize("write", REFUSED)
def test_what_cannot_reach_the_tiles_is_refused(write):
    """Memory, shapes, dtypes, hooks: an error with the way out, and nothing changed."""
    _, layer = pair((3, 2))
    layer.name_in_model = "model.layers.0.up_proj"
    before = layer.weight.detach().clone()

    with pytest.raises(
        HandleError, match=r"model\.layers\.0\.up_proj\.weight(\.data)?: .*refused"
    ) as raised:
        REFUSED[write](layer.weight)

    assert "layer.copy_params_from(linear)" in str(raised.value)
    assert isinstance(raised.value, RuntimeError)
    assert torch.equal(layer.weight, before)
    assert layer.tile(0, 0).weight.requires_grad


@pytest.mark.parametrize("write", ["method", "item", "plus", "copy_", "foreach"])
def test_a_weight_that_requires_grad_is_not_written_under_a_graph(write):
    """torch refuses it for a dense parameter; the message says how."""
    _, layer = pair((3, 2))

    with pytest.raises(HandleError, match=r"requires grad.*torch.no_grad\(\)"):
        WRITES[write](layer.weight)


def test_two_handles_of_the_same_tiles_are_not_written_at_once():
    """One of the two results would be lost."""
    _, layer = pair((3, 2))

    with torch.no_grad(), pytest.raises(HandleError, match="twice"):
        torch._foreach_add_([layer.weight, layer.weight], 1.0)


def test_an_operation_that_fails_changes_nothing():
    """The tiles are written once it has been done."""
    _, layer = pair((3, 2))
    before = layer.weight.detach().clone()

    with torch.no_grad(), pytest.raises(RuntimeError):
        layer.weight.add_(torch.zeros(5, 5))

    assert torch.equal(layer.weight, before)


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
