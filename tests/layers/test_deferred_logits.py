"""Deferred logits: no loss computes them, and whatever else uses them finds the dense ones."""

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from leftovers import check_nothing_is_left
from parked_layers import parked_form
from paths import assert_same, dense_gradients, nothing
from torch import Tensor, nn
from torch.nn import functional

import memtile
from memtile import TiledLinear
from memtile.errors import ArgumentError, DeferredLogitsError
from memtile.homes import is_parked
from memtile.layers import DeferredLogits, deferring_head
from memtile.testing import peak_allocated_bytes

nothing_is_left = pytest.fixture(autouse=True)(check_nothing_is_left)
WIDTH, CLASSES = 13, 29


@pytest.fixture(autouse=True)
def defer_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few logits are deferred too."""
    monkeypatch.setattr(deferring_head, "LEAST_LOGITS", 0)


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> None:
    """Computing deferred logits fails."""
    monkeypatch.setattr(DeferredLogits, "computed", nothing_may)


def nothing_may(logits: DeferredLogits) -> Tensor:
    raise AssertionError(f"logits {tuple(logits.shape)} were computed")


def dense_head(dtype: torch.dtype = torch.float64) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, CLASSES, dtype=dtype)


HEADS: dict[str, Callable[[], nn.Module]] = {
    "dense": dense_head,
    "tiled": lambda: TiledLinear.from_linear(dense_head(), out_splits=4, in_splits=2),
    "parked": lambda: parked_form(dense_head(), (4, 1)),
}
each_head = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Hidden states (2, 5, WIDTH) that require grad, and targets, of which some are ignored."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 5, WIDTH, generator=generator, dtype=torch.float64)
    target = torch.randint(CLASSES, (2, 5), generator=generator)
    target[0, 3] = target[1, 0] = -100
    return x.to(dtype).requires_grad_(), target


def softcapped(logits: Tensor) -> Tensor:
    return torch.tanh(logits * 0.5 / 3.0) * 3


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "as they are": lambda logits: logits,
    "scaled": lambda logits: 2 * logits / 8.0,
    "soft cap": softcapped,
    "tanh": torch.tanh,
    "casts": lambda logits: logits.double().to(torch.float64).contiguous(),
}


@each_head
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_a_loss_computes_none(never: None, head: Any, form: Callable[[Tensor], Tensor]):
    """Whatever models do between head and loss, value and gradients are the dense ones."""
    deferring, dense = memtile.defer_logits(head()), dense_head()
    (x, target), theirs = batch(), batch()[0]
    loss = loss_of(form(deferring(x)), target)
    truth = loss_of(form(dense(theirs)), target)
    loss.backward()
    truth.backward()

    assert_same(loss, truth)
    assert_same(x.grad, theirs.grad)
    for ours, own in zip(dense_gradients(deferring), dense.parameters(), strict=True):
        assert_same(ours, own.grad)


def loss_of(logits: Tensor, target: Tensor) -> Tensor:
    """The mean loss of the next token, which loses the last one's logits."""
    flat = logits[..., :-1, :].contiguous().view(-1, logits.size(-1))
    return functional.cross_entropy(flat, target[..., 1:].reshape(-1))


def test_the_options_of_cross_entropy(never: None):
    """Reductions, smoothing, class weights, probabilities and the module."""
    head, dense, (x, target) = memtile.defer_logits(dense_head()), dense_head(), batch()
    target, weight = target.flatten(), torch.rand(CLASSES, dtype=torch.float64)
    options: list[dict[str, Any]] = [{"reduction": "sum"}, {"reduction": "none"}]
    options += [{"label_smoothing": 0.1}, {"weight": weight}, {"ignore_index": 7}]
    for each in options:
        kept = target.clamp(min=0) if "ignore_index" in each else target
        found = functional.cross_entropy(head(x).flatten(0, 1), kept, **each)
        assert_same(found, functional.cross_entropy(dense(x).flatten(0, 1), kept, **each))
    module = nn.CrossEntropyLoss(ignore_index=-100)
    shares = torch.rand(10, CLASSES, dtype=torch.float64)
    for aim in (target, shares):
        found = module(head(x).reshape(-1, CLASSES), aim)
        assert_same(found, module(dense(x).flatten(0, 1), aim))


@pytest.mark.parametrize("index", [torch.arange(10).view(2, 5) % 3 > 0, torch.tensor([1, 0, 1])])
def test_selected_rows(never: None, index: Tensor):
    """Tokens that have a target, of all sequences, or some sequences; the mask may change then."""
    (x, target), theirs = batch(), batch()[0]
    head, dense = memtile.defer_logits(dense_head()), dense_head()
    aim = target.clamp(min=0)[index].flatten()
    truth = functional.cross_entropy(dense(theirs)[index].reshape(-1, CLASSES), aim)
    mask = index.clone()
    logits = head(x)[mask]
    mask.zero_()
    loss = functional.cross_entropy(logits.reshape(-1, CLASSES), aim)
    loss.backward()
    truth.backward()

    assert_same(loss, truth)
    assert_same(x.grad, theirs.grad)


