"""`DeferredLogits`: a head's logits, computed when something needs them, and never for a loss.

Shapes: N tokens, H features, V classes; the head's input (…, H), logits (…, V).

`torch.nn.functional.cross_entropy` of deferred logits, directly or through `nn.CrossEntropyLoss` or
a loss of transformers, is `linear_cross_entropy` of the head's input. What models do between head
and loss is noted and done later: row slices and reshapes on the input, factors, tanh and casts on
the logits. Anything else computes the logits, once, as the head would have.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from memtile import ops
from memtile.layers.deferred import Deferred, LayerState
from memtile.layers.linear_cross_entropy import linear_cross_entropy

_RESHAPES: Final = {"view", "reshape", "flatten", "squeeze", "unsqueeze"}
_CASTS: Final = {"float", "double", "half", "bfloat16", "to"}
Change = Callable[[Any], Any]  # a function of a tensor, with its other arguments
Step = tuple[str, Any, Change]  # its name, its number where it has one, and itself


class DeferredLogits(Deferred):
    """Logits (…, V) that are computed when they are used for anything but a loss."""

    stale = (
        "these logits were left to be computed when they are needed, and the head's weight "
        "was replaced or written to since: read them before the optimizer's step (before "
        'backward, where mode="in_backward"), or call memtile.defer_logits(model, False)'
    )
    refused = (
        "a gradient came to logits that were left to be computed when they are needed, from an "
        "autograd.Function, which takes them for computed; give it logits + 0, or call "
        "memtile.defer_logits(model, False)"
    )
    _head: Any  # a `DeferringHead`
    _state: LayerState
    _x: Tensor  # (…, H)
    _steps: tuple[Step, ...]  # on the logits, in order
    _records: bool  # whether gradients were on
    _logits: Tensor | None = None
    _source: "tuple[DeferredLogits, Change] | None"  # which these are made of, and how
    _made: "list[weakref.ref[DeferredLogits]]"  # of these
    has_loss: bool  # whether a loss was computed of these, or of what shares their values

    @staticmethod
    def __new__(
        cls,
        head: Any,
        state: LayerState,
        x: Tensor,
        dtype: torch.dtype,
        steps: tuple[Step, ...],
        records: bool,
    ) -> "DeferredLogits":
        """The logits of x (…, H) by a `DeferringHead`, of this dtype after the steps."""
        shape = (*x.shape[:-1], head.out_features)
        trained = x.requires_grad or any(p.requires_grad for p in head.parameters())
        made: DeferredLogits = cls.empty(shape, dtype, x.device, records and trained)
        made._head, made._state, made._x = head, state, x
        made._steps, made._records = steps, records
        made._logits, made._source, made._made, made.has_loss = None, None, [], False
        return made

    @classmethod
    def of(cls, head: Any, x: Tensor) -> "DeferredLogits":
        """The logits that a head gives its input (…, H)."""
        state = LayerState.of(head, x)
        return cls(head, state, x, state.autocast or x.dtype, (), torch.is_grad_enabled())

    @property
    def grad_fn(self) -> Any:  # type: ignore[override]  # to stubs an attribute
        """That of something they are made of, in an engine: DeepSpeed hooks what has one.

        None elsewhere, as of leaves: DDP puts an `autograd.Function` around results that have one.
        """
        is_made = "_x" in self.__dict__
        if not is_made or not self.requires_grad or not self._head.defers_in_engine:
            return None
        if self._logits is not None:
            return self._logits.grad_fn
        given = (t for t in (self._x, *self._head.parameters()) if t.requires_grad)
        first = next(given, None)
        return None if first is None else get_gradient_edge(first).node

    def register_hook(self, hook: Callable[[Tensor], Any]) -> Any:
        """As of its values, once they are computed."""
        if self._logits is not None:
            return self._logits.register_hook(hook)
        return super().register_hook(hook)

    def computed(self) -> Tensor:
        """The logits, differentiable if they were made where gradients are on."""
        if self._logits is None:
            source = None if self._source is None else self._source[0]._logits
            if self._source is not None and source is not None:
                with torch.set_grad_enabled(self._records):
                    values = self._source[1](source)
                self._logits = self._hooked(values, [self])  # the others are of the source
            else:
                with self._state.again(self._x, self._records, self.stale):
                    values = self._head.now(self._x)
                    for _, _, step in self._steps:
                        values = step(values)
                self._logits = self._hooked(values, self._with_sources())
        assert self._logits is not None
        return self._logits

    def compute_family(self) -> None:
        """Compute these logits and all that may share memory with them, before one is written."""
        *_, first = self._with_sources()
        first._compute_with_made()

    def _compute_with_made(self) -> None:
        self.computed()
        for made in [reference() for reference in self._made]:
            if made is not None:
                made._compute_with_made()

    def loss(self, target: Tensor, **options: Any) -> Tensor | None:
        """`cross_entropy` of them without computing them; None where it takes their values."""
        form = _scale_and_softcap(self._steps)
        if form is None or self._logits is not None or self.dim() != 2:
            return None
        records = self._records and torch.is_grad_enabled()
        dtype = self.dtype if ops.autocast_dtype(self._x) is None else None  # autocast: float32
        with self._state.again(self._x, records, self.stale):
            loss = linear_cross_entropy(
                self._x, self._head, target, logit_scale=form[0], softcap=form[1], **options
            )
        for each in self._with_sources() if records else ():
            each.has_loss = True
        return self._hooked(loss.to(dtype or loss.dtype), self._with_sources())

    def _hooked(self, result: Tensor, owners: "Iterable[DeferredLogits]") -> Tensor:
        """A result with the hooks that engines have given to these."""
        for hook in (hook for each in owners for hook in each.engine_hooks.values()):
            if result.requires_grad:
                result.register_hook(hook)
        return result

    def _with_sources(self) -> "Iterator[DeferredLogits]":
        """They, and all that they are made of."""
        each: DeferredLogits | None = self
        while each is not None:
            yield each
            each = None if each._source is None else each._source[0]

    def changed(self, name: str, change: Change, others: Sequence[Any]) -> Any:
        """They after a function of this name, still deferred; None where it takes their values."""
        if self._logits is not None or any(isinstance(each, Tensor) for each in others):
            return None
        if name == "contiguous" and not others:
            return self
        if name in _RESHAPES or name == "__getitem__":
            return self._with_rows(name, change)
        is_factor = name in ("mul", "div") and [*map(type, others)] in ([int], [float])
        is_cast = name in _CASTS and all(isinstance(each, torch.dtype) for each in others)
        if not (is_factor or is_cast or (name == "tanh" and not others)):
            return None
        one = change(torch.empty(1, dtype=self.dtype, device="meta"))
        step = name, others[0] if is_factor else None, change
        return self._made_by(change, self._x, one.dtype, (*self._steps, step))

    def _with_rows(self, name: str, change: Change) -> "DeferredLogits | None":
        """They after a function of the leading dimensions, which is done on the head's input."""
        classes, width = self.shape[-1], self._x.shape[-1]
        shape = change(torch.empty(1, device="meta").expand(self.shape)).shape
        if len(shape) < 2 or shape[-1] != classes or classes == width:
            return None  # of the last dimension, or it cannot be told
        with torch.set_grad_enabled(self._records and torch.is_grad_enabled()):
            whole = name == "__getitem__"
            x = change(self._x) if whole else self._x.reshape(*shape[:-1], width)
        same = x.shape == (*shape[:-1], width)
        return self._made_by(change, x, self.dtype, self._steps) if same else None

    def _selected(self, index: Tensor) -> "DeferredLogits | None":
        """The rows that a mask of leading dimensions selects, or numbers of the first one."""
        if self._logits is not None:
            return None
        is_mask = index.dtype == torch.bool
        rows = index.dim() if is_mask else 1
        fits = index.shape == self.shape[:rows] if is_mask else index.dtype == torch.int64
        if not fits or not 0 < rows < self.dim():
            return None  # of the last dimension, or an error
        own = index.clone()  # it may be written to

        def select(t: Tensor) -> Tensor:
            return t[own]

        with torch.set_grad_enabled(self._records and torch.is_grad_enabled()):
            x = select(self._x)
        return self._made_by(select, x, self.dtype, self._steps)

    def _made_by(
        self, change: Change, x: Tensor, dtype: torch.dtype, steps: tuple[Step, ...]
    ) -> "DeferredLogits":
        records = self._records and torch.is_grad_enabled()
        made = DeferredLogits(self._head, self._state, x, dtype, steps, records)
        made._source, made.has_loss = (self, change), self.has_loss
        self._made.append(weakref.ref(made))
        return made

    @classmethod
    def kept(cls, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Loss, or logits that are still deferred."""
        if func is functional.cross_entropy:
            return _loss(*args, **kwargs)
        if not args or not isinstance(args[0], DeferredLogits):
            return None
        others = tree_leaves((args[1:], kwargs))
        name = getattr(func, "__name__", "")
        if name == "__getitem__" and not _is_basic(args[1]):  # lists and arrays may be written to
            return args[0]._selected(args[1]) if type(args[1]) is Tensor else None
        return args[0].changed(name, lambda t: func(t, *args[1:], **kwargs), others)


def _is_basic(index: Any) -> bool:
    """Whether it is made of numbers and slices, which do not change."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(type(part) in (int, slice, type(None), type(...)) for part in parts)


def _loss(
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """The arguments of `cross_entropy`; None where it takes values of logits."""
    others = isinstance(target, DeferredLogits) or isinstance(weight, DeferredLogits)
    if not isinstance(input, DeferredLogits) or others or (size_average, reduce) != (None, None):
        return None
    return input.loss(
        target,
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


def _scale_and_softcap(steps: Sequence[Step]) -> tuple[float, float | None] | None:
    """The s and c for which the steps are c·tanh(s·z / c), or s·z (c is None); or None."""
    before, after, bounded = 1.0, 1.0, False
    for name, number, _ in steps:
        if name == "tanh":
            if bounded:
                return None
            bounded = True
        elif number is not None:
            factor = number if name == "mul" else 1.0 / number
            before, after = (before, after * factor) if bounded else (before * factor, after)
    if not bounded:
        return before, None
    return (before * after, after) if after > 0.0 else None
