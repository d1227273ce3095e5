"""How much tensor memory a function holds at its peak, by PyTorch's own account."""

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


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
