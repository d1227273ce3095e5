"""Row tiles under what training does: dropout, autocast, hooks, checkpoints, compilers."""

import copy
from collections import Counter

import pytest
import torch
from row_models import Mlp, assert_close, batch, gradients
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import memtile
from memtile.testing import assert_as_accurate


def pair(rows: int = 4) -> tuple[Mlp, Mlp]:
    """A module, and the same over row tiles."""
    plain = Mlp()
    return plain, memtile.tile_rows(copy.deepcopy(plain), rows=rows)


def test_finite_differences_agree_also_of_second_derivatives():
    """By gradcheck and gradgradcheck, of the input and of captured weights."""
    weight, x = batch(5, width=4), batch(2, 3, width=4)
    tiled = memtile.tile_rows(lambda x: torch.tanh(functional.linear(x, weight)), rows=4)

    assert torch.autograd.gradcheck(lambda x, _: tiled(x), (x, weight))
    assert torch.autograd.gradgradcheck(lambda x, _: tiled(x), (x, weight))


def test_dropout_is_the_same_in_backward():
    """Against finite differences with fixed random numbers; and later draws are not disturbed."""
    weight, x = batch(5, width=4), batch(2, 5, width=4)

    def function(x: Tensor) -> Tensor:
        return functional.linear(functional.dropout(x, 0.5).tanh(), weight)

    tiled = memtile.tile_rows(function, rows=3)

    def seeded(x: Tensor, _: Tensor) -> Tensor:
        torch.manual_seed(7)
        return tiled(x)

    assert torch.autograd.gradcheck(seeded, (x, weight))
    assert torch.autograd.gradgradcheck(seeded, (x, weight))
    y = seeded(x, weight)
    before = torch.get_rng_state()
    y.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)
    assert (seeded(x, weight) == tiled(x)).float().mean() < 0.5


def test_weights_are_trained_where_the_input_is_frozen():
    """The output requires grad, and each weight has its gradient."""
    plain, tiled = pair()
    x = batch(3, 5).detach()

    y, z = tiled(x), plain(x)

    assert_close(gradients(y, *tiled.parameters()), gradients(z, *plain.parameters()))


