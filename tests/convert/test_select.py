"""Which modules are tiled, and the reason for each yes and no."""

import pytest
import torch
from torch import nn

import memtile
from memtile.convert import select_linears
from memtile.errors import ArgumentError, CannotTileError, TileSizeWarning


class Odd(nn.Linear):
    """A linear with behaviour of its own."""


def model() -> nn.Module:
    """A model with one module for each reason."""
    torch.manual_seed(0)
    built = nn.ModuleDict(
        {
            "plain": nn.Linear(10, 7),
            "small": nn.Linear(2, 3),
            "odd": Odd(10, 7),
            "hooked": nn.Linear(10, 7),
            "attention": nn.MultiheadAttention(8, 2),
            "embedding": nn.Embedding(11, 6),
            "normed": nn.Embedding(11, 6, max_norm=1.0),
            "sparse": nn.Embedding(11, 6, sparse=True),
            "tiled": memtile.TiledLinear(10, 7, out_splits=2),
            "patched": nn.Linear(10, 7),
            "watched": nn.Linear(10, 7),
            "parametrized": nn.utils.parametrizations.weight_norm(nn.Linear(10, 7)),
            "extra": nn.Linear(10, 7),
        }
    )
    built["hooked"].register_forward_hook(lambda *_: None)
    built["patched"].forward = lambda x: x
    built["watched"].weight.register_hook(lambda g: g)
    built["extra"].register_parameter("scale", nn.Parameter(torch.ones(1)))
    return built


def reasons(**arguments: object) -> dict[str, str]:
    """The refusals by name."""
    chosen = select_linears(model(), **arguments)  # type: ignore[arg-type]
    return {decision.name: decision.reason for decision in chosen if not decision.tiled}


def test_every_linear_and_embedding_gets_a_verdict_with_a_reason() -> None:
    """Each yes and each no of a model comes with its reason."""
    found = select_linears(model())

    yes = {decision.name for decision in found if decision.tiled}
    assert yes == {"plain", "small", "embedding"}
    assert all(decision.reason for decision in found)


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("odd", "Odd"),
        ("hooked", "hooks"),
        ("attention.out_proj", "NonDynamicallyQuantizableLinear"),
        ("normed", "max_norm"),
        ("sparse", "sparse"),
        ("tiled", "2×1 tiles already"),
        ("patched", "forward was replaced"),
        ("watched", "gradient hooks"),
        ("parametrized", "ParametrizedLinear"),
        ("extra", "scale"),
    ],
)
def test_a_module_that_cannot_be_tiled_says_why(name: str, word: str) -> None:
    """The reason names what keeps a module dense."""
    assert word in reasons()[name]


def test_a_named_module_that_cannot_be_tiled_is_refused_with_its_reason() -> None:
    """Asking for an untileable module by name is an error, and nothing was tiled."""
    built = model()

    with pytest.raises(CannotTileError, match="odd cannot be tiled: Odd is a class of its own"):
        memtile.tile(built, out_splits=2, modules=["plain", "odd"])

    assert type(built["plain"]) is nn.Linear


def test_weights_that_fit_stay_dense_with_both_figures() -> None:
    """max_tile_bytes leaves alone what fits and says the bytes."""
    found = reasons(max_tile_bytes=100)

    assert found["small"] == "its 24 bytes fit in max_tile_bytes=100"


def test_no_tile_is_larger_than_max_tile_bytes() -> None:
    """Every chosen grid keeps its largest tile within the bound, rows whole where they fit."""
    chosen = select_linears(model(), max_tile_bytes=100)

    grids = {c.name: c.grid for c in chosen if c.tiled}
    assert grids["plain"] is not None
    for grid in grids.values():
        assert grid is not None
        assert max(4 * a * b for a, b in (grid.rect(*i).shape for i in grid.indices())) <= 100
        assert grid.in_splits == 1


def test_rows_longer_than_a_tile_are_cut_into_columns_except_in_embeddings() -> None:
    """A long row of a linear is cut; an embedding's row cannot be and says so."""
    chosen = {c.name: c for c in select_linears(model(), max_tile_bytes=20)}

    grid = chosen["plain"].grid
    assert grid is not None
    assert grid.in_splits == 2
    assert "one row has 24 bytes" in chosen["embedding"].reason


def test_a_module_with_fewer_features_than_splits_stays_dense() -> None:
    """out_splits above a module's outputs is a reason, not an error."""
    assert "out_splits=5 is outside [1, out_features=3]" in reasons(out_splits=5)["small"]


