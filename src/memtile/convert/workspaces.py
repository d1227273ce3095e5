"""The memory that MKL keeps for products: taken first for the widest of them."""

import torch

from memtile.homes import trim_heap
from memtile.planning import Products


def take_workspace(products: Products) -> None:
    """Make the widest float32 product of a step, with factors whose pages take no memory.

    MKL keeps the workspace of each product for the next one, and takes another where none that it
    has is large enough. By ever larger products of SmolLM2-135M it came to hold 41 MiB; with the
    largest first, 11 (torch 2.13 on an AMD EPYC, measured). What it holds in the end depends on
    the CPU: `memtile.planner.product_memory` measures that.
    """
    if products.widest is not None:
        multiply(*products.widest)
        trim_heap()  # where the result was


def multiply(rows: int, depth: int, columns: int) -> None:
    """Make a product of factors that are never written."""
    torch.mm(torch.empty(rows, depth), torch.empty(columns, depth).t())
