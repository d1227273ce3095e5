"""Idle steps of experts: those of tiles without a gradient, put off until the tile is needed.

The weights of a layer's experts are one parameter of the dense model. An expert that no token was
routed to has a gradient of zeros there, with which most optimizers still move it: moments decay,
weight decay goes on. Here such a tile has no gradient and stays at home in that step. The steps
that it misses are counted, with the options that its group had in them, and are applied one after
another, by the same code, once it is brought in for a forward, stepped with a gradient, or read.

Autograd is told of the change when a step is put off, as it would be had the tile been stepped.
"""

import copy
import weakref
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, product
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from memtile.homes import is_parked, streamed_allocation
from memtile.optim.dense_state import Index, ParamGroup
from memtile.optim.interrupts import uninterrupted
from memtile.optim.state_layout import Options, equal
from memtile.optim.stepping import Runs, Stepper
from memtile.transfer import SLABS, gradient_lock, put_off_idle_steps, rings_of

# Runs of different options that a stack remembers, 120 bytes each and the options, 1 KiB, that all
# stacks of a group share: a tile that lags behind more of them is caught up early.
MAX_RUNS = 1000

Stepped = tuple[nn.Parameter, ParamGroup]


@runtime_checkable
class RoutedLayer(Protocol):
    """What is asked of a layer whose input chooses the tiles that work; optim imports no layer."""

    is_routed: bool

    def tile_parameters(self, name: str) -> dict[Index, nn.Parameter]:
        """The tiles' parameters called `name`, by their index in the grid."""


@dataclass(eq=False)
class _Stack:
    """The steps of one dense parameter, some tiles of which had no gradient in some of them."""

    steps: int = 0  # so far; each tile has made, or owes, all of them
    runs: list[tuple[int, Options]] = field(default_factory=list)  # options from which step on

    def note_step(self, options: Options) -> None:
        """Another step, with these options."""
        if not self.runs or self.runs[-1][1] is not options:
            self.runs.append((self.steps, options))
        self.steps += 1

    def since(self, done: int) -> Runs:
        """The steps after the first `done`."""
        ends = [*(first for first, _ in self.runs[1:]), self.steps]
        return [
            (options, end - max(first, done))
            for (first, options), end in zip(self.runs, ends, strict=True)
            if end > done
        ]

    def drop_runs(self, done: int) -> None:
        """Drop the options of the first `done` steps."""
        kept = [run for run, (end, _) in pairwise(self.runs) if end > done]
        self.runs = [*kept, *self.runs[-1:]]


