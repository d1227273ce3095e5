"""The names of the package itself."""

import importlib

import pytest

import memtile

# Names that stood at the top before, and where they are now.
MOVED = {
    "Budget": "costmodel.Budget",
    "Choice": "convert.TilingDecision",
    "Home": "homes.Home",
    "Loaded": "convert.IncompatibleKeys",
    "ParkedLinear": "layers.ParkedLinear",
    "Plan": "costmodel.Plan",
    "RankPlan": "costmodel.RankPlan",
    "Rates": "costmodel.MachineProfile",
    "Recut": "convert.TilingSpec",
    "Resumed": "convert.Resumed",
    "Speeds": "costmodel.ClusterSpec",
    "convert_checkpoint": "convert.convert_checkpoint",
    "has_training": "convert.has_training",
    "plan_ranks": "planner.plan_ranks",
    "select_linears": "convert.select_linears",
    "training_folder": "checkpoints.training_folder",
}


def test_the_top_level_has_few_names():
    """28 names, each of them there."""
    assert sorted(memtile.__all__) == [
        "DiskHome",
        "HostHome",
        "LinearCrossEntropy",
        "TileOptimizer",
        "TiledEmbedding",
        "TiledLinear",
        "TiledLinearReturnBias",
        "TiledMLP",
        "__version__",
        "defer_logits",
        "dense_state_dict",
        "empty_model",
        "linear_cross_entropy",
        "load_checkpoint",
        "observe",
        "park_activations",
        "partition_uniform",
        "plan",
        "resume_training",
        "save_checkpoint",
        "save_training",
        "split_tensor_along_last_dim",
        "tile",
        "tile_mlps",
        "tile_rows",
        "tiled_mlp",
        "token_log_probabilities",
        "untile",
    ]
    assert all(hasattr(memtile, name) for name in memtile.__all__)


@pytest.mark.parametrize(("name", "place"), MOVED.items())
def test_a_moved_name_says_where_it_is(name: str, place: str):
    """The error gives the module and the name, and the module has it."""
    with pytest.raises(AttributeError, match=rf"memtile\.{name} is memtile\.{place} now"):
        getattr(memtile, name)

    module, name = place.split(".")
    assert hasattr(importlib.import_module(f"memtile.{module}"), name)


def test_an_unknown_name_is_an_ordinary_attribute_error():
    """As of any module."""
    with pytest.raises(AttributeError, match="module 'memtile' has no attribute 'tlie'"):
        _ = memtile.tlie
