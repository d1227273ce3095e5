"""What is going on around a call: transforms, compilers, autocast."""

import torch
from torch import Tensor


def transformed() -> bool:
    """Whether a compiler, an exporter, a `torch.func` transform or forward-mode AD looks on.

    They need operations without in-place writes into one output: the slice writer cannot be
    vmapped, since `mark_dirty` and generated vmap rules exclude each other.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def is_batched(gradient: Tensor) -> bool:
    """Whether it is a batch of gradients (`is_grads_batched=True`), which out= cannot write."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(gradient) or functorch.is_legacy_batchedtensor(gradient)


def autocast_dtype(tensor: Tensor, device_type: str | None = None) -> torch.dtype | None:
    """The dtype that autocast gives this tensor in a matrix product, or None when it is off.

    Args:
        tensor: what is multiplied.
        device_type: where, if not where the tensor lies.
    """
    if tensor.is_meta or not tensor.is_floating_point():  # asked about meta, torch raises
        return None
    device_type = device_type or tensor.device.type
    if not torch.is_autocast_enabled(device_type):
        return None
    return None if tensor.dtype == torch.float64 else torch.get_autocast_dtype(device_type)
