"""`linear_cross_entropy`: a head and its loss, over tiles of the vocabulary, without logits.

Shapes: N tokens, H features, V classes; input (…, H) of N tokens, head (V, H).

With z the logits of a token (see `ops.logits`), l = log Σ_v exp z_v, y its class, w the classes'
weights, ε the smoothing and ζ the factor of the z-loss, its loss is

    w_y (1 - ε) (l - z_y) + ε/V Σ_v w_v (l - z_v) + ζ l²          for classes,
    Σ_v w_v ((1 - ε) q_v + ε/V) (l - z_v) + ζ l²                  for probabilities q,

and nothing for an ignored token. The mean divides the sum by Σ w_y over the tokens that are not
ignored (their number without weights; N for probabilities), or by `num_items`.

Source: the online softmax over blocks is that of FlashAttention (arXiv 2205.14135), the loss
without logits that of cut cross-entropy (arXiv 2411.09009).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from memtile import ops
from memtile.errors import (
    ArgumentError,
    TileShapeError,
)
from memtile.layers.head_tiles import NAME, Head, classes_of
from memtile.layers.loss_options import Blocks, Logits, LossOptions, check_classes, rows_of
from memtile.layers.weight_tiles import layer_of

# Rows of ignored tokens are left out where copying the others moves less than they would cost.
_MOST_KEPT = 3 / 4


class TokenLogProbabilities(NamedTuple):
    """What `token_log_probabilities` gives: of each token, in float32, all differentiable."""

    log_probabilities: Tensor  # of the token's target, log p_y; 0 where it is ignored
    entropy: Tensor  # of the token's distribution, in nats
    log_sum_exp: Tensor  # of the token's logits


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Head,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    num_items: int | Tensor | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    block_rows: int | None = None,
    block_classes: int | None = None,
) -> Tensor:
    """`cross_entropy(linear(input, linear_weight, linear_bias), target)` without the logits.

    Blocks of logits are computed one after another, and again in backward: 4 products instead of 3,
    and `block_rows × block_classes` logits in memory instead of tokens × classes. Sums are float32
    in every dtype. A parked head is brought in once in forward and once in backward.

    Args:
        input: (…, features), hidden states of tokens.
        linear_weight: the head: a weight (classes, features), its handle, `nn.Linear`,
            `nn.Embedding`, `TiledLinear`, `TiledEmbedding`, or a module with `out_features` that
            is called with (tokens, features) and returns logits.
        target: (…) classes as whole numbers, or (…, classes) probabilities.
        linear_bias: (classes,) for a head that has no bias of its own.
        weight: (classes,) factors of the classes.
        reduction: "mean", "sum" or "none".
        ignore_index: a class whose tokens count for nothing.
        label_smoothing: from 0 to 1.
        num_items: what the sum is divided by for the mean, where the tokens of a mean are spread
            over accumulation steps or ranks (transformers' `num_items_in_batch`).
        z_loss: factor of the square of log Σ exp of the logits, which is added to each loss.
        softcap: logits become softcap · tanh(logits / softcap), as in Gemma 2.
        logit_scale: logits are multiplied by it before.
        block_rows: tokens of a block; by default at most 2048.
        block_classes: classes of a block; by default as many as make 4 Mi logits.

    Returns:
        A scalar, or (…) for "none", in float32, or float64 for float64 inputs. The mean of no
        token is NaN, and its gradients are zero.

    Raises:
        TileShapeError: shapes do not fit together.
        TileDtypeError: the input's dtype is not the head's, without autocast; targets of a wrong
            dtype.
        TileDeviceError: the input is on another device than the head.
        TileIndexError: a target is no class; on an accelerator torch asserts it.
        ArgumentError: an option outside its range, or one that does not go with another.
        HomeIOError: a parked tile could not be read or written.

    Source:
        The options are those of `torch.nn.functional.linear_cross_entropy` and `cross_entropy`.

    Examples:
        >>> hidden, head = torch.randn(8, 64), memtile.TiledLinear(64, 1000, out_splits=4)
        >>> memtile.linear_cross_entropy(hidden, head, torch.arange(8)).shape
        torch.Size([])
    """
    options = LossOptions(weight, reduction, ignore_index, label_smoothing, num_items, z_loss)
    logits = Logits(layer_of(linear_weight), linear_bias, softcap, logit_scale)
    return _loss(input, logits, target, options, (block_rows, block_classes))


def token_log_probabilities(
    input: Tensor,
    linear_weight: Head,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    block_rows: int | None = None,
    block_classes: int | None = None,
) -> TokenLogProbabilities:
    """Each token's log-probability of its target and its entropy, without the logits.

    Memory, work, arguments and errors are those of `linear_cross_entropy`. A temperature is a
    `logit_scale` of 1 / temperature.

    Returns:
        `log_probabilities`, `entropy` and `log_sum_exp`, each (…) in float32, or float64 for
        float64 inputs, all differentiable. The log-probability of an ignored token is 0.

    Examples:
        >>> hidden, head = torch.randn(8, 64), torch.nn.Linear(64, 1000)
        >>> memtile.token_log_probabilities(hidden, head, torch.arange(8)).entropy.shape
        torch.Size([8])
    """
    logits = Logits(layer_of(linear_weight), linear_bias, softcap, logit_scale)
    classes = logits.check(input, target)
    check_classes(target, input.shape[:-1], classes, ignore_index)
    labels, valid = _labels(target, ignore_index)
    sums = logits.sums(input, ops.LogitQuery(labels, wants_mean=True), (block_rows, block_classes))
    assert sums.picked is not None
    assert sums.mean is not None
    chosen = torch.where(valid, sums.picked - sums.log_sum_exp, 0.0)
    found = (chosen, sums.log_sum_exp - sums.mean, sums.log_sum_exp)
    return TokenLogProbabilities(*(each.view(target.shape) for each in found))


class LinearCrossEntropy(nn.Module):
    """A head and its loss as one module, of which logits never exist.

    Args:
        head: as `linear_weight` of `linear_cross_entropy`; a module, with its own bias.
        weight: (classes,) factors of the classes, kept as a buffer.
        **options: the other options of `linear_cross_entropy`.

    Raises:
        ArgumentError: an option outside its range.

    Examples:
        >>> loss = memtile.LinearCrossEntropy(torch.nn.Linear(64, 1000), label_smoothing=0.1)
        >>> loss(torch.randn(8, 64), torch.arange(8)).shape
        torch.Size([])
    """

    weight: Tensor | None

    def __init__(
        self,
        head: nn.Module,
        *,
        weight: Tensor | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        block_rows: int | None = None,
        block_classes: int | None = None,
    ) -> None:
        super().__init__()
        self.head = head
        self.register_buffer("weight", weight)
        self.reduction, self.ignore_index = reduction, ignore_index
        self.label_smoothing, self.z_loss = label_smoothing, z_loss
        self.softcap, self.logit_scale = softcap, logit_scale
        self.block_rows, self.block_classes = block_rows, block_classes
        self._options(None).check(classes_of(head))
        Logits(head, None, softcap, logit_scale).check_options()

    def forward(
        self, input: Tensor, target: Tensor, num_items: int | Tensor | None = None
    ) -> Tensor:
        """The loss of `input` (…, features); arguments and errors of `linear_cross_entropy`."""
        logits = Logits(self.head, None, self.softcap, self.logit_scale)
        blocks = self.block_rows, self.block_classes
        return _loss(input, logits, target, self._options(num_items), blocks)

    def _options(self, num_items: int | Tensor | None) -> LossOptions:
        return LossOptions(
            self.weight,
            self.reduction,
            self.ignore_index,
            self.label_smoothing,
            num_items,
            self.z_loss,
        )


def _loss(
    input: Tensor, logits: Logits, target: Tensor, options: LossOptions, blocks: Blocks
) -> Tensor:
    classes = logits.check(input, target)
    options.check(classes)
    if target.is_floating_point():
        return _loss_of_probabilities(input, logits, target, options, blocks)
    check_classes(target, input.shape[:-1], classes, options.ignore_index)
    labels, valid = _labels(target, options.ignore_index)
    x, kept = rows_of(input), _kept_rows(valid)
    if kept is not None:
        x, labels = x.index_select(0, kept), labels.index_select(0, kept)
    smoothing = options.label_smoothing
    query = ops.LogitQuery(labels, class_weights=options.weight, uniform=smoothing / classes)
    sums = logits.sums(x, query, blocks)
    assert sums.picked is not None
    factors = None if options.weight is None else options.weight.to(sums.picked.dtype)
    own = None if factors is None else factors[labels.clamp(min=0)]
    losses = sums.log_sum_exp - sums.picked
    losses = losses if own is None else losses * own
    losses = losses if smoothing == 0.0 else losses * (1.0 - smoothing)
    losses = _with_common_terms(losses, sums, options)
    here = valid if kept is None else None
    losses = losses if here is None else torch.where(here, losses, 0.0)
    if options.reduction == "none":
        whole = losses if kept is None else losses.new_zeros(len(valid)).index_put((kept,), losses)
        return whole.view(target.shape)
    counted = valid.sum() if own is None else (own if here is None else own * here).sum()
    return _reduced(losses, counted, options)


def _loss_of_probabilities(
    input: Tensor, logits: Logits, target: Tensor, options: LossOptions, blocks: Blocks
) -> Tensor:
    classes, lead = classes_of(logits.head), input.shape[:-1]
    if target.shape != (*lead, classes):
        raise TileShapeError(
            f"{NAME}: the target's probabilities are {tuple(target.shape)}; for an input "
            f"{tuple(input.shape)} they must be {(*lead, classes)}"
        )
    if target.requires_grad:
        raise ArgumentError(
            f"{NAME}: a target that requires grad would need a gradient as large as the logits; "
            "give target.detach(), or make the logits for torch's own cross_entropy"
        )
    smoothing = options.label_smoothing
    query = ops.LogitQuery(
        probabilities=target.reshape(-1, classes),
        class_weights=options.weight,
        certain=1.0 - smoothing,
        uniform=smoothing / classes,
    )
    sums = logits.sums(input, query, blocks)
    losses = _with_common_terms(None, sums, options)
    if options.reduction == "none":
        return losses.view(lead)
    return _reduced(losses, len(losses), options)


def _with_common_terms(losses: Tensor | None, sums: ops.LogitSums, options: LossOptions) -> Tensor:
    """The losses (N,) with what smoothing, probabilities and the z-loss add."""
    if sums.weighted is not None and sums.mass is not None:
        spread = sums.mass * sums.log_sum_exp - sums.weighted
        losses = spread if losses is None else losses + spread
    assert losses is not None
    return losses + options.z_loss * sums.log_sum_exp.square() if options.z_loss else losses


def _reduced(losses: Tensor, counted: int | Tensor, options: LossOptions) -> Tensor:
    total = losses.sum()
    if options.reduction == "sum":
        return total
    by = counted if options.num_items is None else options.num_items
    return total / (by.to(total.device) if isinstance(by, Tensor) else by)


def _labels(target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(N,) classes, -1 for ignored tokens, and which are not ignored."""
    flat = target.reshape(-1).long()
    valid = flat != ignore_index
    return torch.where(valid, flat, -1), valid


def _kept_rows(valid: Tensor) -> Tensor | None:
    """The rows of tokens that are not ignored, where they are few enough to be copied."""
    if ops.transformed() or valid.is_meta or type(valid) is not Tensor:
        return None
    kept = valid.nonzero().squeeze(1)
    return kept if len(kept) < _MOST_KEPT * len(valid) else None
