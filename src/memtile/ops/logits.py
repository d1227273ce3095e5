"""What a loss needs of logits, computed from one block of them: sums over the vocabulary.

Shapes: N tokens, H width, V classes of a tile; x (N, H), W (V, H), b (V,).

Logits: u = x Wᵀ + b; z = s u, and with a soft cap z = cap·tanh(s u / cap).

Of a tile, each token gets, with c_v the coefficients of smoothing, class weights and probability
targets:
    log_sum_exp  l = log Σ_v exp z_v
    picked       z_y of the target y, 0 where y is not in the tile
    weighted     Σ_v c_v z_v
    mass         Σ_v c_v, without a gradient
    mean         m = Σ_v p_v z_v, p_v = exp(z_v - l); the entropy is l - m

Several tiles: l = log Σ_t exp l_t, m = Σ_t exp(l_t - l) m_t, and the others are sums.

Backward: dz_v = p_v (g_l + g_m (1 + z_v - m)) + g_picked [v = y] + g_weighted c_v, and
du = dz · s (1 - (z/cap)²).

A loss is made of these numbers by ordinary operations on N of them, so that every reduction and
every scale of the loss reaches the logits through their gradients.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from memtile.geometry import Span


class LogitSums(NamedTuple):
    """The sums of each token (N,), in float32 or float64; None for what was not asked for."""

    log_sum_exp: Tensor
    picked: Tensor | None
    weighted: Tensor | None
    mass: Tensor | None
    mean: Tensor | None


@dataclass(frozen=True)
class LogitQuery:
    """What is asked of the logits of all tokens and classes, or of a part of them.

    Args:
        targets: (N,) class of each token, counted from the first one of this part; it may be
            outside of it.
        probabilities: (N, V) of the classes, instead of targets.
        class_weights: (V,) factors of the classes' coefficients.
        certain: the factor of the probabilities.
        uniform: what is added to each class's probability.
        wants_mean: whether the mean is asked for.
        scale: factor of the logits.
        softcap: bound of the logits, or None.
    """

    targets: Tensor | None = None
    probabilities: Tensor | None = None
    class_weights: Tensor | None = None
    certain: float = 1.0
    uniform: float = 0.0
    wants_mean: bool = False
    scale: float = 1.0
    softcap: float | None = None

    def of(self, rows: Span | None, classes: Span) -> "LogitQuery":
        """The same of some rows (None: all) and classes."""
        r, c = slice(None) if rows is None else rows.as_slice(), classes.as_slice()
        targets, given, weights = self.targets, self.probabilities, self.class_weights
        return replace(
            self,
            targets=None if targets is None else targets[r] - classes.start,
            probabilities=None if given is None else given[r, c],
            class_weights=None if weights is None else weights[c],
        )

    def through(self, scale: float, softcap: float | None) -> "LogitQuery":
        """The same of logits that are scaled and bounded."""
        return replace(self, scale=scale, softcap=softcap)

    @property
    def has_coefficients(self) -> bool:
        """Whether weighted sums are asked for."""
        return self.probabilities is not None or self.uniform != 0.0

    def coefficients(self, like: Tensor) -> Tensor | None:
        """c (N or 1, V) for logits `like` these."""
        if not self.has_coefficients:
            return None
        if self.probabilities is None:
            found = like.new_full((1, like.shape[1]), self.uniform)
        else:
            found = self.probabilities.to(like.dtype) * self.certain + self.uniform
        return found if self.class_weights is None else found * self.class_weights.to(like.dtype)

    def find_targets(self, classes: int) -> tuple[Tensor, Tensor]:
        """(N, 1) places of the targets, and whether each is in this part; others are place 0."""
        assert self.targets is not None
        targets = self.targets.unsqueeze(1)
        inside = (targets >= 0) & (targets < classes)
        return torch.where(inside, targets, 0), inside


def sum_logits(query: LogitQuery, logits: Tensor) -> LogitSums:
    """The sums of logits (N, V) as products gave them, in ordinary differentiable operations."""
    z = query.scale * logits
    if query.softcap is not None:
        z = query.softcap * torch.tanh(z / query.softcap)
    log_sum_exp = z.logsumexp(1)
    mean = (z.softmax(1) * z).sum(1) if query.wants_mean else None
    return LogitSums(log_sum_exp, *_linear_sums(query, z), mean)


def sum_block(query: LogitQuery, logits: Tensor) -> LogitSums:
    """The same without a graph; overwrites the logits, float32 or float64."""
    z = _bound(query, logits)
    linear = _linear_sums(query, z)
    top = z.amax(1, keepdim=True)
    top.masked_fill_(top == -math.inf, 0.0)  # all classes of a block may be masked
    shifted = z.sub_(top)
    powers = shifted.exp() if query.wants_mean else shifted.exp_()
    total = powers.sum(1)
    top = top.squeeze(1)
    mean = powers.mul_(shifted).sum(1).div_(total).add_(top) if query.wants_mean else None
    return LogitSums(total.log_().add_(top), *linear, mean)


def differentiate_block(
    query: LogitQuery, logits: Tensor, sums: LogitSums, grads: LogitSums
) -> Tensor:
    """The gradient of the logits from those of their sums; overwrites the logits."""
    z = _bound(query, logits)
    slope = None
    if query.softcap is not None:
        slope = (z / query.softcap).square_().neg_().add_(1.0)
    coefficients = query.coefficients(z) if grads.weighted is not None else None
    factor = grads.log_sum_exp.unsqueeze(1)
    if grads.mean is not None and sums.mean is not None:
        factor = (z + (1.0 - sums.mean.unsqueeze(1))).mul_(grads.mean.unsqueeze(1)).add_(factor)
    floor = sums.log_sum_exp.masked_fill(sums.log_sum_exp == -math.inf, 0.0)
    gradient = z.sub_(floor.unsqueeze(1)).exp_().mul_(factor)
    if grads.picked is not None:
        places, inside = query.find_targets(z.shape[1])
        rows = torch.arange(len(places), device=places.device)
        values = torch.where(inside.squeeze(1), grads.picked, 0.0)
        gradient.index_put_((rows, places.squeeze(1)), values, accumulate=True)
    if coefficients is not None and grads.weighted is not None:
        gradient.addcmul_(grads.weighted.unsqueeze(1), coefficients)
    if query.scale != 1.0:
        gradient.mul_(query.scale)
    return gradient if slope is None else gradient.mul_(slope)


def combine_sums(parts: Sequence[LogitSums]) -> LogitSums:
    """The sums of a vocabulary from those of its tiles, differentiable."""
    if len(parts) == 1:
        return parts[0]
    each = torch.stack([part.log_sum_exp for part in parts])
    log_sum_exp = each.logsumexp(0)
    means = [part.mean for part in parts if part.mean is not None]
    mean = ((each - log_sum_exp).exp() * torch.stack(means)).sum(0) if means else None
    picked, weighted, mass = (_add([part[place] for part in parts]) for place in (1, 2, 3))
    return LogitSums(log_sum_exp, picked, weighted, mass, mean)


def join_rows_of_sums(parts: Sequence[LogitSums], tokens: int) -> LogitSums:
    """The sums of all tokens from those of parts; on the meta device of a few (`counted_parts`)."""
    first = parts[0]
    if len(parts) == 1 and len(first.log_sum_exp) == tokens:
        return first
    if first.log_sum_exp.is_meta:
        return LogitSums(*(None if part is None else part.new_empty(tokens) for part in first))  # type: ignore[arg-type]  # the first is never None
    columns = ([t for t in column if t is not None] for column in zip(*parts, strict=True))
    return LogitSums(*(torch.cat(column) if column else None for column in columns))  # type: ignore[arg-type]  # the first is never empty


def _add(parts: Sequence[Tensor | None]) -> Tensor | None:
    tensors = [part for part in parts if part is not None]
    return torch.stack(tensors).sum(0) if tensors else None


def _bound(query: LogitQuery, logits: Tensor) -> Tensor:
    """z, in place."""
    if query.softcap is not None:
        return logits.mul_(query.scale / query.softcap).tanh_().mul_(query.softcap)
    return logits if query.scale == 1.0 else logits.mul_(query.scale)


def _linear_sums(
    query: LogitQuery, z: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """picked, weighted and mass."""
    picked = weighted = mass = None
    if query.targets is not None:
        places, inside = query.find_targets(z.shape[1])
        picked = torch.where(inside, z.gather(1, places), 0.0).squeeze(1)
    coefficients = query.coefficients(z)
    if coefficients is not None:
        weighted, mass = (z * coefficients).sum(1), coefficients.sum(1).expand(len(z))
    return picked, weighted, mass
