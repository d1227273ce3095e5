"""The names of the package itself."""

import importlib

import pytest

import memtile

# Names that stood at the top before, and the modules that have them.
MOVED = {
    "planning": ("Budget", "Plan", "RankPlan", "Rates", "Speeds"),
    "planner": ("plan_ranks",),
    "homes": ("Home",),
    "layers": ("ParkedLinear",),
    "convert": (
        *("Choice", "Loaded", "Recut", "Resumed"),
        *("convert_checkpoint", "has_training", "select_linears"),
    ),
    "checkpoints": ("training_folder",),
}


def test_the_top_level_has_few_names():
    """18 names, each of them there."""
    assert sorted(memtile.__all__) == [
        "DiskHome",
        "HostHome",
        "TileOptimizer",
        "TiledEmbedding",
        "TiledLinear",
        "TiledLinearReturnBias",
        "__version__",
        "dense_state_dict",
        "empty_model",
        "load_checkpoint",
        "partition_uniform",
        "plan",
        "resume_training",
        "save_checkpoint",
        "save_training",
        "split_tensor_along_last_dim",
        "tile",
        "untile",
    ]
    assert all(hasattr(memtile, name) for name in memtile.__all__)


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, names in MOVED.items() for name in names]
)
def test_a_moved_name_says_where_it_is(module: str, name: str):
    """The error gives the module, and the module has the name."""
    with pytest.raises(AttributeError, match=rf"memtile\.{name} is memtile\.{module}\.{name} now"):
        getattr(memtile, name)

    assert hasattr(importlib.import_module(f"memtile.{module}"), name)


def test_an_unknown_name_is_an_ordinary_attribute_error():
    """As of any module."""
    with pytest.raises(AttributeError, match="module 'memtile' has no attribute 'tlie'"):
        _ = memtile.tlie
