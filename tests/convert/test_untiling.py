"""What a dense module could not do is not untiled silently: refused by name, nothing changed."""

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import memtile
from memtile import TiledEmbedding, TiledLinear
from memtile.convert import select_linears
from memtile.errors import CannotTileError


class Scaled(nn.Linear):
    """A linear with behaviour of its own."""

    def forward(self, input: Tensor) -> Tensor:
        """Three times the product."""
        return 3 * super().forward(input)


class Sub(TiledLinear):
    """A tiled layer of a class without a dense form."""


def nothing(*_: object) -> None:
    """A hook that changes nothing."""


def with_hook(where: str) -> TiledLinear:
    """A layer with a hook on itself or on one tile."""
    layer = TiledLinear(6, 8, out_splits=2)
    (layer if where == "layer" else layer.tile(1, 0)).register_forward_hook(nothing)
    return layer


def with_patched_forward() -> TiledLinear:
    """A layer whose forward was replaced, as accelerate does."""
    layer = TiledLinear(6, 8, out_splits=2)
    layer.forward = layer.forward  # type: ignore[method-assign]
    return layer


def with_weight_norm() -> TiledLinear:
    """A layer with a parametrized tile."""
    layer = TiledLinear(6, 8, out_splits=2)
    nn.utils.parametrizations.weight_norm(layer.tile(0, 0))
    return layer


CASES: dict[str, tuple[Callable[[], TiledLinear], str]] = {
    "linear_cls": (lambda: TiledLinear(6, 8, out_splits=2, linear_cls=Scaled), "Scaled"),
    "subclass": (lambda: Sub(6, 8, out_splits=2), "Sub is a class of its own"),
    "layer hook": (lambda: with_hook("layer"), "forward hooks"),
    "tile hook": (lambda: with_hook("tile"), r"tile \(1, 0\) is more than a plain linear"),
    "patched": (with_patched_forward, "its forward was replaced"),
    "parametrized": (with_weight_norm, "ParametrizedLinear"),
    "rows": (lambda: TiledLinear(6, 8, out_splits=2, combine_out_splits=False), "uncombined"),
    "chunks": (
        lambda: TiledLinear(6, 8, in_splits=2, input_is_already_split=True),
        "already split",
    ),
    "pairs": (lambda: memtile.TiledLinearReturnBias(6, 8), "TiledLinearReturnBias"),
}


@pytest.mark.parametrize("case", CASES)
def test_behaviour_that_a_dense_module_lacks_is_not_dropped(case: str) -> None:
    """The layer is named with the reason, and no layer of the model was changed."""
    make, reason = CASES[case]
    model = nn.ModuleDict({"first": TiledLinear(6, 6, out_splits=2), "odd": make()})

    with pytest.raises(CannotTileError, match=f"odd cannot be untiled: .*{reason}"):
        memtile.untile(model)

    assert type(model["first"]) is TiledLinear


def test_biases_and_single_tiles_tied_by_hand_are_not_untied() -> None:
    """Tiles that are shared in part are refused: dense modules share whole weights only."""

    def shared_bias(model: nn.ModuleDict) -> None:
        model["b"].tile(0, 0).bias = model["a"].tile(0, 0).bias

    def shared_tile(model: nn.ModuleDict) -> None:
        model["b"].tile(1, 0).weight = model["a"].tile(1, 0).weight

    def shared_outside(model: nn.ModuleDict) -> None:
        model["c"] = nn.Linear(6, 4)
        model["c"].weight = model["a"].tile(0, 0).weight

    for tie in (shared_bias, shared_tile, shared_outside):
        layers = {name: TiledLinear(6, 8, out_splits=2) for name in "ab"}
        model = nn.ModuleDict(layers)
        tie(model)

        with pytest.raises(CannotTileError, match="shares its"):
            memtile.untile(model)


def test_whole_ties_made_by_hand_survive() -> None:
    """share_tiles_with is a tie that the dense modules keep."""
    model = nn.ModuleDict(
        {"e": TiledEmbedding(8, 6, out_splits=2), "h": TiledLinear(6, 8, out_splits=2)}
    )
    model["h"].share_tiles_with(model["e"])

    memtile.untile(model)

    assert model["h"].weight is model["e"].weight


def test_weights_that_share_memory_without_being_one_parameter_stay_dense() -> None:
    """A transposed tie by storage cannot be kept by tiles: a reason, not a silent untying."""
    model = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)})
    model["b"].weight = nn.Parameter(model["a"].weight.detach().t())

    reasons = [decision.reason for decision in select_linears(model, out_splits=2)]

    assert reasons[0].startswith("its weight shares memory with b.weight")
    assert reasons[1].startswith("its weight shares memory with a.weight")


@pytest.mark.parametrize("prune_all", [False, True])
def test_a_dense_checkpoint_of_computed_weights_is_refused(prune_all: bool) -> None:
    """Pruned and parametrized tiles have no dense checkpoint: the tile is named."""
    model = nn.Sequential(TiledLinear(6, 8, out_splits=2))
    for row in range(2 if prune_all else 1):
        prune.l1_unstructured(model[0].tile(row, 0), "weight", 0.5)  # type: ignore[operator]

    with pytest.raises(CannotTileError, match=r"0: tile \(0, 0\) computes its weight"):
        list(memtile.dense_state_dict(model))


def test_a_tiled_transformers_model_is_freed_when_it_is_dropped() -> None:
    """The weights are freed with the last reference, without a garbage collection."""
    from small_models import build

    model = memtile.tile(build("llama-tied"), out_splits=2)
    copied = copy.deepcopy(model)
    weights = [weakref.ref(next(m.lm_head.parameters())) for m in (model, copied)]
    gc.collect()
    gc.disable()
    try:
        del model, copied
        assert [weight() for weight in weights] == [None, None]
    finally:
        gc.enable()


def test_saving_takes_its_arguments_by_position(tmp_path: object) -> None:
    """save_pretrained(folder, is_main_process, state_dict) as transformers declares it."""
    from small_models import build

    model = memtile.tile(build("llama"), out_splits=2)
    model.save_pretrained(str(tmp_path), True, model.state_dict())

    loaded = type(model).from_pretrained(str(tmp_path))
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight + 0)
