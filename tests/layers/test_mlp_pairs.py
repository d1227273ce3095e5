"""MLPs whose two linears belong to other modules, or stand beside other layers."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from leftovers import check_nothing_is_left
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import memtile
from memtile.convert import select_mlps
from memtile.errors import ArgumentError, DeferredLogitsError
from memtile.layers import mlp_in_tiles, mlp_pairs
from memtile.testing import peak_allocated_bytes

nothing_is_left = pytest.fixture(autouse=True)(check_nothing_is_left)
WIDTH, INNER = 13, 29
Between = Callable[["Block", Tensor], Tensor]


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of each call of `tiled_mlp`, in small blocks."""
    seen: list[dict[str, Any]] = []

    def noted(x: Tensor, *layers: Any, **options: Any) -> Tensor:
        seen.append(options)
        return memtile.tiled_mlp(x, *layers, **options, block_rows=3, block_features=4)

    monkeypatch.setattr(mlp_pairs, "tiled_mlp", noted)
    return seen


class Block(nn.Module):
    """A linear and a norm beside the linears of an MLP, the second of which is in a module."""

    def __init__(self, between: Between, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.up = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, INNER)
        self.out = nn.Sequential(nn.Linear(INNER, WIDTH), nn.LayerNorm(WIDTH))
        self.dropout, self.between = nn.Dropout(dropout), between
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.training:
            self.calls += 1
        x = x + self.first(x)
        y: Tensor = x + self.out(self.dropout(self.between(self, self.up(x))))
        return y


class Straight(torch.autograd.Function):
    """Rounds; its gradient is that of a step that does nothing."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return torch.round(h * 4.0) / 4.0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def gelu(block: Block, h: Tensor) -> Tensor:
    return functional.gelu(h)


def by_hand(block: Block, h: Tensor) -> Tensor:
    return 0.5 * h * (1.0 + torch.tanh(0.8 * (h + 0.045 * torch.pow(h, 3.0))))


def softmax(block: Block, h: Tensor) -> Tensor:
    return h.softmax(-1)


def straight(block: Block, h: Tensor) -> Tensor:
    found: Tensor = Straight.apply(h)
    return found


def nothing(block: Block, h: Tensor) -> Tensor:
    return h


def in_place(block: Block, h: Tensor) -> Tensor:
    functional.relu(h, inplace=True)
    return h


def written_after(block: Block, h: Tensor) -> Tensor:
    g = torch.sigmoid(h)
    h.mul_(2.0)
    return g


def with_residual(block: Block, h: Tensor) -> Tensor:
    return functional.gelu(h) + h.mean()


def cumulated(block: Block, h: Tensor) -> Tensor:
    return h.cumsum(-1)


def by_value(block: Block, h: Tensor) -> Tensor:
    return functional.relu(h) if bool(h.sum() > 0) else functional.gelu(h)


def compared(block: Block, h: Tensor) -> Tensor:
    return torch.where(h > 0, h, 0.1 * h)


def last_rows(block: Block, h: Tensor) -> Tensor:
    h = functional.gelu(h[:, :1])
    return h * float(h.shape[1])


def turned(block: Block, h: Tensor) -> Tensor:
    h = functional.gelu(h).transpose(0, 1)
    return h.transpose(0, 1) * float(h.shape[0])


def flipped(block: Block, h: Tensor) -> Tensor:
    return functional.gelu(h).flip(-3)


def permuted(block: Block, h: Tensor) -> Tensor:
    return functional.gelu(h.permute(0, 1, 2)).expand(-1, -1, -1)


def without_graph(block: Block, h: Tensor) -> Tensor:
    return functional.gelu(h).detach()


def with_mean(block: Block, h: Tensor) -> Tensor:
    return functional.gelu(h).mean(-3, keepdim=True)


def hooked(block: Block, h: Tensor) -> Tensor:
    h = functional.gelu(h)
    if h.requires_grad:
        h.register_hook(lambda grad: grad * 2.0)
    return h


def rolled(block: Block, h: Tensor) -> Tensor:
    return functional.gelu(h).roll(3, 0).roll(INNER, 1)


def lower(block: Block, h: Tensor) -> Tensor:
    return functional.gelu(h).triu(-3)


def first_of_batch(block: Block, h: Tensor) -> Tensor:
    return functional.gelu(h)[:8]


def flattened(block: Block, h: Tensor) -> Tensor:
    return functional.gelu(h.flatten()).view(h.shape)


LEFT = [softmax, straight, nothing, in_place, written_after, with_residual]
LEFT += [cumulated, by_value, compared, flattened, last_rows, turned, flipped, permuted]
LEFT += [without_graph, with_mean, hooked, rolled, lower, first_of_batch]


def step(block: nn.Module, x: Tensor) -> list[Tensor]:
    """Result, the input's gradient and all others."""
    given = x.clone().requires_grad_()
    block.zero_grad()
    y = block(given)
    y.square().sum().backward()
    assert given.grad is not None
    found = [p.grad for p in block.parameters() if p.grad is not None]
    return [y.detach(), given.grad, *found]


