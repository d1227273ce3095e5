"""Row-wise modules and functions over row tiles: results, gradients, names, and what is refused."""

import copy
import pickle

import pytest
import torch
from row_models import Mlp, assert_close, batch, gradients
from torch import Tensor, nn
from torch.nn import functional

import memtile
from memtile.errors import ArgumentError, BudgetError, RowTilesError
from memtile.layers import RowTiled
from memtile.testing import peak_allocated_bytes

LEADS = [(1,), (5,), (3, 5), (4, 64), (2, 3, 5), (0,), (2, 0), (7, 1)]
ROWS = [1, 4, 1000]


@pytest.mark.parametrize("lead", LEADS, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_results_and_gradients_are_those_of_the_module(lead, rows):
    """For any rank, batches, no rows, fewer rows than a tile, uneven tiles."""
    plain = Mlp()
    tiled, x = memtile.tile_rows(copy.deepcopy(plain), rows=rows), batch(*lead)

    y, z = tiled(x), plain(x)

    assert_close(
        [y, *gradients(y, x, *tiled.parameters())], [z, *gradients(z, x, *plain.parameters())]
    )


def test_a_vector_is_one_row():
    """Of one dimension there is nothing to cut."""
    plain, x = Mlp(), batch()

    assert torch.equal(memtile.tile_rows(copy.deepcopy(plain), rows=2)(x), plain(x))


@pytest.mark.parametrize("lead", [(5,), (3, 5), (2, 3, 4)], ids=str)
def test_a_tile_has_the_rank_of_the_input_and_so_many_rows_at_most(lead):
    """Tiles are (1, …, rows, features), as even as possible, whatever the batch."""
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        return x * 2

    with torch.no_grad():
        memtile.tile_rows(look, rows=4)(batch(*lead))

    sizes = [shape[-2] for shape in seen]
    assert all(shape == (*(1,) * (len(lead) - 1), shape[-2], 13) for shape in seen)
    assert sum(sizes) == torch.Size(lead).numel()
    assert max(sizes) <= 4
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    "of", [lambda x: x.mT.contiguous().mT, lambda x: x[::2, 1:], lambda x: x[:1].expand(4, 5, 13)]
)
def test_inputs_need_not_be_contiguous(of):
    """Transposed, sliced and expanded ones."""
    plain, x = Mlp(), batch(3, 5)
    tiled = memtile.tile_rows(copy.deepcopy(plain), rows=4)

    y, z = tiled(of(x)), plain(of(x))

    assert_close([y, *gradients(y, x)], [z, *gradients(z, x)])


def test_other_arguments_are_cut_where_they_have_the_rows_and_whole_elsewhere():
    """By position and name, in tuples, tensors or not; all with their gradients."""
    weight, x, (scale, shift) = batch(13), batch(3, 5), (batch(3, 5, width=1), batch(3, 5))

    def function(x, pair, *, power, weight, nothing=None):
        scale, mask = pair
        assert scale.shape[:-1] == mask.shape == x.shape[:-1]
        return (functional.linear(x * scale + power["shift"], weight) * mask[..., None]) ** 2

    given = {"power": {"shift": shift}, "weight": weight}
    pair = scale, torch.arange(15).view(3, 5) % 2 == 0
    y = memtile.tile_rows(function, rows=4)(x, pair, **given)
    z = function(x, pair, **given)

    of = (x, scale, shift, weight)
    assert_close([y, *gradients(y, *of)], [z, *gradients(z, *of)])


def test_a_parameter_is_never_cut():
    """Also one that has as many rows as the input."""
    weight, x = nn.Parameter(batch(13).detach()), batch(13)

    assert_close([memtile.tile_rows(functional.linear, rows=4)(x, weight)], [x @ weight.t()])


def test_the_first_tensor_is_cut_whatever_it_is():
    """A learned input is a parameter, and has its gradient."""
    plain, x = Mlp(), nn.Parameter(batch(3, 5).detach())
    tiled = memtile.tile_rows(copy.deepcopy(plain), rows=4)

    assert_close(gradients(tiled(x), x), gradients(plain(x), x))


