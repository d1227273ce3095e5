"""Cutting a tensor along its last dimension."""

from collections.abc import Sequence

import torch
from torch import Tensor


def split_tensor_along_last_dim(
    tensor: Tensor, partitions: Sequence[int], contiguous_split_chunks: bool = False
) -> tuple[Tensor, ...]:
    """Chunks of the given sizes along the last dimension.

    Args:
        tensor: (…, width).
        partitions: sizes that add up to the width.
        contiguous_split_chunks: give contiguous copies instead of views.

    Returns:
        One view of `tensor` for each size, or one contiguous copy.
    """
    chunks = torch.split(tensor, list(partitions), dim=-1)
    return tuple(chunk.contiguous() for chunk in chunks) if contiguous_split_chunks else chunks
