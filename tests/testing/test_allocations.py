"""Peaks of tensor memory are counted to the byte."""

import torch
from torch import nn

from memtile.testing import peak_allocated_bytes


def test_the_peak_counts_what_is_held_at_once() -> None:
    """Two tensors held together count together, a freed one does not."""

    def hold() -> torch.Tensor:
        torch.empty(1000)
        one = torch.empty(300)
        return torch.cat([one, torch.empty(200)])

    assert peak_allocated_bytes(hold) >= 4 * 1000
    assert peak_allocated_bytes(hold) < 4 * 1000 + 4 * 200


def test_nothing_allocated_is_zero() -> None:
    """A function that allocates nothing has no peak."""
    x = torch.ones(7)

    assert peak_allocated_bytes(lambda: x.add_(1)) < 64


def test_a_dense_linear_holds_its_output() -> None:
    """The count itself: `nn.Linear` holds its output and nothing more."""
    layer, x = nn.Linear(192, 640), torch.randn(512, 192)

    peak = peak_allocated_bytes(lambda: layer(x))

    assert peak == 4 * 512 * 640