def test_frozen_weights_get_no_gradient():
    """All, or some of them."""
    plain, tiled = pair()
    for model in (plain, tiled):
        model.up.requires_grad_(False)
        model.norm.requires_grad_(False)
        model(batch(3, 5)).square().sum().backward()

    for ours, theirs in zip(tiled.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert theirs.grad is None or torch.allclose(ours.grad, theirs.grad)


def test_a_weight_that_is_not_used_has_no_gradient():
    """As in plain torch: None, not zeros."""
    tiled = memtile.tile_rows(Mlp(), rows=4)
    tiled.other = nn.Linear(3, 3)

    tiled(batch(3, 5)).sum().backward()

    assert tiled.other.weight.grad is None
    assert tiled.up.weight.grad is not None


@pytest.mark.parametrize("cached", [True, False])
def test_autocast_is_the_same_in_backward(cached):
    """All products are in bfloat16 again, gradients are float32, no worse than plain autocast's."""
    plain, tiled = pair(rows=100)
    truth, seen = copy.deepcopy(plain), []
    x, results = batch(2, 320), []
    tiled.down.register_forward_hook(lambda module, given, y: seen.append(y.dtype))
    for model in (tiled.float(), plain.float()):
        given = x.detach().float().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
            y = model(given)
        y.float().square().sum().backward()
        results.append([given.grad, *(p.grad for p in model.parameters())])
    truth(x).square().sum().backward()

    assert seen == [torch.bfloat16] * 14
    for ours, theirs, exact in zip(*results, [x, *truth.parameters()], strict=True):
        assert ours.dtype == torch.float32
        assert_as_accurate(ours, theirs, exact.grad, 1.5)


def test_autocast_may_have_cast_the_weight_before():
    """A cast that autocast keeps from an earlier use is not taken for a computed tensor."""
    weight, x = nn.Parameter(torch.randn(7, 13)), torch.randn(3, 5, 13)
    tiled, found = memtile.tile_rows(lambda x: functional.linear(x, weight), rows=4), []
    for function in (tiled, lambda x: functional.linear(x, weight)):
        weight.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            y = functional.linear(x, weight) + function(x)
        y.sum().backward()
        found.append(weight.grad)

    assert (found[0] - found[1]).norm() <= 1e-2 * found[1].norm()


@pytest.mark.parametrize("tiles", [4, 64])
def test_weight_gradients_of_16_bits_are_added_up_in_float32(tiles):
    """Errors against float64 are at most 1.1 × plain bfloat16's, at any number of tiles."""
    plain = Mlp(64, 128).to(torch.bfloat16)
    tiled, truth = memtile.tile_rows(copy.deepcopy(plain), rows=1024 // tiles), copy.deepcopy(plain)
    x, seed = (torch.randn(1024, 64, dtype=torch.bfloat16) for _ in range(2))
    for model, cast in ((plain, x.dtype), (tiled, x.dtype), (truth.double(), torch.float64)):
        model(x.to(cast)).backward(seed.to(cast))

    for ours, theirs, exact in zip(*(m.parameters() for m in (tiled, plain, truth)), strict=True):
        if ours.dim() > 1:
            assert_as_accurate(ours.grad, theirs.grad, exact.grad, 1.1)


def test_hooks_of_parameters_see_one_whole_gradient():
    """Post-accumulate hooks, of an optimizer say, and tensor hooks, which may change it."""
    plain, tiled = pair()
    called: Counter[str] = Counter()
    tiled.up.weight.register_hook(lambda grad: called.update(["hook"]) or 2 * grad)
    tiled.up.weight.register_post_accumulate_grad_hook(lambda p: called.update(["after"]))
    x = batch(3, 5)
    for model in (plain, tiled):
        model(x).square().sum().backward()

    assert called == {"hook": 1, "after": 1}
    assert_close([tiled.up.weight.grad], [2 * plain.up.weight.grad])
    (second,) = torch.autograd.grad(tiled(x).square().sum(), tiled.up.weight, create_graph=True)
    assert called == {"hook": 2, "after": 1}
    assert_close([second], [tiled.up.weight.grad])


def test_hooks_stay_after_a_backward_that_failed():
    """The exception is the function's, and the next backward is right."""
    plain, tiled = pair()
    called, x = [], batch(3, 5)
    tiled.up.weight.register_hook(lambda grad: called.append(1))
    handle = tiled.down.register_full_backward_hook(lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tiled(x).sum().backward()
    handle.remove()

    assert_close(gradients(tiled(x), *tiled.parameters()), gradients(plain(x), *plain.parameters()))
    assert called == [1]


def test_weights_used_twice_and_outside_are_summed():
    """Two calls, a tie between two modules, and a use without row tiles."""
    found = []
    for tiles in (False, True):
        first, second, x = Mlp(), Mlp(), batch(3, 5)
        second.up.weight = first.up.weight
        if tiles:
            for model in (first, second):
                memtile.tile_rows(model, rows=4)
        y = second(first(first(x))) + (x @ first.up.weight.t()).sum()
        found.append(gradients(y, x, *first.parameters(), *second.parameters()))

    assert_close(*found)


def test_a_graph_may_be_kept_and_used_again():
    """`retain_graph` gives the same again, and without it torch's own error comes."""
    _, tiled = pair()
    x = batch(3, 5)
    y = tiled(x)
    once, again = (torch.autograd.grad(y.sum(), x, retain_graph=keep)[0] for keep in (True, False))

    assert torch.equal(once, again)
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(y.sum(), x)


def test_what_is_not_asked_for_is_neither_computed_nor_touched():
    """`backward(inputs=…)` leaves other gradients alone."""
    plain, tiled = pair()
    x = batch(3, 5)

    tiled(x).sum().backward(inputs=[x, tiled.down.weight])

    expected = torch.autograd.grad(plain(x).sum(), [x, plain.down.weight])
    assert_close([x.grad, tiled.down.weight.grad], expected)
    assert [name for name, p in tiled.named_parameters() if p.grad is not None] == ["down.weight"]


def test_batches_of_gradients():
    """`is_grads_batched`, as in vectorised Jacobians."""
    plain, tiled = pair()
    x = batch(2, 3)
    seeds = torch.randn(4, 2, 3, 13, dtype=torch.float64)

    ours, theirs = (
        torch.autograd.grad(model(x), [x, model.up.weight], seeds, is_grads_batched=True)
        for model in (tiled, plain)
    )

    assert_close(ours, theirs)


def test_a_budget_inside_an_activation_checkpoint():
    """What is measured at the first call is not what the checkpoint recomputes."""
    plain, x = Mlp(), batch(3, 5)
    tiled = memtile.tile_rows(copy.deepcopy(plain), budget="10KiB")

    checkpoint(tiled, x, use_reentrant=False).sum().backward()
    plain(x).sum().backward()

    assert_close(*([p.grad for p in m.parameters()] for m in (tiled, plain)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_inside_an_activation_checkpoint(reentrant):
    """Gradients are right; as the last part of one it is computed only once again."""
    plain, tiled = pair()
    calls, x = [], batch(3, 5)
    tiled.up.register_forward_hook(lambda *given: calls.append(1))

    def block(model: nn.Module, x: Tensor) -> Tensor:
        h = torch.tanh(x)
        return h + model(h)

    y = checkpoint(block, tiled, x, use_reentrant=reentrant)
    z = block(plain, x)
    for each in (y, z):
        each.square().sum().backward()

    assert_close(*([p.grad for p in m.parameters()] for m in (tiled, plain)))
    assert len(calls) == 4 * (3 if reentrant else 2)


def test_row_tiles_inside_row_tiles():
    """The inner ones are of the outer ones' tiles."""
    plain, tiled = pair(rows=2)
    outer, x = memtile.tile_rows(nn.Sequential(tiled, nn.Tanh()), rows=6), batch(3, 5)
    y, z = outer(x), torch.tanh(plain(x))

    ours, theirs = (x, *tiled.parameters()), (x, *plain.parameters())
    assert_close([y, *gradients(y, *ours)], [z, *gradients(z, *theirs)])


@pytest.mark.parametrize("module", [True, False])
def test_it_compiles_into_one_graph(module):
    """`torch.compile(fullgraph=True)`, with gradients of the input and the weights."""
    plain, tiled = pair()
    x = batch(3, 5)
    function = tiled if module else memtile.tile_rows(plain, rows=4).forward
    y = torch.compile(function, fullgraph=True, backend="aot_eager")(x)

    owner = tiled if module else plain
    expected = Mlp()
    z = expected(x)
    ours, theirs = (x, *owner.parameters()), (x, *expected.parameters())
    assert_close([y, *gradients(y, *ours)], [z, *gradients(z, *theirs)])


def test_it_compiles_for_any_number_of_rows():
    """After the second size compilers take the number of rows as any."""
    plain, tiled = pair()
    compiled = torch.compile(tiled, fullgraph=True, backend="aot_eager", dynamic=None)
    for size in (5, 6):
        x = batch(size).detach()
        assert_close([compiled(x)], [plain(x)])


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_transforms_and_export():
    """`vmap`, `grad`, forward-mode and `export` give what the module gives."""
    plain, tiled = pair()
    x = batch(2, 3, 5).detach()

    assert_close([torch.func.vmap(tiled)(x)], [plain(x)])
    assert_close([torch.func.grad(lambda x: tiled(x).sum())(x)], gradients_of_sum(plain, x))
    tangents = [torch.func.jvp(model, (x,), (x,))[1] for model in (tiled, plain)]
    assert_close(tangents[:1], tangents[1:])
    assert_close([torch.export.export(tiled, (x,)).module()(x)], [plain(x)])


def gradients_of_sum(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    return list(torch.autograd.grad(model(x).sum(), x))
