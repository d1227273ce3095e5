"""Heads of a loss without logits: weights, tiled and parked layers, modules that must be called."""

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from leftovers import check_nothing_is_left
from parked_layers import HOMES, assert_same_bits, gradients_of, home_called, parked_form
from paths import GRIDS, assert_same, dense_gradients, grid_id, nothing
from torch import Tensor, nn
from torch.nn import functional
from watched_home import WatchedHome

import memtile
from memtile import TiledEmbedding, TiledLinear
from memtile.errors import ArgumentError, ParkedError, TileClassError
from memtile.geometry import Grid
from memtile.homes import allocation_of

nothing_is_left = pytest.fixture(autouse=True)(check_nothing_is_left)
in_every_grid = pytest.mark.parametrize("grid", GRIDS, ids=grid_id)
WIDTH, CLASSES = 13, 29
OPTIONS: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 0.01, "block_rows": 3}


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Hidden states that require grad, and targets, of which some are ignored."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 4, WIDTH, generator=generator, dtype=torch.float64)
    target = torch.randint(CLASSES, (2, 4), generator=generator)
    target[0, 3] = target[1, 0] = -100
    return x.to(dtype).requires_grad_(), target


def dense_head(bias: bool = True, dtype: torch.dtype = torch.float64) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, CLASSES, bias=bias, dtype=dtype)