def given() -> Tensor:
    return torch.randn(2, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def assert_same(ours: nn.Module, theirs: nn.Module, tolerance: float = 1e-12) -> None:
    for found, truth in zip(step(ours, given()), step(theirs, given()), strict=True):
        torch.testing.assert_close(found, truth, rtol=tolerance, atol=tolerance)


WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "in tiles": {"out_splits": 3, "tile_mlps": True},
    "parked": {"max_tile_bytes": 900, "home": "host", "tile_mlps": True},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("between", [gelu, by_hand])
def test_computes_by_tiles(between: Between, way: str, calls: list[Any]):
    """Also where its linears are tiled later; buffers are not written by the look at it."""
    dense = Block(between).double()
    ours = memtile.tile_mlps(copy.deepcopy(dense))
    assert ours.calls == 0
    if WAYS[way]:
        memtile.tile(ours, **WAYS[way])
        assert str(ours.out[0].grid) in ("1×3", "1×4")
    assert [str(each) for each in select_mlps(ours)] == ["yes : a plain MLP of up and out.0"]

    for found, truth in zip(step(ours, given())[:2], step(dense, given())[:2], strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)
    gradients = memtile.untile(ours).named_parameters()
    for (name, found), truth in zip(gradients, dense.parameters(), strict=True):
        torch.testing.assert_close(found.grad, truth.grad, rtol=1e-12, atol=1e-12, msg=name)
    assert len(calls) == 1


@pytest.mark.parametrize("between", LEFT)
def test_what_is_no_element_wise_activation_is_left_alone(between: Between):
    """`tile_mlps` refuses it."""
    with pytest.raises(ArgumentError, match="has no MLP that can be computed by tiles"):
        memtile.tile_mlps(Block(between))


@pytest.mark.parametrize("between", [each for each in LEFT if each is not straight])
def test_another_activation_later_is_computed_with_values(between: Between, calls: list[Any]):
    """Results and gradients are the dense block's, whatever is done between the linears by then."""
    ours, dense = memtile.tile_mlps(Block(gelu).double()), Block(between).double()
    ours.between = between

    assert_same(ours, dense)
    assert calls == []


def test_an_autograd_function_later_is_refused():
    """Its backward would be lost."""
    ours = memtile.tile_mlps(Block(gelu).double())
    ours.between = straight
    with pytest.raises(
        DeferredLogitsError, match="the gradient of an intermediate activation is asked"
    ):
        step(ours, given())


def test_dropout_and_modes(calls: list[dict[str, Any]]):
    """In training as an option of the tiles, not in evaluation."""
    ours = memtile.tile_mlps(Block(gelu, dropout=0.5))
    x = given().float()
    ours(x)
    ours.eval()
    ours(x)
    assert [each["dropout"] for each in calls] == [0.5, 0.0]
    torch.testing.assert_close(ours(x), Block(gelu).eval()(x))


def test_hooks_adapters_and_other_uses(calls: list[Any]):
    """A hook of a linear sees values; a linear in an adapter's place is called."""
    ours, dense = memtile.tile_mlps(Block(gelu).double()), Block(gelu).double()
    seen: list[Tensor] = []
    handle = ours.up.register_forward_hook(lambda module, args, y: seen.append(y))
    assert_same(ours, dense)
    assert type(seen[0]) is Tensor
    handle.remove()
    handle = ours.out[0].register_forward_pre_hook(lambda module, args: (args[0] * 2.0,))
    truth = copy.deepcopy(dense)
    truth.out[0].register_forward_pre_hook(lambda module, args: (args[0] * 2.0,))
    assert_same(ours, truth)
    handle.remove()
    assert calls == []
    assert_same(ours, dense)
    assert len(calls) == 1


def changes_input(block: Any, x: Tensor) -> Tensor:
    h = block.up(x)
    x.mul_(0.5)
    return block.out(functional.gelu(h))


def without_gradients(block: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = functional.gelu(block.up(x))
    return block.out(h)


def under_autocast(block: Any, x: Tensor) -> Tensor:
    h = functional.gelu(block.up(x))
    with torch.autocast("cpu", torch.bfloat16):
        return block.out(h).to(x.dtype)


def freezes(block: Any, x: Tensor) -> Tensor:
    h = functional.gelu(block.up(x))
    block.up.requires_grad_(False)
    return block.out(h)


def writes_weight(block: Any, x: Tensor) -> Tensor:
    h = functional.gelu(block.up(x))
    with torch.no_grad():
        block.up.weight.mul_(1.0)
    return block.out(h)


class Changed(Block):
    """A block whose forward is another one by now."""

    other: Any = None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.other is None:
            return super().forward(x)
        found: Tensor = self.other(self, x + self.first(x))
        return found


@pytest.mark.parametrize("other", [without_gradients, under_autocast])
def test_another_state_for_each_linear(other: Any, calls: list[Any]):
    """No gradient of what had none, and each linear in the precision that it had."""
    models = [Changed(gelu), Changed(gelu)]
    memtile.tile_mlps(models[0])
    x = given().float()
    found = []
    for model in models:
        model.other = other
        model(x).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    ours, truth = found
    assert [n for n, g in ours.items() if g is None] == [n for n, g in truth.items() if g is None]
    for name, grad in truth.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-5, atol=1e-6)
    assert calls == []


@pytest.mark.parametrize("other", [changes_input, writes_weight, freezes])
def test_writes_between_the_linears_are_refused(other: Any):
    """What the first linear would have given is lost; where it is always so, it is no MLP."""
    ours = memtile.tile_mlps(Changed(gelu))
    ours.other = other
    ours.up.requires_grad_(other is not changes_input)
    with pytest.raises(DeferredLogitsError, match="written to or frozen since"):
        ours(given().float())
    ours = Changed(gelu)
    ours.other = changes_input
    with pytest.raises(ArgumentError, match="has no MLP"):
        memtile.tile_mlps(ours)


def test_what_is_kept_beyond_the_block_has_values(calls: list[Any]):
    """In a result, and in a list that is read after a step."""

    class Keeping(Block):
        kept: Any = None

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
            h = functional.gelu(self.up(x))
            self.kept = h if self.training else None
            return self.out(h), h

    models = [Keeping(gelu).double().eval() for _ in range(2)]
    memtile.tile_mlps(models[0])
    for model in models:
        model.train()
        y, h = model(given())
        assert type(h) is Tensor
        (y.sum() + h.square().sum()).backward()
        with torch.no_grad():
            model.up.weight.zero_()
    assert len(calls) == 1
    torch.testing.assert_close(models[0].kept + 0, models[1].kept, rtol=1e-12, atol=1e-12)
    for ours, truth in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours.grad, truth.grad, rtol=1e-12, atol=1e-12)


