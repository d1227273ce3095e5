"""Clipping of gradients that live in homes: norms and scales tile by tile."""

from collections.abc import Iterable, Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from memtile.errors import OptimizerError
from memtile.homes import Berth, berth_of
from memtile.transfer import ferries_of


def clip_gradients(
    parameters: Iterable[nn.Parameter], max_norm: float, norm_type: float, error_if_nonfinite: bool
) -> Tensor:
    """Scale the parameters' gradients to a norm of at most `max_norm`; gives the norm before.

    Source: the formula, the 1e-6 included, is that of `torch.nn.utils.clip_grad_norm_`.

    Raises:
        OptimizerError: with `error_if_nonfinite`, the norm is not finite; nothing was scaled.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.tensor(0.0)
    for home in {berth.home for berth in map(_parked, gradients) if berth is not None}:
        ferries_of(home).steps.clear()  # what was read before may have been written since
    norms = _norms(gradients, norm_type)
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    if error_if_nonfinite and not total.isfinite():
        raise OptimizerError(
            f"the norm of the gradients is {total.item()}, so they cannot be clipped; look for the "
            "layer that gives it, or pass error_if_nonfinite=False"
        )
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    if scale.item() != 1.0:  # NaN scales too, as in torch
        _scale(gradients, scale)
    return total


def _norms(gradients: Sequence[Tensor], norm_type: float) -> list[Tensor]:
    norms = []
    dtype = reduce(torch.promote_types, {each.dtype for each in gradients}, torch.float32)
    for number, gradient in enumerate(gradients):
        berth = _parked(gradient)
        if berth is None:
            norm = torch.linalg.vector_norm(gradient, norm_type)
        else:
            ahead = _cargoes(gradients[number + 1 :])
            with ferries_of(berth.home).steps.borrow((berth,), ahead=ahead) as loan:
                norm = torch.linalg.vector_norm(loan.tensors[0], norm_type)
        norms.append(norm.to(gradients[0].device, dtype))
    return norms


def _scale(gradients: Sequence[Tensor], scale: Tensor) -> None:
    homes = set()
    for number, gradient in enumerate(gradients):
        berth = _parked(gradient)
        if berth is None:
            gradient.mul_(scale.to(gradient.device))
            continue
        homes.add(berth.home)
        ahead = _cargoes(gradients[number + 1 :])
        with ferries_of(berth.home).steps.borrow((berth,), ahead=ahead) as loan:
            loan.tensors[0].mul_(scale)
            loan.store()
        torch.autograd.graph.increment_version(gradient)
    for home in homes:
        ferries_of(home).steps.settle()
        ferries_of(home).steps.clear()


def _cargoes(gradients: Iterable[Tensor]) -> Iterable[tuple[Berth]]:
    return ((berth,) for berth in map(_parked, gradients) if berth is not None)


def _parked(gradient: Tensor) -> Berth | None:
    berth = berth_of(gradient)
    return None if berth is None or berth.home.works_in_place else berth