@pytest.mark.parametrize(
    "index",
    [
        torch.arange(10 * CLASSES).view(2, 5, CLASSES) % 3 > 0,
        torch.tensor([True, False, True]),  # of the wrong size: an error of torch's
        torch.tensor(True),
        torch.tensor([[1], [0]], dtype=torch.uint8),
        (torch.tensor([0, 1]), torch.tensor([2, 3])),
    ],
)
def test_other_selections_are_those_of_logits(index: Any):
    """Values are computed, also for an error."""
    head, x = memtile.defer_logits(dense_head()), batch()[0]
    truth = dense_head()(x)
    try:
        expected = truth[index]
    except IndexError as error:
        with pytest.raises(IndexError, match=re.escape(str(error))):
            head(x)[index]
    else:
        assert_same(head(x)[index] + 0, expected)


def test_what_takes_values_of_logits_in_a_loss():
    """Older reductions, and classes in another dimension than the last."""
    head, dense, (x, target) = memtile.defer_logits(dense_head()), dense_head(), batch()
    with pytest.warns(UserWarning, match="size_average"):
        found = functional.cross_entropy(head(x).flatten(0, 1), target.flatten(), reduce=False)
    assert_same(found, functional.cross_entropy(dense(x).mT, target, reduction="none").flatten())
    assert_same(
        functional.cross_entropy(head(x).mT, target), functional.cross_entropy(dense(x).mT, target)
    )
    twice = torch.tanh(torch.tanh(head(x))).flatten(0, 1)
    assert_same(
        functional.cross_entropy(twice, target.flatten()),
        functional.cross_entropy(dense(x).tanh().tanh().mT, target),
    )


USES: dict[str, Callable[[Tensor], Any]] = {
    "sum": torch.sum,
    "softmax": lambda logits: functional.log_softmax(logits, dim=-1),
    "a token": lambda logits: logits[:, -1],
    "some classes": lambda logits: logits[..., 3:7],
    "a mask": lambda logits: logits[torch.tensor([[True] * 4 + [False]] * 2)],
    "rows": lambda logits: logits[1:, ::2].reshape(-1, CLASSES) + 0,
    "a sum with a tensor": lambda logits: torch.ones(CLASSES).double() + logits,
    "a product with a tensor": lambda logits: logits * torch.arange(CLASSES),
    "concatenated": lambda logits: torch.cat([logits, logits]),
    "numbers": lambda logits: torch.tensor(logits.tolist()),
    "numpy": lambda logits: torch.from_numpy(logits.detach().numpy()),
    "pickled": lambda logits: pickle.loads(pickle.dumps(logits.detach())),
    "copied": lambda logits: copy.deepcopy(logits.detach()),
    "another shape": lambda logits: logits.view(-1, CLASSES * 5),
    "transposed": lambda logits: logits.transpose(1, 2),
    "an integer power": lambda logits: logits**2,
    "divided": lambda logits: 1 / logits,
    "device": lambda logits: logits.to("cpu"),
    "half": lambda logits: (logits.half() / 3).double(),
}


@each_head
@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_any_other_use_finds_the_dense_logits(head: Any, use: Callable[[Tensor], Any]):
    """The same values, of ordinary tensors, and the same gradients."""
    deferring, dense, (x, _) = memtile.defer_logits(head()), dense_head(), batch()
    logits, theirs = deferring(x), batch()[0]
    assert type(logits) is DeferredLogits

    found, truth = use(logits) + 0, use(dense(theirs)) + 0

    assert type(found) is Tensor
    assert_same(found, truth)
    assert found.requires_grad == truth.requires_grad
    if found.requires_grad:
        found.sum().backward()
        truth.sum().backward()
        assert_same(x.grad, theirs.grad)


def test_they_look_like_the_dense_logits(never: None):
    """Shape, dtype, device, requires_grad, without computing them; also without gradients."""
    head, dense, (x, _) = memtile.defer_logits(dense_head()), dense_head(), batch()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            logits, truth = head(x), dense(x)
        for name in ("shape", "dtype", "device", "requires_grad", "ndim"):
            assert getattr(logits, name) == getattr(truth, name)
        assert logits.numel() == truth.numel()
        assert torch.is_floating_point(logits)
        assert logits._base is None  # FSDP2 asks
        assert logits.grad_fn is None  # DDP asks


