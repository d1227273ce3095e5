"""Counts the bytes of the tensors that operations make, while they are held."""

import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from torch import Tensor

# Private by name; it is what PyTorch's own docs and tools build dispatch modes on.
from torch.utils._python_dispatch import TorchDispatchMode

Part = TypeVar("Part")


class _Repeats(threading.local):
    number = 1


_repeats = _Repeats()


def repeats() -> int:
    """For how many alike each operation stands that this thread does now."""
    return _repeats.number


def counted_parts(parts: Sequence[Part], like: Tensor) -> Iterator[Part]:
    """All parts; on the meta device, where work is done to be counted, three of many alike.

    They are the first, the second for all others, and the last, which may be smaller. Memory is the
    most from the second on, when results of the one before are still there.
    """
    if len(parts) < 4 or not like.is_meta:
        yield from parts
        return
    yield parts[0]
    before = _repeats.number
    _repeats.number *= len(parts) - 2
    try:
        yield parts[1]
    finally:
        _repeats.number = before
    yield parts[-1]


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make inside, until nothing holds them any more.

    Attributes:
        live: bytes that are held, by the phase in which they were made.
        peak: the same where their sum was largest.
        phase: 0 or 1, as the caller sets it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._storages: dict[int, tuple[weakref.ref[Any], int, int]] = {}
        self.live, self.peak, self.phase = [0, 0], (0, 0), 0

    def __torch_dispatch__(
        self,
        func: Any,  # an OpOverload; torch's own base class leaves it untyped
        types: Any,  # a tuple of tensor classes, likewise
        args: tuple[Any, ...] = (),  # whatever the operation takes
        kwargs: dict[str, Any] | None = None,  # whatever the operation takes
    ) -> Any:  # whatever the operation gives
        """Run the operation, and count what it made."""
        for tensor in tensors_in((args, kwargs)):
            self.know(tensor, 0)
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            self.know(tensor, tensor.untyped_storage().nbytes())
        return result

    def know(self, tensor: Tensor, nbytes: int) -> int:
        """Count a storage from now on, unless it is known; gives the bytes that were added."""
        storage = tensor.untyped_storage()
        key, phase = storage._cdata, self.phase
        if key in self._storages:
            return 0
        self._storages[key] = weakref.ref(storage, lambda _: self._freed(key)), nbytes, phase
        self.live[phase] += nbytes
        if sum(self.live) > sum(self.peak):
            self.peak = self.live[0], self.live[1]
        return nbytes

    def _freed(self, key: int) -> None:
        _, nbytes, phase = self._storages.pop(key)
        self.live[phase] -= nbytes


def tensors_in(tree: object) -> list[Tensor]:
    """The tensors in nested lists, tuples and dicts; torch's `tree_leaves` takes twice as long."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, list | tuple):
        return []
    return [tensor for branch in tree for tensor in tensors_in(branch)]
