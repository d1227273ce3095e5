"""What a computation is given again when it is done a second time: random numbers and autocast."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import Tensor


class RandomStates:
    """The states of the random number generators before each of several computations.

    They are those of the CPU and of the tensors' devices, and are dropped if nothing was drawn.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        found = {t.device for t in tensors if t.device.type not in ("cpu", "meta")}
        self._devices = sorted(found, key=str)
        self._states: list[list[Tensor]] = []

    def note(self) -> None:
        """Another computation begins."""
        self._states.append(self._now())

    def close(self) -> None:
        """The last one is over."""
        if self._states and all(map(torch.equal, self._states[0], self._now())):
            self._states.clear()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """A context after which the generators are as they were before it."""
        if not self._states:
            yield
            return
        before = self._now()
        try:
            yield
        finally:
            self._set(before)

    def restore(self, number: int) -> None:
        """Draw what this computation drew."""
        if self._states:
            self._set(self._states[number])

    def _now(self) -> list[Tensor]:
        each = (torch.get_device_module(d).get_rng_state(d) for d in self._devices)
        return [torch.get_rng_state(), *each]

    def _set(self, states: Sequence[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for device, state in zip(self._devices, states[1:], strict=True):
            torch.get_device_module(device).set_rng_state(state, device)


class AutocastState:
    """Autocast as it was, for the CPU and the tensors' devices, when this was made."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        kinds = {"cpu"} | {tensor.device.type for tensor in tensors}
        self._caches = torch.is_autocast_cache_enabled()
        self._of = {
            kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in sorted(kinds)
            if torch.amp.is_autocast_available(kind)
        }

    @contextmanager
    def restored(self) -> Iterator[None]:
        """A context with autocast as it was."""
        with ExitStack() as stack:
            for kind, (enabled, dtype) in self._of.items():
                cast = torch.autocast(kind, dtype, enabled=enabled, cache_enabled=self._caches)
                stack.enter_context(cast)
            yield


@contextmanager
def kept_random_states(tensors: Sequence[Tensor]) -> Iterator[None]:
    """A context after which random numbers are drawn as if nothing had been drawn inside."""
    states = RandomStates(tensors)
    states.note()
    with states.kept():
        yield


def saved_for_itself() -> AbstractContextManager[None]:
    """A context for a graph that is dropped at once: hooks around it do not see what it saves.

    A checkpoint would wait for it in its recomputation, and offloading would move it.
    """
    return torch.autograd.graph.saved_tensors_hooks(_same, _same)


def _same(tensor: Tensor) -> Tensor:
    return tensor
