"""The slab rings of each home, and the iterations after which their contents are discarded.

Writes through `.data`, by foreign optimizers or through a mapping cannot be seen from here. So what
a slab holds is only used in the iteration that read it: a forward, with the backward through it.
An iteration begins when the outermost module that memtile knows is entered (the model that was
tiled, or else a tiled layer by itself), and gets a number. It ends with the last node of its
backward. What is recomputed inside backward belongs to the iteration it is recomputed for.

It concerns the homes that it visits, and no others: the first visit empties the home's slabs, and
waits for what is being written there. Slabs that a newer iteration of another thread has emptied
hold nothing from before this one, and stay as they are. Likewise a backward: it flushes and empties
the homes that it has visited.
"""

import os
import sys
import threading
import weakref
from contextlib import AbstractContextManager
from itertools import count
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.autograd import Variable

from memtile.homes import Home, TensorTable, WorkerThreads, fork_safe_lock, trim_heap
from memtile.transfer.kept import KeptTiles
from memtile.transfer.slab_ring import SlabRing

# Threads a home. Four saturate an idle disk; while products keep all cores busy a thread waits for
# its turn to ask for more, and with eight pieces under way the disk does not wait with it.
READERS = 8
SLABS = 3  # the tile that is worked on, the next, and one that is written or read
GRADIENT_SLABS = 2

_CALL = nn.Module._call_impl.__code__  # what runs a module's hooks and its forward


class SlabRings:
    """The slab rings of one home, with one set of reader threads, and what is kept of it.

    Attributes:
        iteration: the newest one that has visited the home: nothing in a slab was read before it.
        backwards: those that have visited the home: autograd's graph tasks, and their threads.
    """

    def __init__(self, kept_bytes: int = 0, slab_bytes: int = 0) -> None:
        self.kept = KeptTiles(kept_bytes)
        self.iteration = 0
        self.backwards: dict[int, int] = {}
        self._workers = WorkerThreads(READERS, "memtile")
        self._process, self._is_closed = os.getpid(), False
        self._slab_bytes = slab_bytes
        self._make()

    def _make(self) -> None:
        """New rings: their slabs have no memory before they are used."""
        least = self._slab_bytes
        self.weights = SlabRing(self._workers, SLABS, least)  # of forward and backward
        self.gradients = SlabRing(self._workers, GRADIENT_SLABS)  # on their way home
        self.steps = SlabRing(self._workers, SLABS, least)  # what an optimizer works on
        self.activations = SlabRing(self._workers, SLABS)  # what is saved for backward

    def all(self) -> tuple[SlabRing, ...]:
        """Those of parameters, which may be written to by others between iterations."""
        return self.weights, self.gradients, self.steps

    @property
    def works(self) -> bool:
        """Whether its threads run: not in a fork, which has none of them, nor once closed."""
        return self._process == os.getpid() and not self._is_closed

    def start(self, home: Home, iteration: int) -> None:
        """Begin an iteration: nothing that was read before a write is used in it."""
        self.flush()
        # Slabs are discarded in between: what is kept was read while writes were watched.
        was_written = home.kept_bytes > 0 and home.watch_writes()
        for ring in self.all():
            ring.start()
        if was_written:
            self.kept.clear()
        thread = threading.get_ident()
        with state.lock:  # last, so that other threads do not use what was not yet discarded
            self.iteration = max(self.iteration, iteration)
            failed = [task for task, own in self.backwards.items() if own == thread]
            for task in failed:
                del self.backwards[task]

    def discard(self) -> None:
        """Discard everything that was read."""
        for ring in self.all():
            ring.clear()

    def flush(self) -> None:
        """Return once everything that was stored is at home; HomeIOError where it cannot be."""
        if self.works:
            for ring in self.all():
                ring.flush()

    def clear(self) -> None:
        """Discard the values and state that were read before: by a step that was given up, say."""
        self.steps.clear()
        self.weights.clear()

    def close(self) -> None:
        """End the reader threads, without waiting for them, and free the slabs."""
        self._is_closed = True
        if self._process == os.getpid():  # a child has none, and their locks are as they were
            self._workers.close()
        self._make()
        self.kept = KeptTiles(0)


class _Thread(threading.local):
    """The calls that one thread is in."""

    model: "weakref.ref[nn.Module] | None" = None  # watched, entered and not left
    parking: AbstractContextManager[object] | None = None  # entered by this call, and not left
    depth = 0  # of tiled layers
    iteration = 0  # the last one that began in this thread
    goes_home = False  # see `transfer.parked.gradients_go_home`


class IterationState:
    """What this process knows of its homes, iterations and parameters.

    Its lock guards the table of rings, and of each the iteration and backwards.
    """

    def __init__(self) -> None:
        self.lock = fork_safe_lock()
        self.rings: weakref.WeakKeyDictionary[Home, SlabRings] = weakref.WeakKeyDictionary()
        self.numbers = count(1)  # of iterations
        self.thread = _Thread()
        self.trained = TensorTable[Any]()  # what `transfer.parked` knows of each parameter
        # what is entered in each call of a model that keeps anything for backward
        self.parking = weakref.WeakKeyDictionary[nn.Module, AbstractContextManager[object]]()

    def begin(self) -> None:
        """Begin an iteration in this thread, at the homes that it will visit."""
        self.thread.iteration = next(self.numbers)

    def end(self) -> None:
        """End this thread's: discard what it read, unless a newer one shares the home."""
        with self.lock:
            every = list(self.rings.values())
        for found in every:
            if found.works and found.iteration == self.thread.iteration:
                found.discard()


