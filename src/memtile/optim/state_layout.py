"""What an optimizer keeps for a parameter: which tensors, of which dtypes, and room for them."""

import copy
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any  # a state holds whatever the optimizer's class wants

import torch
from torch import Tensor, nn

from memtile.errors import OptimizerError
from memtile.homes import Home, Reservation, allocation_of, set_reservation, whole_pages
from memtile.optim.slice_optimizer import SliceOptimizer

MASTER = "master"
SIXTEEN_BITS = frozenset({torch.float16, torch.bfloat16})

ParameterState = dict[str, Any]
StateDtypes = dict[str, torch.dtype]
Options = Mapping[str, Any]  # of a parameter group


@dataclass(eq=False)
class StateLayout:
    """The state of parameters; `keeps_masters`: those of 16 bits are stepped in float32."""

    inner: SliceOptimizer  # the optimizer
    state: MutableMapping[Tensor, ParameterState]  # torch.optim.Optimizer.state
    keeps_masters: bool

    def stepped_dtype(self, parameter: Tensor) -> torch.dtype:
        """The dtype that the parameter is stepped in."""
        wide = self.keeps_masters and parameter.dtype in SIXTEEN_BITS
        return torch.float32 if wide else parameter.dtype

    def drop_unused_master(self, parameter: Tensor, group: Options) -> None:
        """Drop a loaded master of a parameter that is stepped in its own dtype."""
        if MASTER in self.state[parameter] and MASTER not in self.dtypes(parameter, group):
            del self.state[parameter][MASTER]

    def state_rooms(self, parameter: Tensor, group: Options) -> list[int]:
        """Bytes, in whole pages, of each tensor of the parameter's state, its master included."""
        dtypes = self.dtypes(parameter, group).values()
        return [whole_pages(parameter.numel() * each.itemsize) for each in dtypes]

    def dtypes(self, parameter: Tensor, group: Options) -> StateDtypes:
        """The dtypes of the parameter-shaped tensors in a parameter's state."""
        dtype = self.stepped_dtype(parameter)
        found = self.inner.state_dtypes(group, dtype) if parameter.dim() else {}
        if dtype == parameter.dtype:
            return found
        if MASTER in found:
            raise OptimizerError(
                f"{self.inner.name} keeps {MASTER!r} itself, the name of the float32 values that "
                "16-bit parameters are stepped in: pass masters=False"
            )
        return {**found, MASTER: dtype}

    def missing(self, parameter: Tensor, group: Options) -> StateDtypes:
        """Those that are still to be made: all before the first step."""
        state = self.state[parameter]
        if set(state) - {MASTER}:  # a plain optimizer's state has all but a master
            lacks_master = self.stepped_dtype(parameter) != parameter.dtype and MASTER not in state
            return {MASTER: self.stepped_dtype(parameter)} if lacks_master else {}
        dtypes = self.dtypes(parameter, group)
        return {key: dtype for key, dtype in dtypes.items() if key not in state}

    def hold_rooms(self, needed: Iterable[tuple[nn.Parameter, Options, bool]]) -> list[Reservation]:
        """Room in each home for the state of these parameters, and for the gradients of some.

        Their allocations take it for as long as the reservations are kept. HomeFullError where a
        home has no room; nothing is held then.
        """
        owners: dict[Home, list[tuple[nn.Parameter, list[int]]]] = {}
        for parameter, group, keeps_gradient in needed:
            allocation = allocation_of(parameter)
            if allocation is not None and parameter.requires_grad:
                rooms = self.state_rooms(parameter, group)
                rooms += [allocation.room] if keeps_gradient else []
                owners.setdefault(allocation.home, []).append((parameter, rooms))
        held = {
            home: home.hold([room for _, rooms in owned for room in rooms])
            for home, owned in owners.items()
        }
        for home, owned in owners.items():
            for parameter, _ in owned:
                set_reservation(parameter, held[home])
        return list(held.values())


def is_shaped(entry: object, parameter: Tensor) -> bool:
    """Whether a state entry has an element for each element of the parameter."""
    return isinstance(entry, Tensor) and entry.dim() > 0 and entry.shape == parameter.shape


def equal(ours: Any, theirs: Any) -> bool:
    """Whether two options, or two entries of states, are the same: of one type, and equal."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        return ours.keys() == theirs.keys() and all(equal(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    return type(ours) is type(theirs) and bool(ours == theirs)


def copy_of(entry: Any) -> Any:
    """A copy for the optimizer to change; `copy.deepcopy` of a step's number takes 0.1 ms."""
    return entry.clone() if type(entry) is Tensor else copy.deepcopy(entry)


def put_in_place(old: Any, new: Any) -> Any:
    """A new number, copied into the old one's tensor where there is one.

    A new small tensor in each step would take the place of a freed large one, and grow the heap.
    """
    if not (isinstance(old, Tensor) and isinstance(new, Tensor) and old.shape == new.shape):
        return new
    return old.copy_(new) if old.dtype == new.dtype and old.device == new.device else new
