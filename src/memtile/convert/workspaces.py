"""The memory that MKL keeps for products: taken once, for the largest of them, and first."""

import torch

from memtile.homes import trim_heap
from memtile.planning import LARGEST_WORKSPACE, Products

_DEPTH = 512  # columns that are multiplied at once, at least: a block of every kernel


def take_workspace(products: Products) -> None:
    """Make a float32 product with the largest workspace that a step will need.

    MKL keeps the workspace of each product for the next one, and takes another where none that it
    has is large enough. By ever larger products of SmolLM2-135M it came to hold 41 MiB; with the
    largest first, 11 (torch 2.13 on an AMD EPYC, measured).
    """
    rows = min(products.rows, LARGEST_WORKSPACE.rows)
    columns = min(products.columns, LARGEST_WORKSPACE.columns)
    if rows and columns:  # the factors are never written, so their pages take no memory
        torch.mm(torch.empty(rows, _DEPTH), torch.empty(columns, _DEPTH).t())
        trim_heap()  # where the result was