def test_values_are_computed_once(monkeypatch: pytest.MonkeyPatch):
    """However often they are used, and for what is made of them."""
    head, calls = memtile.defer_logits(dense_head()), []
    now = type(head).now
    monkeypatch.setattr(type(head), "now", lambda *given: calls.append(1) or now(*given))
    logits = head(batch()[0])
    double = logits / 2
    for _ in range(2):
        logits.sum()
        double.sum()

    assert len(calls) == 1


@pytest.mark.parametrize("computes_before", [False, True])
def test_a_hook_of_the_logits_is_called(computes_before: bool):
    """It needs their gradient, so they are computed; also where it is given to rows of them."""
    results = []
    for head in (memtile.defer_logits(dense_head()), dense_head()):
        (x, target), seen = batch(), []
        logits = head(x)
        if computes_before:
            logits.sum()
        rows = logits[:, :-1]
        for each in (logits, rows):
            each.register_hook(lambda grad, seen=seen: seen.append(grad) or 2 * grad)
        functional.cross_entropy(rows.flatten(0, 1), target[:, 1:].flatten()).backward()
        results.append([*seen, x.grad])

    assert len(results[1]) == 3
    for ours, truth in zip(*results, strict=True):
        assert_same(ours, truth)


def test_a_loss_under_autocast_is_float32():
    """As of the dense head, whose logits are bfloat16."""
    head, dense, (x, target) = dense_head(torch.float32), dense_head(torch.float32), batch()
    memtile.defer_logits(head)
    losses = []
    for each in (head, dense):
        with torch.autocast("cpu", torch.bfloat16):
            logits = each(x.float().flatten(0, 1))
            losses.append(functional.cross_entropy(logits, target.flatten()))

    assert losses[0].dtype == losses[1].dtype == torch.float32
    torch.testing.assert_close(*losses, rtol=1e-2, atol=0)


def test_an_engines_hook_waits_for_the_loss(never: None):
    """FSDP2 and ZeRO-3 hook what a model returns; they need no gradient of logits."""
    seen: list[Tensor] = []

    def hook(grad: Tensor) -> Tensor:
        seen.append(grad)
        return 2 * grad

    hook.__module__ = "torch.distributed.fsdp.any"
    head, (x, target) = memtile.defer_logits(dense_head()), batch()
    logits = head(x)
    handles = [logits.register_hook(hook) for _ in range(2)]
    handles[0].remove()
    functional.cross_entropy(logits.flatten(0, 1), target.flatten()).backward()
    dense, theirs = dense_head(), batch()[0]
    functional.cross_entropy(dense(theirs).flatten(0, 1), target.flatten()).backward()

    assert [tuple(each.shape) for each in seen] == [()]
    assert_same(x.grad, 2 * theirs.grad)


def test_what_is_written_reaches_what_shares_memory():
    """As with dense logits: views of them change, copies do not."""
    results = []
    for head in (memtile.defer_logits(dense_head()), dense_head()):
        logits = head(batch()[0])
        flat, last, half = logits.view(-1, CLASSES), logits[:, -1], logits / 2
        logits[:, :, 4] = 7.0
        flat[9].zero_()
        results.append([t.detach() + 0 for t in (logits, flat, last, half)])

    for ours, truth in zip(*results, strict=True):
        assert_same(ours, truth)


def test_autocast_and_gradients_are_those_of_the_heads_call():
    """Values that are computed later, elsewhere, are as if computed at once."""
    head, dense = memtile.defer_logits(dense_head(torch.float32)), dense_head(torch.float32)
    x, target = batch(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logits, truth = head(x), dense(x)
    assert logits.dtype == truth.dtype == torch.bfloat16
    loss = functional.cross_entropy(logits.float().flatten(0, 1), target.flatten())
    expected = functional.cross_entropy(truth.float().flatten(0, 1), target.flatten())
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)  # of rounded logits
    with torch.no_grad():
        assert torch.equal(logits + 0, truth)
        outside = head(x)
    assert logits.requires_grad
    assert not (outside + 0).requires_grad
    assert not functional.cross_entropy(outside.flatten(0, 1), target.flatten()).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert (outside + 0).dtype == torch.float32


@each_head
def test_a_head_that_was_written_to_is_refused(head: Any):
    """Logits and losses would be of other weights; what was computed before stays."""
    deferring, (x, target) = memtile.defer_logits(head()), batch()
    early, late = deferring(x), deferring(x)
    values = early.detach() + 0
    with torch.no_grad():
        next(deferring.parameters()).add_(1)

    assert torch.equal(early, values)
    with pytest.raises(DeferredLogitsError, match="written to since"):
        late.sum()
    with pytest.raises(DeferredLogitsError, match="written to since"):
        functional.cross_entropy(late.flatten(0, 1), target.flatten())


