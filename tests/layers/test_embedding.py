"""The tiled embedding is the dense one bit for bit, and shares its tiles with a head."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from memtile import TiledEmbedding, TiledLinear
from memtile.errors import (
    ArgumentError,
    HandleError,
    SplitsError,
    TileClassError,
    TileDeviceError,
    TileDtypeError,
    TileIndexError,
)

ROWS, WIDTH = 23, 6
SPLITS = [1, 2, 5, 23]
IDS = torch.tensor([[0, 22, 5, 2], [7, 7, 11, 2]])


def pair(splits: int, **options: object) -> tuple[nn.Embedding, TiledEmbedding]:
    """A seeded dense embedding and its tiled form."""
    torch.manual_seed(0)
    dense = nn.Embedding(ROWS, WIDTH, **options)  # type: ignore[arg-type]
    return dense, TiledEmbedding.from_embedding(dense, out_splits=splits)


@pytest.mark.parametrize("ids", [IDS, IDS[0, 1], IDS[:, :0], IDS.int(), IDS.t()], ids=str)
@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("frozen", [False, True])
def test_lookup_is_the_dense_one_bit_for_bit(splits: int, ids: Tensor, frozen: bool) -> None:
    """Any shape of ids, with and without gradients, gives the dense rows."""
    dense, tiled = pair(splits)
    tiled.requires_grad_(not frozen)

    assert torch.equal(tiled(ids), dense(ids))


@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}, {"scale_grad_by_freq": True}], ids=str)
@pytest.mark.parametrize("splits", SPLITS)
def test_gradients_are_the_dense_ones_bit_for_bit(splits: int, options: dict[str, object]) -> None:
    """Each tile's gradient is its rows of the dense one; untouched tiles get zeros, not None."""
    dense, tiled = pair(splits, **options)
    factor = torch.randn(2, 4, WIDTH)

    (dense(IDS) * factor).sum().backward()
    (tiled(IDS) * factor).sum().backward()

    assert all(tile.weight.grad is not None for _, tile in tiled.tiles())
    assert torch.equal(tiled.weight.grad, dense.weight.grad)


def test_second_derivatives_of_a_lookup() -> None:
    """gradcheck and gradgradcheck of what follows a lookup, in float64."""
    _, tiled = pair(5, dtype=torch.float64)
    names = [name for name, _ in tiled.named_parameters()]

    def call(*weights: Tensor) -> Tensor:
        swapped = dict(zip(names, weights, strict=True))
        rows: Tensor = torch.func.functional_call(tiled, swapped, (IDS,))
        return rows.square()

    assert torch.autograd.gradcheck(call, tuple(tiled.parameters()))
    assert torch.autograd.gradgradcheck(call, tuple(tiled.parameters()))


@pytest.mark.parametrize("padding", [0, 22, -1, -23, 9])
@pytest.mark.parametrize("splits", SPLITS)
def test_the_padding_row_is_where_it_was_and_starts_at_zero(splits: int, padding: int) -> None:
    """padding_idx, counted from either end, lies in one tile, gets no gradient, starts at zero."""
    tiled = TiledEmbedding(ROWS, WIDTH, padding_idx=padding, out_splits=splits)
    tiled(torch.tensor([padding % ROWS, 3])).sum().backward()

    assert tiled.padding_idx == padding % ROWS
    assert [tile.padding_idx for _, tile in tiled.tiles()].count(None) == splits - 1
    assert tiled.weight[padding].eq(0).all()
    assert tiled.weight.grad[padding].eq(0).all()
    assert tiled.to_embedding().padding_idx == padding % ROWS