state = IterationState()


def rings_of(home: Home) -> SlabRings:
    """The slab rings of this home, made when first needed; HomeError where it is closed."""
    found = state.rings.get(home)
    if found is not None and found.works:
        return found
    with state.lock:  # two rings for the same tiles would not know of each other's writes
        found = state.rings.get(home)
        if found is None or not found.works:
            home.check_open()
            if home.kept_bytes:
                home.watch_writes()  # before the first read
            found = state.rings[home] = SlabRings(home.kept_bytes, home.slab_bytes)
            home.when_closed(found.flush, found.close)
        return found


def visited_rings(home: Home) -> SlabRings:
    """The rings of a home whose tiles are read now, in this thread's iteration; as `rings_of`."""
    found, iteration = rings_of(home), state.thread.iteration
    if iteration > found.iteration and not in_backward():
        found.start(home, iteration)
    return found


class _LayerCall:
    """One for all calls and threads: what it changes is the thread's own."""

    def __enter__(self) -> None:
        thread = state.thread
        if not thread.depth and not in_backward() and not _is_in_model():
            state.begin()
        thread.depth += 1

    def __exit__(self, *raised: object) -> None:
        state.thread.depth -= 1


_layer_call = _LayerCall()


def layer_call() -> AbstractContextManager[None]:
    """One call of a tiled layer: an iteration of its own unless it is part of one."""
    return _layer_call


def _is_in_model(entered: nn.Module | None = None) -> bool:
    """Whether the call of the model that this thread has entered is still under way.

    The stack is asked, since a Ctrl-C may skip the hook that leaves the model. The call that has
    just entered a module does not count.
    """
    model = None if state.thread.model is None else state.thread.model()
    frame: FrameType | None = None if model is None else sys._getframe()
    counts = model is not entered
    while frame is not None:
        if frame.f_code is _CALL and frame.f_locals["self"] is model:
            if counts:
                return True
            counts = True
        frame = frame.f_back
    state.thread.model = None
    return False


def in_backward() -> bool:
    """Whether the autograd engine is running in this thread."""
    return torch._C._current_graph_task_id() != -1


def watch_model(model: nn.Module) -> None:
    """Make each call of this model one iteration, so that tiles are read ahead across layers."""
    if _enter_model not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_enter_model)
        model.register_forward_hook(_leave_model, always_call=True)


def set_parking(model: nn.Module, parking: AbstractContextManager[object]) -> None:
    """Enter a context in each call of this model that keeps anything for backward."""
    watch_model(model)
    state.parking[model] = parking


def unwatch_model(model: nn.Module) -> None:
    """Take away what `watch_model` and `set_parking` did."""
    state.parking.pop(model, None)
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for number in [n for n, hook in hooks.items() if hook in (_enter_model, _leave_model)]:
            del hooks[number]
            model._forward_hooks_always_called.pop(number, None)


def _enter_model(module: nn.Module, arguments: Any) -> None:  # whatever the model takes
    if torch.compiler.is_compiling() or in_backward() or _is_in_model(module):
        return
    thread = state.thread
    thread.model = weakref.ref(module)
    state.begin()
    _leave_parking()  # a Ctrl-C may have skipped it
    parking = state.parking.get(module)
    if parking is not None and torch.is_grad_enabled():
        parking.__enter__()
        thread.parking = parking


def _leave_model(module: nn.Module, arguments: Any, output: Any) -> None:  # likewise
    if torch.compiler.is_compiling() or in_backward() or not _has_entered(module):
        return
    state.thread.model = None
    _leave_parking()
    if not torch.is_grad_enabled():
        state.end()


def _leave_parking() -> None:
    parking, state.thread.parking = state.thread.parking, None
    if parking is not None:
        parking.__exit__(None, None, None)


def _has_entered(module: nn.Module) -> bool:
    """Whether it is the model whose call is this thread's iteration, and not one inside it."""
    return state.thread.model is not None and state.thread.model() is module


def enter_backward(home: Home, iteration: int | None) -> None:
    """A node whose forward visited the home in this iteration is about to visit it in backward."""
    found, task = rings_of(home), torch._C._current_graph_task_id()
    if task in found.backwards:
        return
    thread = threading.get_ident()
    with state.lock:
        # after a backward that failed, inside another backward, or of an older graph
        if thread in found.backwards.values() or iteration != found.iteration:
            found.discard()
        found.backwards[task] = thread
        newest = found.iteration
    Variable._execution_engine.queue_callback(lambda: _end_backward(found, task, newest))


def _end_backward(found: SlabRings, task: int, newest: int) -> None:
    with state.lock:
        thread = found.backwards.pop(task, None)
    try:
        found.flush()
    finally:
        others = [own for own in list(found.backwards.values()) if own != thread]
        if found.works and not others and found.iteration == newest:
            found.discard()
        trim_heap()  # temporaries lie between the activations that were freed
