"""Row tiles on two ranks that have different numbers of rows, and so of tiles, in each step."""

import pytest
import torch
from row_tiles_worker import CASES, dense, spawn


@pytest.fixture(scope="module")
def ranks():
    return spawn()


@pytest.fixture(scope="module")
def truth():
    return dense().state_dict()


@pytest.mark.parametrize("name", CASES)
def test_ranks_train_as_one_process_does_without_tiles(ranks, truth, name):
    """Two stacked modules, one rank with few rows or none, evaluations: the same on all ranks."""
    eps = torch.finfo(torch.float32 if name.startswith("zero") else torch.float64).eps
    for key, expected in truth.items():
        found = [rank[name][key] for rank in ranks]
        assert torch.equal(*found), key
        assert (found[0] - expected).norm() <= 100 * eps * expected.norm(), key