def test_a_head_whose_weight_was_replaced_is_refused():
    """As `torch.func.functional_call` does for a call: as often written to, but another one."""
    deferring, (x, target) = memtile.defer_logits(dense_head()), batch()
    own = dict(deferring.named_parameters())
    others = {name: each.detach().clone() for name, each in own.items()}
    for name, each in others.items():
        while each._version < own[name]._version:
            each.add_(1)
    late = torch.func.functional_call(deferring, others, (x,))

    with pytest.raises(DeferredLogitsError, match="replaced or written to since"):
        functional.cross_entropy(late.flatten(0, -2), target.flatten())


class Function(torch.autograd.Function):
    """The sum, by a function that no subclass of tensors hears of."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.shape = logits.shape
        return logits.sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]  # of one argument
        return gradient.expand(ctx.shape)


def test_an_autograd_function_finds_values_and_never_loses_a_gradient():
    """It is refused in backward, with the way out, which works."""
    head, dense, (x, _) = memtile.defer_logits(dense_head()), dense_head(), batch()
    found = Function.apply(head(x))
    assert_same(found, dense(x).sum())
    with pytest.raises(DeferredLogitsError, match="logits \\+ 0"):
        found.backward()

    Function.apply(head(x) + 0).backward()
    assert x.grad is not None


def test_when_logits_are_computed_at_once(monkeypatch: pytest.MonkeyPatch):
    """Few of them, hooks, a compiled or transformed call, other inputs; and after `False`."""
    head, x = memtile.defer_logits(dense_head()), batch()[0].detach()
    assert type(torch.func.vmap(head)(x)) is Tensor
    assert type(torch.compile(head, backend="eager", fullgraph=True)(x)) is Tensor
    assert type(head(x[0, 0])) is Tensor
    handle = head.register_forward_hook(nothing)
    assert type(head(x)) is Tensor
    handle.remove()
    assert type(head(x)) is DeferredLogits
    monkeypatch.setattr(deferring_head, "LEAST_LOGITS", 10 * CLASSES)
    assert type(head(x)) is Tensor
    assert type(head(torch.cat([x, x]))) is DeferredLogits
    assert type(memtile.defer_logits(head, False)(torch.cat([x, x]))) is Tensor
    assert type(head) is nn.Linear


@each_head
def test_a_deferring_head_is_the_same_module(head: Any):
    """Its state dict; its copies and pickles defer too; `linear_cross_entropy` takes it."""
    plain, deferring = head(), memtile.defer_logits(head())
    assert plain.state_dict().keys() == deferring.state_dict().keys()
    (x, target), copies = batch(), [deferring]
    if not any(map(is_parked, deferring.parameters())):
        copies += [copy.deepcopy(deferring), pickle.loads(pickle.dumps(deferring))]
    for each in copies:
        assert type(each(input=x)) is DeferredLogits
        loss = memtile.linear_cross_entropy(x, each, target)
        assert_same(loss, memtile.linear_cross_entropy(x, plain, target))


def test_heads_that_are_not_known():
    """A model without one, and what is no model, are refused by name."""
    for model in (nn.Embedding(3, 4), nn.Sequential(nn.Linear(3, 4))):
        with pytest.raises(
            ArgumentError, match=r"no head that is known.*defer_logits\(model\.head"
        ):
            memtile.defer_logits(model)
    with pytest.raises(ArgumentError, match="must be an nn"):
        memtile.defer_logits(torch.zeros(3, 4))  # type: ignore[type-var]


def test_tiling_keeps_a_heads_choice():
    """A head that defers still does as tiles; untiled, it is an ordinary linear again."""
    model = nn.Sequential(nn.Linear(13, 13), memtile.defer_logits(nn.Linear(13, 29)))
    memtile.tile(model, out_splits=3)
    x = torch.zeros(2, 13)
    assert type(model[1]) is not TiledLinear
    assert type(model(x)) is DeferredLogits

    memtile.untile(model)
    assert type(model[1]) is nn.Linear


def test_the_memory_of_a_training_step():
    """Less than one copy of the logits, of which plain torch holds three."""
    torch.manual_seed(0)
    x, target = torch.randn(1024, 16).requires_grad_(), torch.randint(16384, (1024,))
    logits_bytes, peaks = 1024 * 16384 * 4, []
    for deferring in (True, False):
        head = memtile.defer_logits(nn.Linear(16, 16384, bias=False), deferring)

        def step(head: nn.Module = head) -> None:
            functional.cross_entropy(head(x), target).backward()

        peaks.append(peak_allocated_bytes(step))

    assert peaks[0] < logits_bytes
    assert peaks[1] > 2 * logits_bytes
