"""`Deferred`: what a layer gives, computed when something needs its values."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from memtile import ops
from memtile.errors import DeferredLogitsError
from memtile.layers.gathered_calls import is_of_engine
from memtile.layers.handle import FREE, READ_BASE, written_by


@dataclass(frozen=True)
class LayerState:
    """What a layer's values depend on besides its input, when it is called."""

    layer: nn.Module
    versions: tuple[tuple[int, int], ...]
    autocast: torch.dtype | None

    @classmethod
    def of(cls, layer: nn.Module, x: Tensor) -> "LayerState":
        """That of now."""
        return cls(layer, _versions(layer), ops.autocast_dtype(x))

    @contextmanager
    def again(self, x: Tensor, records: bool, stale: str) -> Iterator[None]:
        """The state as it was; an error that says `stale` where the layer was written to since."""
        if self.versions != _versions(self.layer):
            raise DeferredLogitsError(stale)
        autocast: AbstractContextManager[object] = nullcontext()
        if self.autocast != ops.autocast_dtype(x):
            enabled = self.autocast is not None
            autocast = torch.autocast(x.device.type, self.autocast, enabled=enabled)
        with torch.set_grad_enabled(records), autocast:
            yield


def _versions(layer: nn.Module) -> tuple[tuple[int, int], ...]:
    """Which parameters it has, and how often each was written to."""
    steps = getattr(layer, "steps_of_engine", 0)
    own = ((id(p), 0 if p.is_inference() else p._version) for p in layer.parameters())
    return ((0, steps), *own)


class Deferred(Tensor):
    """A tensor whose values are computed when they are used for anything but what keeps it so."""

    free: ClassVar[frozenset[Any]] = FREE | {READ_BASE}  # FSDP2 asks whether results are views
    engine_hooks: "OrderedDict[int, Callable[[Tensor], Any]]"  # for the gradient
    stale: ClassVar[str]  # what to say where the layer was written to before they were computed
    refused: ClassVar[str]  # and where a gradient comes to values that were not computed

    @classmethod
    def empty(
        cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device, trained: bool
    ) -> Any:
        """One without attributes."""
        made: Deferred = Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=device, requires_grad=trained
        )
        made.engine_hooks = OrderedDict()
        if trained:
            with torch._C.DisableTorchFunctionSubclass():
                made.register_post_accumulate_grad_hook(_refuse_gradient)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return made

    def __repr__(self) -> str:  # type: ignore[override]  # torch adds a keyword that nothing passes
        return repr(self.computed())

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.computed(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.computed().__reduce_ex__(protocol)

    def register_hook(self, hook: Callable[[Tensor], Any]) -> Any:
        """An engine's, of the results of a model, waits for what uses them; others need values."""
        if not is_of_engine(hook):
            return self.computed().register_hook(hook)
        handle = RemovableHandle(self.engine_hooks)
        self.engine_hooks[handle.id] = hook
        return handle

    def computed(self) -> Tensor:
        """The values, differentiable if they were made where gradients are on."""
        raise NotImplementedError

    def compute_family(self) -> None:
        """Compute it and all that may share memory with it, before one is written."""
        raise NotImplementedError

    @classmethod
    def kept(cls, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What a function gives without the values; None where it takes them."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in cls.free:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        found = cls.kept(func, args, kwargs)
        if found is not None:
            return found
        for each in tree_leaves(written_by(func, args, kwargs)[1]):
            if isinstance(each, Deferred):
                each.compute_family()
        return func(*tree_map(_computed, tuple(args)), **tree_map(_computed, kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub lacks the function argument
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*tree_map(_computed, tuple(args)), **tree_map(_computed, kwargs or {}))


def _computed(value: Any) -> Any:
    return value.computed() if isinstance(value, Deferred) else value


def _refuse_gradient(deferred: Deferred) -> None:
    """Only an `autograd.Function` that was given the tensor itself sends a gradient here."""
    raise DeferredLogitsError(deferred.refused)