def test_on_the_meta_device_shapes_are_known():
    """Forward and backward, by rows and by a budget."""
    for size in ({"rows": 4}, {"budget": "10KiB"}):
        tiled = memtile.tile_rows(Mlp().to("meta"), **size)
        y = tiled(batch(3, 5).detach().to("meta"))
        y.sum().backward()

        assert y.shape == (3, 5, 13)
        assert tiled.up.weight.grad.shape == (29, 13)


def test_results_may_be_nested_and_some_need_no_gradient():
    """Tuples and dicts of tensors, None, whole numbers; one of them may go unused."""
    head, x = nn.Linear(13, 7).double(), batch(3, 5)

    def function(x):
        logits = head(x)
        return {"logits": logits, "rest": (logits.argmax(-1), None, logits.logsumexp(-1))}

    found, plain = memtile.tile_rows(function, rows=4)(x), function(x)

    (best, nothing, sums), (expected, _, totals) = found["rest"], plain["rest"]
    assert nothing is None
    assert torch.equal(best, expected)
    assert not best.requires_grad
    of = x, head.weight, head.bias
    assert_close([sums, *gradients(sums, *of)], [totals, *gradients(totals, *of)])
    logits = memtile.tile_rows(function, rows=4)(x)["logits"]
    assert_close(gradients(logits, *of), gradients(function(x)["logits"], *of))


def test_a_module_keeps_its_names_attributes_hooks_and_class():
    """Checkpoints, `isinstance`, attributes, hooks that see whole tensors; `untile` undoes it."""
    plain = nn.Sequential(Mlp())
    model, seen = copy.deepcopy(plain), []
    inner = model[0]
    inner.register_forward_hook(lambda module, given, result: seen.append(result.shape))
    returned = memtile.tile_rows(inner, rows=4)

    model(batch(3, 5))

    assert returned is inner is model[0]
    assert isinstance(inner, Mlp)
    assert seen == [(3, 5, 13)]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_modules()] == [
        name for name, _ in plain.named_modules()
    ]
    assert model.load_state_dict(plain.state_dict()).missing_keys == []
    assert "rows=4" in repr(inner)
    memtile.tile_rows(inner, budget="1MiB")
    assert "1.00 MiB" in repr(inner)
    memtile.untile(model)
    assert type(inner) is Mlp
    assert not hasattr(inner, "row_tiling")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_run_over_row_tiles(copied):
    """With the same class and size."""
    tiled, x = memtile.tile_rows(Mlp(), rows=4), batch(3, 5)

    again = copied(tiled)

    assert type(again) is type(tiled)
    assert isinstance(again, RowTiled)
    assert str(again.row_tiling) == "rows=4"
    assert torch.equal(again(x), tiled(x))


@pytest.mark.parametrize("tiled_first", [True, False])
def test_linears_inside_become_tiles_before_or_after(tiled_first):
    """`tile` replaces them, and `untile` brings them back."""
    plain, x = Mlp(), batch(3, 5)
    model = nn.Sequential(copy.deepcopy(plain))
    if tiled_first:
        memtile.tile(model, out_splits=3, in_splits=2)
    memtile.tile_rows(model[0], rows=4)
    if not tiled_first:
        memtile.tile(model, out_splits=3, in_splits=2)

    assert isinstance(model[0].up, memtile.TiledLinear)
    y, z = model(x), plain(x)
    assert_close([y, *gradients(y, x)], [z, *gradients(z, x)])
    memtile.untile(model)
    of = gradients(plain(x), *plain.parameters())
    assert_close(gradients(model(x), *model.parameters()), of)


def test_nothing_is_recorded_without_gradients():
    """Under no_grad, in inference mode, and where nothing needs a gradient."""
    tiled, x = memtile.tile_rows(Mlp(), rows=4), batch(3, 5)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert not tiled(x).requires_grad

    assert not tiled.requires_grad_(False)(x.detach()).requires_grad


