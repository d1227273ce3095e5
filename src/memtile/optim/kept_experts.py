"""`KeptExperts`: the most used experts that train live in memory for a while, with their state.

A parked expert is read for forward and backward, and its state read and written for the step, each
time that tokens hit it. What a budget leaves over (`Home.kept_bytes`) has room for some. Between
two steps those that are used most move there, value and state, in place of ones that are used less,
which are written home. In memory they are worked on as tiles of a `HostHome` are, so all bits are
those of tiles at home. Their room at home is theirs meanwhile.

Uses decide, each with less weight than the one after it. A tile that was hit once stays at home: to
move it costs a read of all that it has, and saves as much only from its next hit on.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from torch import Tensor, nn

from memtile.errors import HomeFullError, HomeIOError
from memtile.homes import (
    Allocation,
    Home,
    HostHome,
    allocation_of,
    read_values,
    register,
    streamed_allocation,
    tensor_of,
    write_values,
)
from memtile.optim.state_layout import is_shaped
from memtile.optim.stepping import VALUE, Stepper
from memtile.transfer import rings_of

_log = logging.getLogger("memtile.optim")

AGEING: Final = 0.95  # what a use weighs in the step after
LEAD: Final = 1.0  # uses that a tile must have more than the one that it replaces

_Places = Mapping[str, tuple[Allocation, Allocation]]  # at home and in memory, by state key


class KeptExperts:
    """The experts of one optimizer that are in memory, at most `Home.kept_bytes` of each home.

    Attributes:
        nbytes: of all that moved, in whole pages, with their gradients where those are kept.
    """

    def __init__(self, stepper: Stepper, keeps_gradients: bool) -> None:
        self._stepper, self._keeps_gradients = stepper, keeps_gradients
        self._memory = HostHome()
        self._experts: set[Tensor] = set()
        self._left: dict[Home, int] = {}  # bytes of each home's allowance that are free
        self._kept: dict[Tensor, _Places] = {}
        self._uses: dict[Tensor, tuple[float, int]] = {}  # weighed uses, and at which step
        self._hit: set[nn.Parameter] = set()  # in this step
        self._step = 0
        self.nbytes = 0

    def add(self, model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
        """Keep some of these: those that are tiles of experts, and train in a home that allows it.

        The optimizer has the home's allowance from now on: copies of what it writes would be stale.
        """
        routed = (module for module in model.modules() if getattr(module, "is_routed", False))
        tiles = {p for module in routed for p in module.parameters() if p.requires_grad}
        for parameter in tiles.intersection(parameters):
            allocation = streamed_allocation(parameter)
            if allocation is not None:
                self._experts.add(parameter)
                self._claim(allocation.home)

    def _claim(self, home: Home) -> None:
        if home.kept_bytes and not home.is_read_only:
            self._left[home] = self._left.get(home, 0) + home.kept_bytes
            home.kept_bytes = 0
            kept = rings_of(home).kept
            kept.limit = 0
            kept.clear()

    def note(self, parameter: nn.Parameter) -> None:
        """The parameter is stepped with a gradient."""
        if self._left and parameter in self._experts and parameter not in self._hit:
            self._hit.add(parameter)
            self._uses[parameter] = self._score(parameter) + 1, self._step

    def move(self) -> None:
        """A step is whole: move what was hit into memory, where it is used more than what is there.

        What cannot be read or written stays where it is, and is tried again after a later step.
        """
        hit = sorted(self._hit - self._kept.keys(), key=self._score, reverse=True)
        self._hit.clear()
        self._step += 1
        try:
            for parameter in hit:
                if self._score(parameter) <= 1 or not self._take(parameter):
                    return  # those after it are used less
        except (HomeIOError, HomeFullError) as error:
            _log.warning("an expert stays where it is: %s", error)

    def _score(self, parameter: Tensor) -> float:
        weighed, step = self._uses.get(parameter, (0.0, 0))
        return weighed * AGEING ** (self._step - step)

    def _take(self, parameter: nn.Parameter) -> bool:
        """Move it into memory, if it is worth more there than what has to leave."""
        parked = self._stepper.allocations_by_key(parameter)
        if not parked:  # it was replaced
            return True
        home, needed = parked[VALUE].home, self._bytes(parked)
        if home.is_mapped:  # its tiles are in memory already, though they do not count there
            return True
        if not self._make_room(home, needed, self._score(parameter)):
            return False
        rings_of(home).flush()
        places = {key: (each, self._copy(each)) for key, each in parked.items()}
        state = self._stepper.layout.state[parameter]
        for key, (_, inner) in places.items():
            if key != VALUE:
                state[key] = tensor_of(inner)
        _put(parameter, places[VALUE][1])
        self._kept[parameter] = places
        self._count(home, needed)
        return True

    def _copy(self, parked: Allocation) -> Allocation:
        inner = self._memory.allocate(parked.shape, parked.dtype)
        read_values(parked, inner.tensor())
        return inner

    def _make_room(self, home: Home, needed: int, score: float) -> bool:
        """Give back tiles that are used less, if those make room enough; else none."""
        left, leaving = self._left.get(home, 0), list[Tensor]()
        own = (each for each, places in self._kept.items() if places[VALUE][0].home is home)
        for each in sorted(own, key=self._score) if left < needed else ():
            if left >= needed or self._score(each) + LEAD > score:
                break
            leaving.append(each)
            left += self._kept_bytes(each)
        for each in leaving if left >= needed else ():
            self._give_back(each)
        return left >= needed

    def _give_back(self, parameter: Tensor) -> None:
        """Write it home, and use it there again; HomeIOError where it cannot be written."""
        places, state = self._kept[parameter], self._stepper.layout.state[parameter]
        home = places[VALUE][0].home
        if allocation_of(parameter) is places[VALUE][1]:  # or it was replaced since, by a cast say
            tensors = dict(self._moved_tensors(parameter, places))
            for key, tensor in tensors.items():
                write_values(places[key][0], tensor)
            for key in tensors.keys() - {VALUE}:
                state[key] = tensor_of(places[key][0])
            _put(parameter, places[VALUE][0])
        self._count(home, -self._kept_bytes(parameter))
        del self._kept[parameter]

    def _moved_tensors(self, parameter: Tensor, places: _Places) -> Iterator[tuple[str, Tensor]]:
        """Value and state, where they still are what can be written to their room."""
        entries: dict[str, Any] = {VALUE: parameter.detach()}
        entries |= self._stepper.layout.state[parameter]
        for key, (outer, _) in places.items():
            entry = entries.get(key)
            if entry is not None and is_shaped(entry, parameter) and entry.dtype == outer.dtype:
                yield key, entry

    def _bytes(self, parked: Mapping[str, Allocation]) -> int:
        gradient = parked[VALUE].room if self._keeps_gradients else 0
        return gradient + sum(each.room for each in parked.values())

    def _kept_bytes(self, parameter: Tensor) -> int:
        return self._bytes({key: outer for key, (outer, _) in self._kept[parameter].items()})

    def _count(self, home: Home, nbytes: int) -> None:
        self._left[home] -= nbytes
        self.nbytes += nbytes

    def end(self) -> None:
        """The optimizer is gone: all go home, which has its allowance again."""
        for parameter in list(self._kept):
            try:
                if not self._kept[parameter][VALUE][0].home.closed:
                    self._give_back(parameter)
            except HomeIOError as error:
                _log.warning("an expert stays in memory: %s", error)
        for home, left in self._left.items():
            home.kept_bytes += left
            if not home.closed:
                rings_of(home).kept.limit = home.kept_bytes
        self._left = {}


def _put(parameter: Tensor, allocation: Allocation) -> None:
    """Have the parameter's values there, where they are already."""
    parameter.data = allocation.tensor()
    register(parameter, allocation)