def test_hooks_anywhere_in_the_block(calls: list[Any]):
    """Hooks of modules between the linears, of backward too: the block's own forward runs."""
    ours, dense = memtile.tile_mlps(Block(gelu).double()), Block(gelu).double()
    seen: list[Any] = []
    for model in (ours, dense):
        model.out[0].register_full_backward_hook(lambda module, gi, go: seen.append(go[0].norm()))
        model.dropout.register_forward_hook(lambda module, args, y: seen.append(y))
    assert_same(ours, dense)
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    y = ours(given())
    (grad,) = torch.autograd.grad(y.sum(), seen[-1])
    assert grad.abs().sum() > 0
    assert calls == []
    hooked_before = Block(gelu)
    hooked_before.dropout.register_forward_hook(lambda module, args, y: seen.append(None))
    memtile.tile_mlps(hooked_before)
    assert seen[-1] is not None  # the look at the forward calls no hooks


@pytest.mark.parametrize("part", [0.5, 0.001])
def test_dropout_in_other_places_is_left_alone(part: float, calls: list[Any]):
    """Between the linears, or two of them: the second would drop other parts in backward."""

    def first(block: Block, h: Tensor) -> Tensor:
        return functional.gelu(functional.dropout(h, part))

    def by_channels(block: Block, h: Tensor) -> Tensor:
        return functional.dropout1d(functional.gelu(h), part)

    for between in (first, by_channels):
        with pytest.raises(ArgumentError, match="has no MLP"):
            memtile.tile_mlps(Block(between, dropout=0.1))
        ours, dense = memtile.tile_mlps(Block(gelu).double()), Block(between).double()
        ours.between = between
        found = []
        for model in (ours, dense):
            torch.manual_seed(5)
            found.append(step(model, given()))
        for each, truth in zip(*found, strict=True):
            torch.testing.assert_close(each, truth, rtol=1e-12, atol=1e-12)
    assert calls == []


def test_releases_of_torch_that_do_not_tell_of_checkpoints(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch
):
    """Before 2.8: blocks are computed by tiles all the same."""
    monkeypatch.setattr(mlp_pairs, "_top_hooks", None)
    assert_same(memtile.tile_mlps(Block(gelu).double()), Block(gelu).double())
    assert len(calls) == 1


