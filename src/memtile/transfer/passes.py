"""Where a pass begins and ends, so that no slab is used that could be older than its tile.

Writes through `.data`, by foreign optimizers or through a mapping cannot be seen from here. So no
slab outlives the pass that filled it: a forward, with the backward through it. A pass begins when
the outermost module is entered that memtile knows (the model that was tiled, or else a tiled layer
by itself), and every slab is emptied then. It ends with the last node of its backward. What is
recomputed inside backward belongs to the pass that it is recomputed for.
"""

import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.autograd import Variable

from memtile.homes import lock_of_a_module, trim_heap
from memtile.transfer.ferries import every_ferry


class _Here(threading.local):
    """The model that this thread has entered and not left, and how deep it is in tiled layers."""

    model: "weakref.ref[nn.Module] | None" = None
    depth = 0


_here = _Here()
_CALL = nn.Module._call_impl.__code__  # what runs a module's hooks and its forward
_numbers = count(1)
_current = 0  # the number of the pass whose tiles the slabs hold
_backwards: set[int] = set()  # graph tasks of the engine that have brought tiles in
_lock = lock_of_a_module()


def current_pass() -> int:
    """The number of the running pass, for nodes of its graph to keep."""
    return _current


@contextmanager
def layer_call() -> Iterator[None]:
    """One call of a tiled layer: a pass of its own unless it is part of one."""
    if not _here.depth and not in_backward() and not _is_in_model():
        _begin()
    _here.depth += 1
    try:
        yield
    finally:
        _here.depth -= 1


def _is_in_model() -> bool:
    """Whether the call of the model that this thread has entered is still under way.

    The stack is asked: a Ctrl-C, wherever it comes, passes by the hook that leaves the model.
    """
    model = None if _here.model is None else _here.model()
    frame: FrameType | None = None if model is None else sys._getframe()
    while frame is not None:
        if frame.f_code is _CALL and frame.f_locals["self"] is model:
            return True
        frame = frame.f_back
    _here.model = None
    return False


def in_backward() -> bool:
    """Whether the autograd engine is running in this thread."""
    return torch._C._current_graph_task_id() != -1


def watch_model(model: nn.Module) -> None:
    """Let calls of this model be passes, read ahead from layer to layer."""
    if _enter_model not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_enter_model)
        model.register_forward_hook(_leave_model, always_call=True)


def unwatch_model(model: nn.Module) -> None:
    """Take it back."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for number in [n for n, hook in hooks.items() if hook in (_enter_model, _leave_model)]:
            del hooks[number]
            model._forward_hooks_always_called.pop(number, None)


def _enter_model(module: nn.Module, arguments: Any) -> None:  # whatever the model takes
    if torch.compiler.is_compiling() or in_backward():
        return
    _here.model = weakref.ref(module)
    _begin()


def _leave_model(module: nn.Module, arguments: Any, output: Any) -> None:  # likewise
    if torch.compiler.is_compiling() or in_backward():
        return
    _here.model = None
    if not torch.is_grad_enabled():
        _end()


def _begin() -> None:
    global _current
    with _lock:
        _current = next(_numbers)
        _backwards.clear()  # what is left are those that failed
    for ferry in every_ferry():
        ferry.start()


def _end() -> None:
    for ferry in every_ferry():
        ferry.clear()


def enter_backward(number: int) -> None:
    """A node of a graph brings a tile in, or sends a gradient home.

    Args:
        number: the pass that made the node.
    """
    global _current
    task = torch._C._current_graph_task_id()
    with _lock:
        if task in _backwards:
            return
        if _backwards or number != _current:  # one that failed, a nested one, or an older graph
            _end()
            _current = number
        _backwards.add(task)
    Variable._execution_engine.queue_callback(lambda: _end_backward(task))


def _end_backward(task: int) -> None:
    with _lock:
        _backwards.discard(task)
    try:
        for ferry in every_ferry():
            ferry.settle()
    finally:
        _end()
        if every_ferry():
            trim_heap()  # activations were freed in the middle of what was made meanwhile