def test_memory_is_that_of_the_formula():
    """3HI + 2NH + 6NI/r + HI elements beyond weights and input (r tiles), within a tenth."""
    hidden, inner, rows, tiles = 256, 1024, 1024, 8
    mlp = Mlp(hidden, inner).float()
    mlp.norm, mlp.down.bias = nn.Identity(), None
    tiled, x = (
        memtile.tile_rows(mlp, rows=rows // tiles),
        torch.randn(rows, hidden).requires_grad_(),
    )
    seed = torch.randn(rows, hidden)

    peak = peak_allocated_bytes(lambda: tiled(x).backward(seed))

    weights, activations = hidden * inner, rows * inner // tiles
    assert peak <= 1.1 * 4 * (4 * weights + 2 * rows * hidden + 6 * activations)


@pytest.mark.parametrize("grad", [True, False])
def test_a_budget_is_kept_and_used(grad):
    """Tiles as large as fit: their activations take at most the budget, and half of it at least."""
    budget, seen = 1 << 20, []
    mlp = Mlp(32, 256).float().requires_grad_(grad)
    mlp.norm.register_forward_hook(lambda module, given, y: seen.append(y.shape[-2]))
    tiled, x = memtile.tile_rows(mlp, budget=budget), torch.randn(2, 1024, 32)
    with torch.set_grad_enabled(grad):
        before = torch.get_rng_state()
        tiled(x)
        assert torch.equal(torch.get_rng_state(), before)
        seen.clear()
        y = tiled(x)
    rows = max(seen)

    def once() -> None:
        given = x.view(-1, 32)[:rows].requires_grad_(grad)
        with torch.set_grad_enabled(grad):
            found = Mlp.forward(mlp, given)
            if grad:
                torch.autograd.grad(found, given, torch.ones_like(found))

    assert y.shape == x.shape
    assert budget // 2 <= peak_allocated_bytes(once) <= budget


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "give one of them"),
        ({"rows": 1, "budget": 1}, "give one of them"),
        ({"rows": 0}, "rows=0"),
        ({"rows": True}, "rows=True"),
        ({"budget": "much"}, "budget 'much'"),
    ],
)
def test_sizes_are_checked(options, told):
    """One of rows and budget, a number or a size."""
    with pytest.raises(ArgumentError, match=told):
        memtile.tile_rows(Mlp(), **options)


@pytest.mark.parametrize("rows", [0, 1])
def test_a_call_that_cannot_be_measured_says_nothing_of_the_next_one(rows):
    """The next calls are not left with tiles of one row."""
    tiled = memtile.tile_rows(Mlp(), budget="100KiB")
    tiled(batch(rows))
    calls = []
    tiled.up.register_forward_hook(lambda *_: calls.append(1))
    tiled(batch(3, 5))

    assert len(calls) <= 3  # two are to measure


def test_a_budget_below_a_row_says_what_a_row_takes():
    """Instead of a tile of no rows."""
    with pytest.raises(BudgetError, match=r"Mlp: a row takes \d.*budget= is 100 B"):
        memtile.tile_rows(Mlp(), budget=100)(batch(3, 5))


@pytest.mark.parametrize("given", [3, nn.Linear])
def test_only_modules_and_functions_are_taken(given):
    """No classes."""
    with pytest.raises(ArgumentError, match="neither a module nor a function"):
        memtile.tile_rows(given, rows=1)


def test_a_list_of_modules_is_refused():
    """It has no forward; its modules are what is called."""
    with pytest.raises(ArgumentError, match="ModuleList has no forward; call tile_rows for each"):
        memtile.tile_rows(nn.ModuleList([Mlp()]), rows=1)


