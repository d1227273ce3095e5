"""What a loss over tiles of the vocabulary is given, and the checks of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from memtile import ops
from memtile.errors import (
    ArgumentError,
    TileDtypeError,
    TileIndexError,
    TileShapeError,
    check_fraction,
    check_number,
    check_whole_number,
)
from memtile.layers import checks
from memtile.layers.head_tiles import NAME, Head, classes_of, head_sums
from memtile.layers.weight_tiles import check_matrix

Blocks = tuple[int | None, int | None]  # rows and classes


@dataclass(frozen=True)
class LossOptions:
    """How losses are made of sums of logits."""

    weight: Tensor | None
    reduction: str
    ignore_index: int
    label_smoothing: float
    num_items: int | Tensor | None
    z_loss: float

    def check(self, classes: int) -> None:
        """Raise where one is outside its range."""
        if self.reduction not in ("mean", "sum", "none"):
            raise ArgumentError(f'reduction={self.reduction!r} must be "mean", "sum" or "none"')
        check_fraction("label_smoothing", self.label_smoothing)
        check_number("z_loss", self.z_loss, "a number", isfinite)
        if not isinstance(self.ignore_index, int):
            raise ArgumentError(
                f"ignore_index={self.ignore_index!r} must be a whole number: the class of tokens "
                "that count for nothing, or one that no token has, such as -100"
            )
        if self.weight is not None:
            _check_size("weight", self.weight, classes)
        if self.num_items is not None and self.reduction != "mean":
            raise ArgumentError(
                f"num_items={self.num_items} is what the mean divides by, and "
                f'reduction={self.reduction!r} divides by nothing; use reduction="mean"'
            )


@dataclass(frozen=True)
class Logits:
    """A head, and what its logits go through."""

    head: Head
    bias: Tensor | None
    softcap: float | None
    scale: float

    def check_options(self) -> None:
        """Raise where one is outside its range."""
        if self.softcap is not None:
            rule = "a number above 0; None: logits as they are"
            check_number("softcap", self.softcap, rule, lambda number: number > 0.0)
        rule = "a number; for a learnt one multiply the input by it, which gives it a gradient"
        check_number("logit_scale", self.scale, rule, isfinite)

    def check(self, input: Tensor, target: Tensor) -> int:
        """How many classes there are; raises where an option or a tensor does not fit."""
        self.check_options()
        for name, given in (("input", input), ("target", target)):
            if not isinstance(given, Tensor):
                raise TileDtypeError(f"{NAME}: the {name} is a {type(given).__name__}, no tensor")
        if input.dim() == 0:
            raise TileShapeError(f"{NAME}: the input has no dimensions; it must be (…, features)")
        if isinstance(self.head, Tensor):
            check_matrix(NAME, self.head)
            checks.split_sizes(NAME, input.shape[-1], 1, [self.head.shape[1]])
        classes = classes_of(self.head)
        if self.bias is not None:
            _check_size("linear_bias", self.bias, classes)
        return classes

    def sums(self, input: Tensor, query: ops.LogitQuery, blocks: Blocks) -> ops.LogitSums:
        """Those of the logits of the input (…, H), of each token (N,)."""
        for name, size in zip(("block_rows", "block_classes"), blocks, strict=True):
            if size is not None:
                check_whole_number(name, size, 1)
        asked = query.through(self.scale, self.softcap)
        return head_sums(self.head, self.bias, rows_of(input), asked, *blocks)


def _check_size(name: str, given: object, classes: int) -> None:
    if not isinstance(given, Tensor) or given.shape != (classes,):
        kind = tuple(given.shape) if isinstance(given, Tensor) else f"a {type(given).__name__}"
        raise TileShapeError(
            f"{NAME}: {name} is {kind}; it must be ({classes},), one for each class"
        )


def rows_of(input: Tensor) -> Tensor:
    """The tokens (N, H) of an input (…, H)."""
    return input.reshape(-1, input.shape[-1])


def check_classes(target: Tensor, lead: Sequence[int], classes: int, ignore_index: int) -> None:
    """Raise where the target is no class for each token of an input (lead…, H)."""
    if target.dtype not in (torch.int64, torch.int32, torch.uint8):
        raise TileDtypeError(
            f"{NAME}: the target is {target.dtype}; classes are int64, int32 or uint8, "
            "probabilities floating point"
        )
    if target.shape != torch.Size(lead):
        raise TileShapeError(
            f"{NAME}: the target is {tuple(target.shape)}; classes of an input (…, features) must "
            f"be {tuple(lead)}"
        )
    if ops.transformed() or target.is_meta or not target.numel():
        return
    wrong = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if not target.is_cpu:  # without waiting for the device
        torch._assert_async(~wrong.any())
    elif wrong.any():
        raise TileIndexError(
            f"{NAME}: a target is {int(target[wrong][0])}, the classes are 0 to {classes - 1}; "
            f"tokens to leave out are ignore_index={ignore_index}"
        )
