"""Data parallelism with parked tiles: gradients are averaged over ranks, one parameter at a time.

For resident tiles use `DistributedDataParallel`. It would broadcast all parked tiles at once, copy
gradients into buckets of their size, and reduce them after a step in backward has used them. Here
each gradient is averaged in its home as soon as it is complete, before any optimizer reads it.

Experts: in a forward that records gradients, ranks agree which experts any of them has tokens for.
All call these, so that each has a gradient of them, zeros where it had no tokens.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakIdKeyDictionary

from memtile.engines.exchange_order import order_in
from memtile.engines.ranks import check_agreement, check_process_group
from memtile.errors import EngineError, OptimizerError
from memtile.homes import streamed_allocation
from memtile.layers import TiledStack, agree_on_calls
from memtile.transfer import is_stepped_in_backward, rings_of

_averaged = WeakIdKeyDictionary()


class GradientAverager:
    """Averages each gradient of a model over ranks, before hooks that are registered later.

    Make it before the optimizer. Rank 0's parameters and buffers are sent to all ranks first. Each
    rank must use the same parameters in the same order. Their names are compared during training:
    the first 64 gradients, then every 32nd (EngineError on each rank).

    Args:
        model: the same on each rank.
        group: its ranks; None: all.

    Raises:
        EngineError: there is no process group, ranks differ in models, an engine holds shards,
            gradients are averaged already, or a layer other than transformers' experts uses some of
            its tiles only.
        OptimizerError: a `TileOptimizer` steps in backward already, so it would come first.
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
        _check(model, group)
        _averaged.update(dict.fromkeys(model.parameters()))
        self._group, self._on, self._parameters = group, True, list(model.parameters())
        ranks = group or dist.group.WORLD
        assert ranks is not None  # it was checked
        self._order = order_in(ranks)
        self._unsent = WeakIdKeyDictionary()  # parameters with gradients of this rank alone
        self._names = weakref.WeakKeyDictionary(_trained_stacks(model))
        for stack in self._names:
            agree_on_calls(stack, self._called_anywhere)
        for tensor in (*model.parameters(), *model.buffers()):
            self._send(tensor)
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._average, name))
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        ]

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """A context in which gradients only accumulate; the next backward outside averages them."""
        before, self._on = self._on, False
        try:
            yield
        finally:
            self._on = before

    def remove(self) -> None:
        """Stop averaging."""
        for hook in self._hooks:
            hook.remove()
        for parameter in self._parameters:
            _averaged.pop(parameter, None)
        for stack in self._names:
            agree_on_calls(stack, None)

    def _send(self, tensor: Tensor) -> None:
        source = 0 if self._group is None else dist.get_global_rank(self._group, 0)
        with _at_home(tensor, "steps") as values:
            dist.broadcast(values, source, group=self._group)

    def _called_anywhere(
        self, stacks: Sequence[TiledStack], called: Sequence[bool], first: int
    ) -> list[bool]:
        """An `Agreement`: experts that a rank has tokens for, or has accumulated gradients of."""
        if not torch.is_grad_enabled():
            return list(called)
        wanted = torch.tensor(called, dtype=torch.uint8)
        for stack in stacks if self._unsent else ():
            tiles, place = stack.tile_parameters("weight"), 0
            for numbers, some in stack.units_of(called, first):
                if any(tiles[number, 0] in self._unsent for number in numbers):
                    wanted[place : place + len(some)] = 1
                place += len(some)
        names = ", ".join(self._names[stack] for stack in stacks if stack in self._names)
        self._order.note(f"asks which experts of {names} are used")
        device = stacks[0].device
        wanted = wanted.to(device)
        dist.all_reduce(wanted, dist.ReduceOp.MAX, group=self._group)
        return wanted.bool().tolist()

    def _average(self, name: str, parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        if not self._on:
            self._unsent[parameter] = True
            return
        self._unsent.pop(parameter, None)
        self._order.note(f"averages the gradient of {name}")
        with torch.no_grad(), _at_home(parameter.grad, "gradients") as gradient:
            gradient.div_(dist.get_world_size(self._group))
            dist.all_reduce(gradient, group=self._group)


def _trained_stacks(model: nn.Module) -> dict[TiledStack, str]:
    """The stacks of experts whose gradients are averaged, with their names."""
    found = {m: name for name, m in model.named_modules() if isinstance(m, TiledStack)}
    return {m: name for m, name in found.items() if any(p.requires_grad for p in m.parameters())}


@contextmanager
def _at_home(tensor: Tensor, kind: str) -> Iterator[Tensor]:
    """A tensor's values, to be changed: in place, or in a slab that is written to its home."""
    allocation = streamed_allocation(tensor)
    if allocation is None:
        yield tensor.detach()
        return
    ring = getattr(rings_of(allocation.home), kind)
    with ring.acquire((allocation,), written=True) as lease:
        yield lease.tensors[0]
        lease.store()
    ring.flush()  # the next reader may read the home's file mapping
    torch.autograd.graph.increment_version(tensor)


def _check(model: nn.Module, group: dist.ProcessGroup | None) -> None:
    check_process_group()
    parameters = list(model.parameters())
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        raise EngineError(
            f"parameters of this {type(model).__name__} are shards, whose gradients their engine "
            "reduces; GradientAverager is for a whole model on each rank"
        )
    if any(parameter.is_meta for parameter in parameters):
        raise EngineError(
            f"parameters of this {type(model).__name__} are on the meta device, where nothing has "
            "values; load it first"
        )
    for name, module in model.named_modules():
        if getattr(module, "is_routed", False) and not isinstance(module, TiledStack):
            raise EngineError(
                f"{name}, a {type(module).__name__}, uses some of its tiles only, and ranks would "
                "wait for those that use others; tile the model without it, by modules=… of "
                "memtile.tile, or train on one rank"
            )
    if any(parameter in _averaged for parameter in parameters):
        raise EngineError(
            "gradients of this model are averaged already, and twice would send them twice; call "
            "remove() of the GradientAverager before"
        )
    if any(map(is_stepped_in_backward, parameters)):
        raise OptimizerError(
            "a TileOptimizer steps this model in backward already, before gradients could be "
            "averaged; make the GradientAverager first"
        )
    check_agreement(model, (), [group])