@pytest.mark.skipif(mlp_pairs._top_hooks is None, reason="torch does not tell of checkpoints")
def test_checkpoints_inside_the_block(calls: list[Any]):
    """What is in one is computed again outside of the block: there its own forward runs."""

    class Part(Block):
        def feed(self, x: Tensor) -> Tensor:
            y: Tensor = self.out(functional.gelu(self.up(x)))
            return y

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            y: Tensor = x + checkpoint(self.feed, x + self.first(x), use_reentrant=False)
            return y

    class Twice(nn.Module):
        def __init__(self, block: Block) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = checkpoint(self.block, x, use_reentrant=False)
            return y

    ours = memtile.tile_mlps(Part(gelu).double())
    assert_same(ours, Part(gelu).double())
    assert calls == []
    assert_same(memtile.tile_mlps(Twice(Block(gelu)).double()), Twice(Block(gelu)).double())
    assert len(calls) == 2


def test_hooks_beside_the_linears_do_not_matter(calls: list[Any]):
    """Those of attention, say, which transformers leaves after `output_attentions=True`."""
    ours, dense = memtile.tile_mlps(Block(gelu).double()), Block(gelu).double()
    ours.first.register_forward_hook(lambda module, args, y: None)
    assert_same(ours, dense)
    assert len(calls) == 1


def test_blocks_of_one_class_may_differ():
    """By a flag of one of their modules."""

    class Either(Block):
        def __init__(self, plain: bool) -> None:
            super().__init__(gelu if plain else softmax)
            self.plain = plain

    model = memtile.tile_mlps(nn.Sequential(Either(False), Either(True)))
    taken = [each.name for each in select_mlps(model) if each.taken]
    assert taken == ["1"]


def test_a_linear_that_is_called_apart_gives_values(calls: list[Any]):
    """Outside of its block."""
    ours = memtile.tile_mlps(Block(gelu).double())
    step(ours, given())
    assert type(ours.up(given())) is Tensor
    assert len(calls) == 1


def test_inference_of_few_rows_is_the_block_s_own(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch
):
    """And of many rows by tiles, also in inference mode and under autocast."""
    ours, dense = memtile.tile_mlps(Block(gelu)), Block(gelu)
    x = given().float()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(ours(x), dense(x))
    assert calls == []
    monkeypatch.setattr(mlp_in_tiles, "FEWEST_BYTES", 8)
    for context in (torch.no_grad, torch.inference_mode):
        with context(), torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(ours(x), dense(x), rtol=0.05, atol=0.05)
    assert len(calls) == 1  # nothing counts the writes to tensors of inference mode


def test_copies_and_undoing():
    """`deepcopy`, pickle, `untile`; state dicts and names are as they were."""
    ours, dense = memtile.tile_mlps(Block(gelu).double()), Block(gelu).double()
    assert [*ours.state_dict()] == [*dense.state_dict()]
    for made in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(made) is type(ours)
        assert_same(made, dense)
    for undo in (memtile.untile, lambda model: memtile.tile_mlps(model, False)):
        model = undo(copy.deepcopy(ours))
        assert [type(each) for each in model.modules()] == [type(e) for e in dense.modules()]
        assert vars(model).keys() == vars(dense).keys()


def test_functional_calls_and_compilers():
    """The block's own forward runs."""
    ours, dense = (Block(gelu).double().eval() for _ in range(2))
    memtile.tile_mlps(ours)
    values = {name: p.detach() * 2.0 for name, p in dense.named_parameters()}
    found, truth = (
        torch.func.functional_call(model, values, (given(),)) for model in (ours, dense)
    )
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)
    found, truth = (
        torch.func.grad(lambda v, m=m: torch.func.functional_call(m, v, (given(),)).sum())(values)
        for m in (ours, dense)
    )
    for name, expected in truth.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-12, atol=1e-12)


def test_the_intermediate_activation_is_not_kept(monkeypatch: pytest.MonkeyPatch):
    """A step takes less than half of the memory."""
    monkeypatch.setattr(mlp_pairs, "tiled_mlp", memtile.tiled_mlp)
    peaks = []
    for on in (True, False):
        torch.manual_seed(0)
        block = Block(gelu)
        block.up, block.out[0] = nn.Linear(WIDTH, 1024), nn.Linear(1024, WIDTH)
        memtile.tile_mlps(block, on)
        x = torch.randn(4096, WIDTH, requires_grad=True)
        peaks.append(peak_allocated_bytes(lambda b=block, x=x: b(x).sum().backward()))
    assert peaks[0] < 0.5 * peaks[1]
