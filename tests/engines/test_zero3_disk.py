"""ZeRO-3 with parts of tiles in files: real ones, read and written by DeepSpeed's compiled reader.

To compile it takes minutes and libaio, so these tests run where that was done before:
`python -c "from deepspeed.ops.op_builder import AsyncIOBuilder; AsyncIOBuilder().load()"`.
"""

import pytest
import torch
from compiled_ops import state_of
from engine_cases import distance
from zero3_disk_worker import PLACES, dense, spawn, splits_for

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[1, 2, 4])
def outcome(request, tmp_path_factory):
    if (state := state_of("AsyncIOBuilder")) != "compiled":
        pytest.skip(f"DeepSpeed's async_io is not compiled here, which is {state}")
    return spawn(tmp_path_factory.mktemp("disk"), request.param)


@pytest.mark.parametrize("name", PLACES)
def test_ranks_train_from_a_disk_as_the_dense_model_does(outcome, name):
    """After six steps of AdamW as near to the float64 run as dense float32 is, times 4."""
    _, states = outcome
    truth, rounded = dense(torch.float64), dense(torch.float32)

    assert distance(states[name], truth) <= 4 * distance(rounded, truth)


@pytest.mark.parametrize("name", PLACES)
def test_tiles_are_in_files_meanwhile(outcome, name):
    """Each tile's part, of each rank; masters and both moments where the optimizer is there too."""
    ranks, _ = outcome
    param, optimizer = PLACES[name]
    tiles = 2 * splits_for(len(ranks))
    for rank, seen in enumerate(outcome[0]):
        files = ranks[rank][name]["files"]
        parts = [size for path, size in files.items() if f"float32params/rank{rank}" in path]
        states = [size for path, size in files.items() if f"optimizer/rank{rank}" in path]
        assert len(parts) == (tiles if param == "disk" else 0)
        assert len(states) >= (3 * tiles if optimizer == "disk" else 0)
        assert all(size >= 1 << 20 for size in [*parts, *states])
        assert seen[name]["in memory"] == (0 if param == "disk" else tiles)


@pytest.mark.parametrize("name", PLACES)
def test_at_most_two_tiles_are_gathered_from_a_disk(outcome, name):
    """The tile in use and the next one; `check` finds nothing in the config."""
    for rank in outcome[0]:
        assert 0 < rank[name]["elements"] <= 2 * rank[name]["largest"]
        assert rank[name]["findings"] == []


@pytest.mark.parametrize("name", PLACES)
def test_a_copy_reaches_the_disk(outcome, name):
    """It is in the parts and the masters: a step that changes nothing keeps it."""
    assert all(rank[name]["copied"] for rank in outcome[0])


def test_parts_in_another_dtype_are_refused(outcome):
    """Where DeepSpeed would silently round float32 to bfloat16, `hold` raises with the way out."""
    for rank in outcome[0]:
        assert rank["rounded"] == "" or "deepspeed.zero.Init(module=model" in rank["rounded"]
