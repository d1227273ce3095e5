"""Measures memory: the process's peak, the peak of its tensors, the largest allocation."""

import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Final

import torch
from torch.profiler import ProfilerActivity, profile

# Private by name; it is what PyTorch's own docs and tools build dispatch modes on.
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from memtile.errors import UnsupportedPlatformError

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK: Final = "5"  # proc(5): writing 5 sets VmHWM back to VmRSS
_PLAIN_TENSORS: Final = frozenset({torch.Tensor, torch.nn.Parameter})


class PeakMemory:
    """The most memory the process held while the block ran, in bytes above what it held on entry.

    It is the kernel's own count of resident memory (`VmHWM`), so it sees allocations that PyTorch
    does not make, and pages of mapped files too. It counts the whole process with all its threads.
    Memory that was freed before entry and never given back to the kernel is not counted when it is
    used again: measure in a fresh process where that matters. Blocks may be nested.

    Raises:
        UnsupportedPlatformError: on entry, where the kernel does not keep or reset this count.
    """

    _running: ClassVar[list["PeakMemory"]] = []

    def __init__(self) -> None:
        self._at_entry = 0
        self._most = 0

    def __enter__(self) -> "PeakMemory":
        self.ensure_measurable()
        self._at_entry = self._most = _status_bytes("VmRSS")
        self._running.append(self)
        return self

    def __exit__(self, *raised: object) -> None:
        self._note()
        self._running.remove(self)

    @property
    def nbytes(self) -> int:
        """Bytes above the memory held on entry: up to now inside the block, its total after it."""
        if self in self._running:
            self._note()
        return self._most - self._at_entry

    @staticmethod
    def ensure_measurable() -> None:
        """Reset the peak; UnsupportedPlatformError where it cannot be read and reset."""
        if sys.platform != "linux":
            raise UnsupportedPlatformError(
                f"Peak memory is read from Linux's /proc, and this is {platform.system()}: "
                "run it on Linux, or in a Linux container or virtual machine."
            )
        for running in PeakMemory._running:
            running._note()  # what the reset below would lose
        try:
            _CLEAR_REFS.write_text(_RESET_PEAK)
        except OSError as error:
            raise UnsupportedPlatformError(
                f"Peak memory is measured by writing to {_CLEAR_REFS}, which this system refuses "
                f"({error.strerror}): run it where /proc is mounted writable."
            ) from error

    def _note(self) -> None:
        self._most = max(self._most, _status_bytes("VmHWM"))


class LargestAllocation(TorchDispatchMode):
    """The largest piece of memory that one PyTorch operation allocates while the block runs.

    A piece is the storage of an operation's result, unless an argument already owned it: views and
    in-place operations allocate nothing. Two things are not seen: workspace that an operation takes
    and gives back inside itself, and memory that does not come from a PyTorch operation. The ops
    of backward and of an optimizer are seen; the block runs slower, so time nothing in it.

    Attributes:
        nbytes: bytes of the largest piece, 0 if nothing was allocated.
        op: the operation that made it, such as `aten.mm`, or "" if nothing was allocated.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.nbytes = 0
        self.op = ""

    def __torch_dispatch__(
        self,
        func: Any,  # an OpOverload; PyTorch's own base class leaves it untyped
        types: Any,  # a tuple of tensor classes, likewise
        args: tuple[Any, ...] = (),  # whatever the operation takes
        kwargs: dict[str, Any] | None = None,  # whatever the operation takes
    ) -> Any:  # whatever the operation gives
        """Run the operation, and note its largest new storage."""
        if not _PLAIN_TENSORS.issuperset(types):
            return NotImplemented  # a subclass unpacks itself first; its plain inner ops come back
        owned = {_piece(tensor) for tensor in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            piece = _piece(tensor)
            if piece not in owned and piece[1] > self.nbytes:
                self.nbytes, self.op = piece[1], str(func.overloadpacket)
        return result


def peak_allocated_bytes(function: Callable[[], Any]) -> int:
    """The most tensor memory, in bytes, that was allocated at once while the function ran.

    Counted are the allocations of PyTorch's CPU allocator, temporaries inside operations included,
    above what was there before. What the function returns is alive until the count ends.

    Args:
        function: called once, without arguments.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    del result
    kineto = profiler.profiler
    assert kineto is not None
    assert kineto.kineto_results is not None
    events = [event for event in kineto.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.device_type().name == "CPU":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024  # proc(5): in kB, which are KiB
    raise UnsupportedPlatformError(
        f"{_STATUS} has no {field} on this system: run it on a Linux kernel that reports it."
    )


def _tensors(tree: object) -> Iterator[torch.Tensor]:
    """The tensors of a nest of containers that hold memory: those on the meta device hold none."""
    for leaf in tree_leaves(tree):
        if type(leaf) in _PLAIN_TENSORS and leaf.layout == torch.strided and not leaf.is_meta:
            yield leaf


def _piece(tensor: torch.Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()