@pytest.mark.parametrize(
    "arguments",
    [
        {"out_splits": 0},
        {"out_splits": 2.0},
        {"in_splits": 0},
        {"max_tile_bytes": 0},
        {"max_tile_bytes": "1MB/s"},
        {"max_tile_bytes": 100, "out_splits": 2},
        {"out_splits": 2, "modules": ["nowhere"]},
        {"out_splits": 2, "modules": ["attention"]},
        {"out_splits": 2, "modules": "plain"},
        {"out_splits": 2, "modules": 0},
        {},
    ],
)
def test_wrong_arguments_are_refused_and_nothing_is_tiled(arguments: dict[str, object]) -> None:
    """Nonsense sizes and unknown names raise before anything changes."""
    built = model()
    before = [type(module) for module in built.modules()]

    with pytest.raises(ArgumentError):
        memtile.tile(built, **arguments)  # type: ignore[arg-type]

    assert [type(module) for module in built.modules()] == before


def test_a_size_may_be_written_with_its_unit() -> None:
    """As budgets are; a number without unit is refused in one sentence."""
    found = [select_linears(model(), max_tile_bytes=size) for size in ("0.125KiB", "128B", 128)]
    assert found[0] == found[1] == found[2]
    assert any(each.tiled for each in found[0])
    with pytest.raises(ArgumentError, match="max_tile_bytes '128' has no unit: write 128MiB"):
        memtile.tile(model(), max_tile_bytes="128")


def test_a_weight_shared_with_something_dense_keeps_its_owners_dense() -> None:
    """A tie to a bare parameter, or to a module that cannot be tiled, is a reason for both."""
    built = nn.ModuleDict(
        {"head": nn.Linear(6, 11), "embedding": nn.Embedding(11, 6, max_norm=1.0)}
    )
    built["head"].weight = built["embedding"].weight

    chosen = {c.name: c for c in select_linears(built, out_splits=2)}

    assert not chosen["head"].tiled
    assert "embedding.weight, which stays dense: max_norm" in chosen["head"].reason


def test_a_bias_shared_with_another_module_is_kept_whole_and_said_so() -> None:
    """A bias that others share does not keep the weights from becoming tiles."""
    built = nn.ModuleDict({"one": nn.Linear(6, 11), "two": nn.Linear(6, 11)})
    built["one"].bias = built["two"].bias

    chosen = select_linears(built, out_splits=2)

    assert [decision.tiled for decision in chosen] == [True, True]
    assert all("its bias kept whole" in decision.reason for decision in chosen)


def test_a_decision_prints_as_one_line() -> None:
    """The printed decision has verdict, name, size, grid and reason."""
    first = select_linears(model(), out_splits=2)[0]

    assert str(first) == "yes plain 7×10 → 2×1 tiles: a plain linear"


def test_modules_may_be_any_iterable() -> None:
    """A generator of names is read once and means what a list means."""
    built = model()

    memtile.tile(built, out_splits=2, modules=(name for name in ["plain"]))

    assert isinstance(built["plain"], memtile.TiledLinear)
    assert type(built["small"]) is nn.Linear


@pytest.mark.parametrize("built", [None, "model", 3])
def test_what_is_no_module_is_refused(built: object) -> None:
    """Neither tile, untile nor select_linears takes anything else than a module."""
    for call in (
        lambda: memtile.tile(built, out_splits=2),  # type: ignore[type-var]
        lambda: memtile.untile(built),  # type: ignore[type-var]
        lambda: select_linears(built),  # type: ignore[arg-type]
    ):
        with pytest.raises(ArgumentError, match=r"must be an nn.Module"):
            call()


@pytest.mark.parametrize("built", [nn.Sequential(nn.ReLU()), nn.Sequential(nn.Linear(3, 2))])
def test_splits_that_fit_nothing_are_refused(built: nn.Module) -> None:
    """A call that would change nothing says so."""
    with pytest.raises(CannotTileError, match="nothing of Sequential can be tiled"):
        memtile.tile(built, out_splits=5)


def test_parameters_that_stay_above_the_size_are_named_in_a_warning() -> None:
    """Experts in one tensor and layers that are tiled already cause a warning."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up = nn.Parameter(torch.zeros(4, 10, 10))

    built = nn.ModuleDict({"experts": Experts(), "plain": nn.Linear(10, 7)})

    with pytest.warns(TileSizeWarning, match=r"experts.gate_up with 1600 bytes: it belongs to no"):
        memtile.tile(built, max_tile_bytes=100)
    del built["experts"]
    with pytest.warns(TileSizeWarning, match="tiles already; untile first"):
        memtile.tile(built, max_tile_bytes=50)


def test_a_linear_as_the_model_itself_is_a_no_with_the_way_out() -> None:
    """select_linears and tile agree about the root."""
    (decision,) = select_linears(nn.Linear(4, 4), out_splits=2)

    assert not decision.tiled
    assert "from_linear" in decision.reason