def test_starting_values_are_the_dense_ones() -> None:
    """Rows are drawn from nn.Embedding's distribution, tile by tile."""
    torch.manual_seed(0)
    tiled = TiledEmbedding(4096, 24, out_splits=7)

    values = tiled.weight.detach()

    assert abs(values.mean()) < 0.02
    assert abs(values.std() - 1) < 0.02


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_norm": 1.0}, ArgumentError, "max_norm=1.0 is not supported"),
        ({"sparse": True}, ArgumentError, "sparse=True is not supported"),
        ({"padding_idx": 23}, ArgumentError, "padding_idx=23 must be a row"),
        ({"padding_idx": -24}, ArgumentError, "padding_idx=-24"),
        ({"out_splits": 0}, SplitsError, "out_splits=0"),
        ({"out_splits": 24}, SplitsError, "out_splits=24"),
    ],
)
def test_wrong_arguments_are_refused_with_the_reason(
    arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    """Options without a tiled form, and numbers out of range, say why."""
    with pytest.raises(error, match=message):
        TiledEmbedding(ROWS, WIDTH, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("bad", [-1, 23, 1000])
def test_an_id_outside_the_vocabulary_is_an_index_error(splits: int, bad: int) -> None:
    """It names the range, is a builtin IndexError, and the layer works on."""
    _, tiled = pair(splits)

    with pytest.raises(TileIndexError, match="from 0 to 22") as caught:
        tiled(torch.tensor([1, bad]))

    assert isinstance(caught.value, IndexError)
    assert tiled(IDS).shape == (2, 4, WIDTH)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize(
    "ids",
    [torch.ones(2), torch.ones(2, dtype=torch.bool), torch.ones(2, dtype=torch.int16), [1, 2]],
    ids=str,
)
def test_ids_that_are_no_whole_numbers_are_refused(ids: object, splits: int) -> None:
    """Floats, flags, short integers and lists are no ids, for one tile or more."""
    _, tiled = pair(splits)

    with pytest.raises(TileDtypeError, match="whole numbers, int32 or int64"):
        tiled(ids)

    assert tiled(IDS).shape == (2, 4, WIDTH)


@pytest.mark.parametrize("splits", [1, 2])
def test_ids_on_another_device_are_refused(splits: int) -> None:
    """Both devices are named."""
    _, tiled = pair(splits)

    with pytest.raises(TileDeviceError, match="the ids are on meta, the tiles on cpu"):
        tiled(IDS.to("meta"))


def test_frequencies_are_not_counted_wrongly_under_transforms() -> None:
    """A static lookup would count other tiles' ids: training is refused, the rest works."""
    dense, tiled = pair(3, scale_grad_by_freq=True)

    with pytest.raises(ArgumentError, match="scale_grad_by_freq=True cannot be trained"):
        torch.vmap(tiled)(IDS)
    with torch.no_grad():
        assert torch.equal(torch.vmap(tiled)(IDS), dense(IDS))
    assert torch.equal(torch.vmap(pair(1, scale_grad_by_freq=True)[1])(IDS), dense(IDS))


def test_parametrized_rows_are_not_reset_silently() -> None:
    """A weight that is computed cannot be drawn."""
    _, tiled = pair(3)
    nn.utils.parametrizations.weight_norm(tiled.tile(1, 0))

    with pytest.raises(TileClassError, match=r"tile \(1, 0\) computes its weight"):
        tiled.reset_parameters()


class Tied(nn.Module):
    """An embedding and a head with one weight."""

    def __init__(self, splits: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        dense, head = nn.Embedding(ROWS, WIDTH, dtype=dtype), nn.Linear(WIDTH, ROWS, dtype=dtype)
        self.embedding: nn.Module = dense
        self.head: nn.Module = head
        if splits:
            self.embedding = TiledEmbedding.from_embedding(dense, splits)
            self.head = tiled = TiledLinear.from_linear(head, out_splits=splits)
            tiled.share_tiles_with(self.embedding)
        else:
            head.weight = dense.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.head(torch.tanh(self.embedding(ids)))
        return logits


@pytest.mark.parametrize("splits", SPLITS)
def test_a_head_shares_the_tiles_of_an_embedding(splits: int) -> None:
    """One set of tiles, listed once, with the gradients of both uses."""
    truth, dense, tiled = Tied(0, torch.float64), Tied(0), Tied(splits)
    for model in (truth, dense, tiled):
        model.load_state_dict(dense.state_dict())
        model(IDS).square().sum().backward()

    names = [name for name, _ in tiled.named_parameters()]
    ours, exact = tiled.embedding.weight.grad, truth.embedding.weight.grad
    error = (dense.embedding.weight.grad - exact).norm()
    assert not [name for name in names if name.startswith("head") and name.endswith("weight")]
    assert (ours - exact).norm() <= 2 * error + torch.finfo(torch.float32).eps * exact.norm()


def test_one_step_moves_both_uses() -> None:
    """An optimizer steps a shared tile once, and embedding and head see it."""
    tiled = Tied(5)
    optimizer = torch.optim.SGD(tiled.parameters(), lr=0.1)
    tiled(IDS).sum().backward()
    optimizer.step()

    assert torch.equal(tiled.head.weight + 0, tiled.embedding.weight + 0)


def test_ties_survive_deepcopy_and_pickle() -> None:
    """A copy of tied layers is tied to itself."""
    for copied in (copy.deepcopy(Tied(5)), pickle.loads(pickle.dumps(Tied(5)))):
        assert copied.head.tile(2, 0).weight is copied.embedding.tile(2, 0).weight


def test_compilers_and_transforms_look_up_statically() -> None:
    """compile(fullgraph), export, vmap and the meta device need no shapes that depend on ids."""
    dense, tiled = pair(5, padding_idx=2)

    compiled = torch.compile(tiled, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(tiled, (IDS,)).module()
    batched = torch.vmap(tiled)(IDS)

    for rows in (compiled(IDS), exported(IDS), batched):
        assert torch.equal(rows, dense(IDS))
    assert TiledEmbedding(ROWS, WIDTH, out_splits=3, device="meta")(IDS.to("meta")).shape == (
        2,
        4,
        6,
    )


def test_compiled_gradients_are_the_dense_ones() -> None:
    """The static lookup has the dense gradient too, the padding row's included."""
    dense, tiled = pair(5, padding_idx=2)
    factor = torch.randn(2, 4, WIDTH)

    (dense(IDS) * factor).sum().backward()
    (torch.compile(tiled, fullgraph=True, backend="aot_eager")(IDS) * factor).sum().backward()

    assert torch.equal(tiled.weight.grad, dense.weight.grad)


def test_tiles_without_ids_are_skipped_only_when_nothing_can_tell() -> None:
    """Without gradients a tile that holds no id is not called, unless a hook counts its calls."""
    _, tiled = pair(5)
    calls: list[int] = []
    for (row, _), tile in tiled.tiles():
        tile.register_forward_hook(lambda *_, row=row: calls.append(row))

    with torch.no_grad():
        tiled(torch.tensor([22]))

    assert calls == [0, 1, 2, 3, 4]


def test_names_of_every_form_load() -> None:
    """Dense names and tiles of another grid load, and the state dict has tile names."""
    dense, tiled = pair(5)
    other = TiledEmbedding(ROWS, WIDTH, out_splits=3)

    other.load_state_dict(dense.state_dict())
    assert torch.equal(other.to_embedding().weight, dense.weight)
    other.reset_parameters()
    other.load_state_dict(tiled.state_dict())

    assert torch.equal(other.to_embedding().weight, dense.weight)
    assert list(tiled.state_dict()) == [f"embeddings.{o}.weight" for o in range(5)]


def test_writing_to_the_handle_reaches_the_tiles() -> None:
    """Rows are drawn as the dense embedding's; another weight is refused."""
    dense, tiled = pair(5)

    for embedding in (dense, tiled):
        torch.manual_seed(1)
        nn.init.normal_(embedding.weight)
        embedding.weight.data[3].zero_()

    assert torch.equal(tiled.weight, dense.weight)
    with pytest.raises(HandleError):
        tiled.weight = nn.Parameter(torch.zeros(ROWS, WIDTH))


def test_to_embedding_keeps_everything() -> None:
    """dtype, requires_grad, mode, options and bits come back."""
    dense, _ = pair(1, dtype=torch.bfloat16, padding_idx=4, scale_grad_by_freq=True)
    dense.requires_grad_(False).eval()

    back = TiledEmbedding.from_embedding(dense, 5).to_embedding()

    assert repr(back) == repr(dense)
    assert torch.equal(back.weight, dense.weight)
    assert (back.weight.dtype, back.weight.requires_grad, back.training) == (
        torch.bfloat16,
        False,
        False,
    )


@pytest.mark.parametrize("bad", [-1, 23])
def test_ids_outside_the_vocabulary_are_refused_under_compilers_too(bad: int) -> None:
    """A static lookup passes them on to torch's own check instead of giving a wrong row."""
    _, tiled = pair(5)
    compiled = torch.compile(tiled, fullgraph=True, backend="aot_eager")

    with pytest.raises(IndexError):
        compiled(torch.tensor([1, bad]))


def test_a_tile_whose_forward_was_replaced_is_called() -> None:
    """Offloading libraries wrap a tile's forward: it is neither checked nor skipped as plain."""
    dense, tiled = pair(3)
    weight = tiled.tile(1, 0).weight.detach().clone()
    tiled.tile(1, 0).weight = nn.Parameter(weight.to("meta"))
    tiled.tile(1, 0).forward = lambda ids: weight[ids]  # type: ignore[method-assign]

    with torch.no_grad():
        rows = tiled(IDS)

    assert torch.equal(rows, dense(IDS))