def test_a_forward_on_the_instance_is_refused():
    """It would hide the one of the class."""
    mlp = Mlp()
    mlp.forward = lambda x: x
    with pytest.raises(ArgumentError, match="forward of its own on the instance"):
        memtile.tile_rows(mlp, rows=1)


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (lambda x: x.sum(), r"it gave \(\) for a tile of 4 rows"),
        (lambda x: x.mean(-2), r"it gave \(1, 13\)"),
        (lambda x: x + torch.zeros(3, 1, 13), r"it gave \(3, 4, 13\)"),
        (lambda x: (x, 3), "it gave a int"),
        (lambda x: (x,) * x.shape[-2], "alike for all rows"),
        (lambda x: x[..., : int(x[0, 0, 0] * 0) + x.shape[-2]], "alike for all rows"),
    ],
)
def test_results_without_the_rows_of_the_tile_are_refused(function, told):
    """Means over rows, what is broadcast over a batch, what is no tensor, changing widths."""
    with pytest.raises(RowTilesError, match=told):
        memtile.tile_rows(function, rows=4)(batch(3, 5))


def test_batch_norm_in_training_is_refused_and_taken_in_evaluation():
    """Its statistics are over rows, and it writes to its buffers."""
    norm = nn.BatchNorm1d(13).double()
    tiled, x = memtile.tile_rows(nn.Sequential(norm), rows=4), batch(9)
    with pytest.raises(RowTilesError, match=r"buffer 0\.num_batches"):
        tiled(x)

    assert_close([tiled.eval()(x)], [norm(x)])


def test_a_tensor_that_was_computed_before_is_refused_unless_it_is_an_argument():
    """Its gradient could not be given to it."""
    raw, x = batch(7), batch(3, 5)
    weight = raw.tanh()
    with pytest.raises(RowTilesError, match="computed before the call, by TanhBackward0"):
        memtile.tile_rows(lambda x: functional.linear(x, weight), rows=4)(x)

    y = memtile.tile_rows(functional.linear, rows=4)(x, weight)
    assert_close(gradients(y, raw), gradients(functional.linear(x, raw.tanh()), raw))


def test_a_slice_of_a_sequence_runs_as_a_whole():
    """`nn.Sequential` makes slices by calling its own class."""
    tiled = memtile.tile_rows(nn.Sequential(Mlp(), nn.Tanh()), rows=4)
    plain, x = copy.deepcopy(tiled[0]), batch(3, 5)

    assert type(tiled[:1]) is nn.Sequential
    assert_close([tiled[:1](x)], [plain(x)])


def test_a_method_may_be_tiled_in_the_body_of_its_class():
    """It is called with its instance, whose parameters are trained."""

    class Tiled(Mlp):
        forward = memtile.tile_rows(Mlp.forward, rows=4)

    plain, x = Mlp(), batch(3, 5)
    tiled = Tiled()
    tiled.load_state_dict(plain.state_dict())

    of = ((tiled(x), *tiled.parameters()), (plain(x), *plain.parameters()))
    assert_close(*(gradients(y, x, *parameters) for y, *parameters in of))


def test_a_tiled_layer_that_runs_over_row_tiles_is_untiled():
    """Both changes of it are undone."""
    layer = memtile.TiledLinear(13, 7, out_splits=2, dtype=torch.float64)
    model, x = nn.Sequential(memtile.tile_rows(layer, rows=4)), batch(3, 5)
    y = model(x)

    memtile.untile(model)
    assert type(model[0]) is nn.Linear
    assert_close([model(x)], [y])


def test_parameters_that_are_replaced_before_backward_are_found():
    """Those of forward would get no gradient, silently."""
    tiled = memtile.tile_rows(Mlp(), rows=4)
    others = {name: each.detach().requires_grad_() for name, each in tiled.named_parameters()}
    y = torch.func.functional_call(tiled, others, batch(3, 5))

    with pytest.raises(RowTilesError, match="its parameters were replaced between its forward"):
        y.sum().backward()


def test_weights_that_change_before_backward_are_found():
    """Backward would compute with others than forward did."""
    tiled = memtile.tile_rows(Mlp(), rows=4)
    y = tiled(batch(3, 5))
    with torch.no_grad():
        tiled.up.weight.mul_(2)

    with pytest.raises(RowTilesError, match=r"parameter of shape \(29, 13\) was modified"):
        y.sum().backward()