def dense_loss(dense: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    logits = dense(x)
    loss = functional.cross_entropy(logits.flatten(0, 1), target.flatten(), label_smoothing=0.1)
    return loss + 0.01 * logits.logsumexp(2).square()[target >= 0].mean()


def assert_trains_like(head: Any, dense: nn.Linear) -> None:
    """Loss, and gradients of input, weight and bias, are the dense head's."""
    (x, target), theirs = batch(), batch()[0]
    loss = memtile.linear_cross_entropy(x, head, target, **OPTIONS)
    truth = dense_loss(dense, theirs, target)

    loss.backward()
    truth.backward()

    assert_same(loss, truth)
    assert_same(x.grad, theirs.grad)
    for ours, own in zip(dense_gradients(head), dense.parameters(), strict=True):
        assert_same(ours, own.grad)


def hooked(layer: TiledLinear) -> TiledLinear:
    for _, tile in layer.tiles():
        tile.register_forward_hook(nothing)
    return layer


def hooked_as_a_whole(layer: TiledLinear) -> TiledLinear:
    layer.register_forward_hook(nothing)
    return layer


class Subclass(TiledLinear):
    """A subclass of a user's: it may do anything in its forward."""


def as_subclass(layer: TiledLinear) -> TiledLinear:
    layer.__class__ = Subclass
    return layer


def sharing_its_bias(layer: TiledLinear) -> TiledLinear:
    bias = nn.Parameter(torch.as_tensor(layer.bias + 0).detach())
    for _, tile in layer.tiles():
        tile.bias = None
    layer.keep_bias(bias)
    return layer


@in_every_grid
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("home", [None, *HOMES])
def test_tiled_heads_train_like_the_dense_one(grid: Any, home: str | None, bias: bool):
    """In every grid, resident and in every home, loss and gradients in float64."""
    dense = dense_head(bias)
    if home is None:
        assert_trains_like(TiledLinear.from_dense(dense, Grid.uniform(29, 13, *grid)), dense)
    else:
        assert_trains_like(parked_form(dense, grid, home), dense)


@in_every_grid
@pytest.mark.parametrize("change", [hooked, hooked_as_a_whole, as_subclass, sharing_its_bias])
def test_heads_that_are_more_than_their_weights(grid: Any, change: Callable[..., Any]):
    """Tiles or layers with hooks, subclasses and shared biases are called, and train as well."""
    dense = dense_head()
    assert_trains_like(change(TiledLinear.from_dense(dense, Grid.uniform(29, 13, *grid))), dense)
    assert_trains_like(change(parked_form(dense_head(), grid)), dense_head())


def test_dense_modules_and_handles():
    """A linear, an embedding, another module, and what `.weight` of a tiled layer gives."""
    dense, (x, target) = dense_head(bias=False), batch()
    truth = dense_loss(dense, x, target)
    tiled = TiledLinear.from_linear(dense, out_splits=4)
    embedding = nn.Embedding(CLASSES, WIDTH, _weight=dense.weight)
    wrapped = nn.Sequential(dense)
    wrapped.out_features = CLASSES
    for head in (dense, embedding, wrapped, tiled, tiled.weight, parked_form(dense, (3, 1)).weight):
        assert_same(memtile.linear_cross_entropy(x, head, target, **OPTIONS), truth)
    whole = torch.zeros(CLASSES, dtype=torch.float64, requires_grad=True)
    loss = memtile.linear_cross_entropy(x, tiled, target, linear_bias=whole, **OPTIONS)
    loss.backward()

    assert_same(loss, truth)
    assert whole.grad.any()


@pytest.mark.parametrize("called", [False, True])
def test_tokens_of_a_tiled_head(called: bool):
    """Log-probabilities and entropy over several tiles, plain or called."""
    dense, (x, target) = dense_head(), batch()
    head = TiledLinear.from_linear(dense, out_splits=4)
    head = hooked(head) if called else head
    logs = dense(x).log_softmax(2)
    truth = logs.gather(2, target.clamp(min=0)[..., None])[..., 0].where(target >= 0, 0.0)

    found = memtile.token_log_probabilities(x, head, target)

    assert_same(found.log_probabilities, truth)
    assert_same(found.entropy, -(logs.exp() * logs).sum(2))
    both = torch.autograd.grad(found.entropy.square().sum(), x, retain_graph=True)
    expected = torch.autograd.grad((logs.exp() * logs).sum(2).square().sum(), x)
    assert_same(both[0], expected[0])


def test_homes_agree_bit_for_bit():
    """float32 and bfloat16: resident or in any home, the same bits, gradients at home included."""
    for dtype in (torch.float32, torch.bfloat16):
        results = []
        for home in (None, *HOMES):
            dense, (x, target) = dense_head(dtype=dtype), batch(dtype)
            head = parked_form(dense, (4, 1), home) if home else None
            head = head or TiledLinear.from_linear(dense, out_splits=4)
            for _ in range(2):
                loss = memtile.linear_cross_entropy(x, head, target, **OPTIONS)
                loss.backward()
            results.append({"loss": loss.detach(), "x": x.grad, **gradients_of(head)})
            if home == "disk":
                assert allocation_of(head.tile(0, 0).weight.grad) is not None

        assert all(found.keys() == results[0].keys() for found in results)
        for found in results[1:]:
            assert_same_bits(found, results[0])


def test_a_parked_tile_is_read_once_in_forward_and_once_in_backward():
    """Whatever the blocks; frozen tiles too, for the input's gradient."""
    for trained in (True, False):
        home = WatchedHome()
        head = TiledLinear(WIDTH, CLASSES, out_splits=7, home=home, dtype=torch.float64)
        head.requires_grad_(trained)
        x, target = batch()
        loss = memtile.linear_cross_entropy(x, head, target, block_rows=1, block_classes=1)
        forward = len(home.labels())
        loss.backward()

        assert forward == 7
        assert 7 - 3 <= len(home.labels()) - forward <= 7  # those of the turn are still in slabs
        home.close()


def test_gradients_go_one_after_another():
    """A hook that takes each tile's gradient is called once for each, and finds no other."""
    for head in (TiledLinear(WIDTH, CLASSES, out_splits=4), parked_form(dense_head(), (4, 1))):
        seen, reference = [], weakref.ref(head)  # hooks that keep their layer are never collected

        def take(parameter: Tensor, seen: list[int] = seen, layer: Any = reference) -> None:
            seen.append(sum(tile.weight.grad is not None for _, tile in layer().tiles()))
            parameter.grad = None

        for _, tile in head.tiles():
            tile.weight.register_post_accumulate_grad_hook(take)
        x, target = batch(head.tile(0, 0).weight.dtype)
        memtile.linear_cross_entropy(x, head, target).backward()

        assert seen == [1, 1, 1, 1]


def test_who_asks_for_gradients():
    """`backward(inputs=…)` leaves the tiles alone; `autograd.grad` gives theirs, writes none."""
    dense, head = dense_head(), parked_form(dense_head(), (3, 1))
    x, target = batch()
    memtile.linear_cross_entropy(x, head, target, **OPTIONS).backward(inputs=[x])
    assert all(p.grad is None for p in head.parameters())
    truth = torch.autograd.grad(dense_loss(dense, x, target), (x, dense.weight))
    assert_same(x.grad, truth[0])

    weights = [tile.weight for _, tile in head.tiles()]
    loss = memtile.linear_cross_entropy(x, head, target, **OPTIONS)
    found = torch.autograd.grad(loss, weights, create_graph=True)

    assert_same(torch.cat(found), truth[1])
    assert all(p.grad is None for p in head.parameters())


def test_a_tile_that_is_written_to_before_backward_is_refused():
    """As by every parked layer: gradients would be of other values. A new pass is right."""
    head = parked_form(dense_head(), (3, 1))
    x, target = batch()
    loss = memtile.linear_cross_entropy(x, head, target)
    with torch.no_grad():
        head.tile(1, 0).weight.mul_(2)

    with pytest.raises(ParkedError, match="modified between its forward"):
        loss.backward()

    memtile.linear_cross_entropy(x, head, target).backward()
    assert all(p.grad is not None for p in head.parameters())


class Tied(nn.Module):
    """An embedding, and a head with the same weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(CLASSES, WIDTH, dtype=torch.float64)
        self.head = nn.Linear(WIDTH, CLASSES, bias=False, dtype=torch.float64)
        self.head.weight = self.embedding.weight

    def loss(self, ids: Tensor, whole: bool, by_embedding: bool = False) -> Tensor:
        """The next id of each id."""
        x, target = torch.tanh(self.embedding(ids[:-1])), ids[1:]
        if whole:
            return functional.cross_entropy(self.head(x), target)
        head = self.embedding if by_embedding else self.head
        return memtile.linear_cross_entropy(x, head, target)


@pytest.mark.parametrize("by_embedding", [False, True])
@pytest.mark.parametrize("home", [None, *HOMES])
def test_a_tied_weight_gets_the_gradients_of_both_uses(home: str | None, by_embedding: bool):
    """Dense, tiled and parked, given as head or as embedding; stepped in backward too."""
    ids, dense = torch.tensor([3, 7, 7, 0, 22, 28, 3]), Tied()
    dense.loss(ids, whole=True).backward()
    same = copy.deepcopy(dense)
    same.zero_grad()
    same.loss(ids, whole=False, by_embedding=by_embedding).backward()
    assert_same(same.embedding.weight.grad, dense.embedding.weight.grad)

    models = [Tied() for _ in range(2)]
    parked: Any = {} if home is None else {"home": home_called(home)}
    tiled = [memtile.tile(model, out_splits=4, **parked) for model in models]
    assert isinstance(tiled[0].embedding, TiledEmbedding)
    tiled[0].loss(ids, whole=False, by_embedding=by_embedding).backward()
    assert_same(tiled[0].embedding.weight.grad + 0, dense.embedding.weight.grad)

    optimizer = memtile.TileOptimizer(tiled[1], torch.optim.SGD, lr=0.5, mode="in_backward")
    tiled[1].loss(ids, whole=False, by_embedding=by_embedding).backward()
    optimizer.step()
    stepped = dense.embedding.weight - 0.5 * dense.embedding.weight.grad
    assert_same(tiled[1].embedding.weight + 0, stepped)


def test_what_cannot_be_a_head_says_why():
    """Modules of other shapes, two biases, an embedding that would have to be called."""
    x, target = batch()
    tupled = nn.Sequential(nn.Identity())
    tupled.out_features = CLASSES
    with pytest.raises(TileClassError, match=r"must return a tensor \(8, 29\)"):
        memtile.linear_cross_entropy(x, tupled, target)
    bias = torch.zeros(CLASSES, dtype=torch.float64)
    with pytest.raises(ArgumentError, match="has a bias already"):
        memtile.linear_cross_entropy(x, dense_head(), target, linear_bias=bias)
    with pytest.raises(ArgumentError, match="the head's own bias"):
        memtile.linear_cross_entropy(x, tupled, target, linear_bias=bias)
    embedding = nn.Embedding(CLASSES, WIDTH)
    embedding.register_forward_hook(nothing)
    with pytest.raises(ArgumentError, match="the head that is tied to it"):
        memtile.linear_cross_entropy(x, embedding, target)