class IdleSteps:
    """The idle steps of one optimizer's parameters: a `memtile.transfer.Replayer`.

    `begin` and `end` enclose a step. Tiles that are in no home are stepped in it: code that reads
    them asks nobody.
    """

    def __init__(self, stepper: Stepper) -> None:
        self._stepper = stepper
        self._stacks: MutableMapping[Tensor, _Stack] = {}
        self._done: MutableMapping[Tensor, int] = {}  # how many steps of its stack it has made
        self._tiles: dict[_Stack, list[nn.Parameter]] = {}
        self._stepping: dict[_Stack, ParamGroup] = {}  # in the step that is under way
        self._active: set[Tensor] = set()  # tiles that are stepped in it
        self._latest: dict[int, Options] = {}  # of each group, by its id
        self._is_orphaned = False  # its optimizer is gone

    def __bool__(self) -> bool:
        """Whether there are any routed tiles."""
        return bool(self._stacks)

    def __contains__(self, parameter: object) -> bool:
        """Whether it is a routed tile."""
        return parameter in self._stacks

    def add(self, model: nn.Module, groups: Iterable[ParamGroup]) -> None:
        """Put off idle steps of the routed tiles in these groups."""
        layers = [module for module in model.modules() if getattr(module, "is_routed", False)]
        for group in groups if layers else ():
            held = set(group["params"])
            for layer, name in product(layers, ("weight", "bias")):
                assert isinstance(layer, RoutedLayer)
                tiles = layer.tile_parameters(name).values()
                self._add_stack([p for p in tiles if p in held and p not in self._stacks])

    def _add_stack(self, tiles: list[nn.Parameter]) -> None:
        if not tiles:
            return
        stack = _Stack()
        self._tiles[stack] = tiles
        for parameter in tiles:
            self._stacks[parameter], self._done[parameter] = stack, 0
            put_off_idle_steps(parameter, weakref.ref(self))

    def begin(self, stepped: Iterable[Stepped]) -> list[Stepped]:
        """A step begins, in which these have a gradient; gives the idle ones to be stepped in it.

        HomeIOError where tiles that lag behind could not be caught up: the step has not begun.
        """
        stepping: dict[_Stack, ParamGroup] = {}
        active = set[Tensor]()
        for parameter, group in stepped:
            if parameter in self._stacks:
                stepping[self._stacks[parameter]] = group
                active.add(parameter)
        for stack in stepping:
            self._catch_up_late(stack)
        at_once = [
            (parameter, group)
            for stack, group in stepping.items()
            for parameter in self._tiles[stack]
            if parameter not in active and parameter.requires_grad and not is_parked(parameter)
        ]
        self._stepping, self._active = stepping, active.union(each for each, _ in at_once)
        return at_once

    def _catch_up_late(self, stack: _Stack) -> None:
        """Catch up tiles that were frozen since, and those that lag behind too many runs."""
        is_full = len(stack.runs) > MAX_RUNS
        oldest = stack.runs[MAX_RUNS // 2][0] if is_full else 0
        tiles = self._tiles[stack]
        self.catch_up([p for p in tiles if not p.requires_grad or self._done[p] < oldest])
        if is_full:
            stack.drop_runs(min(self._done[parameter] for parameter in tiles))

    def owed(self, parameter: Tensor) -> Runs:
        """The idle steps that are to be applied before the parameter's next one."""
        if not self._is_behind(parameter):
            return ()
        return self._stacks[parameter].since(self._done[parameter])

    def paid(self, parameter: Tensor) -> None:
        """What was owed is applied."""
        if self._is_orphaned:
            put_off_idle_steps(parameter, None)
            for table in (self._stacks, self._done, self._stepper.layout.state):
                del table[parameter]
        elif parameter in self._stacks:
            self._done[parameter] = self._stacks[parameter].steps

    def end(self) -> None:
        """The step is whole: those that were not stepped in it owe it."""
        options = {id(group): self._options(group) for group in self._stepping.values()}
        for stack, group in self._stepping.items():
            stack.note_step(options[id(group)])
            idle = []
            for parameter in self._tiles[stack]:
                if parameter in self._active or not parameter.requires_grad:
                    self._done[parameter] = stack.steps
                else:
                    idle.append(parameter)
            torch.autograd.graph.increment_version(idle)
        self.give_up()

    def give_up(self) -> None:
        """The step is given up: who was not stepped owes nothing."""
        self._stepping, self._active = {}, set()

    def _options(self, group: ParamGroup) -> Options:
        """The group's options now; the same object while they do not change."""
        now = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        latest = self._latest.get(id(group))
        if latest is None or not equal(latest, now):
            latest = self._latest[id(group)] = copy.deepcopy(now)
        return latest

    def replay(self, parameter: Tensor) -> None:
        """Apply what the parameter owes; its value stays in the slab that a forward takes it from.

        HomeIOError where it could not be brought in; nothing was changed then.
        """
        if self._is_orphaned:  # nobody would wait for its writes later
            self.catch_up([parameter])
        elif self._is_behind(parameter):
            with uninterrupted():
                self._replay(parameter, (), in_iteration=True)

    def catch_up(self, parameters: Sequence[Tensor]) -> None:
        """Apply what these owe; values and state are at home afterwards.

        HomeIOError where one could not be read or written; call it again to go on.
        """
        known = [parameter for parameter in parameters if parameter in self._stacks]
        behind = [parameter for parameter in known if self._is_behind(parameter)]
        found = map(streamed_allocation, known)
        homes = {each.home for each in found if each is not None}
        rings = [rings_of(home) for home in homes if not home.closed]
        with uninterrupted():
            for each in rings:
                each.flush()
                if behind:
                    each.clear()
            for number, parameter in enumerate(behind):
                later = behind[number + 1 : number + SLABS]
                self._replay(parameter, later)
            for each in rings if behind else ():
                each.flush()
                each.clear()

    def _replay(
        self, parameter: Tensor, later: Sequence[Tensor], in_iteration: bool = False
    ) -> None:
        """Apply what one parameter owes, unless another thread has done so meanwhile."""
        ahead = (self._stepper.allocations(each, idle=True) for each in later)
        with gradient_lock(parameter):
            if self._is_behind(parameter):
                owed = self.owed(parameter)
                self._stepper.replay(parameter, owed, filter(None, ahead), in_iteration)
                self.paid(parameter)

    def _is_behind(self, parameter: Tensor) -> bool:
        stack = self._stacks.get(parameter)
        return stack is not None and self._done[parameter] < stack.steps

    def outlive_optimizer(self) -> None:
        """Keep, for as long as their parameters live, the state of those that owe something."""
        behind = [parameter for parameter in self._stacks if self._is_behind(parameter)]
        state = {parameter: self._stepper.layout.state[parameter] for parameter in behind}
        layout = replace(self._stepper.layout, state=_weak(state))
        self._stepper = Stepper(layout, nn.Module())  # the model has names for errors of gradients
        self._stacks = _weak({parameter: self._stacks[parameter] for parameter in behind})
        self._done = _weak({parameter: self._done[parameter] for parameter in behind})
        self._tiles, self._is_orphaned = {}, True
        self.give_up()
        for parameter in behind:  # nobody else keeps this object, and it keeps no parameter
            put_off_idle_steps(parameter, lambda: self)


def _weak(table: Mapping[Tensor, Any]) -> MutableMapping[Tensor, Any]:
    """The same table, which keeps no key alive."""
    weak: MutableMapping[Tensor, Any] = WeakIdKeyDictionary(table)
    return weak
