"""The peak of a step, as a sum of named terms: the planner's formula, and the memory tests'.

For the weights that stay in memory: their values and what the optimizer keeps of them. For those
that are parked on a disk: a fixed number of slabs, as large as the largest tile and what belongs to
it. For the step itself: what was counted. For the process: what was measured on this machine.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from memtile.planning.counted import Counted, Rest, State, Weight
from memtile.planning.layout import Layout, Rings
from memtile.planning.plan import Mode, Place, Term
from memtile.planning.rates import Rates


@dataclass(frozen=True)
class Setting:
    """What does not depend on the layout.

    Args:
        tokens: of a step.
        rest: parameters that cannot be parked, and buffers.
        state: what the optimizer keeps; None: inference.
        mode: of the optimizer.
        in_place: whether the home is memory that is worked on where it lies.
        place: where the work's memory is.
        rings: the home's buffers.
        rates: of this machine.
        imports: whether the optimizer's imports are still to come.
    """

    tokens: int
    rest: Rest
    state: State | None
    mode: Mode
    in_place: bool
    place: Place
    rings: Rings
    rates: Rates
    imports: bool

    def entries(self, weight: Weight) -> tuple[int, ...]:
        """Bytes of each tensor that is kept for one element of it."""
        if self.state is None or not weight.trainable:
            return ()
        return self.state.of(weight.element_bytes)

    def state_bytes(self, weight: Weight) -> int:
        """All of them."""
        return sum(self.entries(weight))

    def parked_entries(self, weight: Weight) -> tuple[int, ...]:
        """The same of what is parked: value, state, and a gradient that goes home."""
        gradient = (weight.element_bytes,) if self.sends_gradient(weight) else ()
        return (weight.element_bytes, *self.entries(weight), *gradient)

    def sends_gradient(self, weight: Weight) -> bool:
        """Whether its gradient lives at home: of a tie, it waits there for the tie's other uses."""
        trains = self.state is not None and weight.trainable
        return trains and (self.mode == "classic" or weight.is_tied)


def terms(setting: Setting, layout: Layout, counted: Counted) -> tuple[Term, ...]:
    """The predicted peak, largest terms of each place first; those of nothing are left out."""
    found = [
        *_kept(setting, layout),
        *_parked(setting, layout),
        *_step(setting, counted),
        *_process(setting, layout, counted),
    ]
    some = [term for term in found if term.nbytes]
    return tuple(sorted(some, key=lambda term: (term.place, -term.nbytes)))


def _kept(setting: Setting, layout: Layout) -> Iterator[Term]:
    rest = setting.rest
    weights = sum(weight.nbytes for weight in layout.resident)
    state = sum(weight.elements * setting.state_bytes(weight) for weight in layout.resident)
    if setting.state is not None:
        state += sum(count * sum(setting.state.of(size)) for size, count in rest.trainable)
    yield Term("resident weights", weights, setting.place)
    yield Term("norms, biases and other parameters", rest.nbytes, setting.place)
    yield Term("buffers", rest.buffer_bytes, setting.place)
    yield Term("optimizer state of what is resident", state, setting.place)


def _parked(setting: Setting, layout: Layout) -> Iterator[Term]:
    if setting.in_place:
        yield Term("parked weights", sum(w.nbytes for w in layout.parked), "host")
        state = sum(weight.elements * setting.state_bytes(weight) for weight in layout.parked)
        yield Term("optimizer state of parked weights", state, "host")
        return
    rings = setting.rings
    trained = [w for w in layout.parked if w.trainable and setting.state is not None]
    yield Term("parked at home", _home(setting, layout), "disk")
    yield Term("slabs of tiles", _slabs(setting, layout, layout.parked, rings.weights), "host")
    yield Term("slabs of optimizer steps", _step_slabs(setting, layout, trained), "host")
    sent = [weight for weight in trained if setting.sends_gradient(weight)]
    yield Term("slabs of gradients", _slabs(setting, layout, sent, rings.gradients), "host")
    yield Term("gradient of one tile", _slabs(setting, layout, trained, 1), "host")
    looked_up = [weight for weight in layout.parked if weight.is_looked_up]
    pages = min(setting.tokens * rings.fault_bytes, _slabs(setting, layout, looked_up, 1))
    yield Term("file pages around looked-up rows", pages, "host")


def _home(setting: Setting, layout: Layout) -> int:
    return sum(
        setting.rings.room(elements * entry)
        for weight in layout.parked
        for elements in layout.tile_elements(weight)
        for entry in setting.parked_entries(weight)
    )


def _slabs(setting: Setting, layout: Layout, weights: Iterable[Weight], number: int) -> int:
    """Bytes of some slabs, each as large as the largest tile; no more of them than tiles."""
    weights = list(weights)
    rooms = (setting.rings.room(layout.largest_tile(w) * w.element_bytes) for w in weights)
    return _times(layout, weights, number) * max(rooms, default=0)


def _step_slabs(setting: Setting, layout: Layout, trained: list[Weight]) -> int:
    """In backward mode the value is in a slab of the tiles and the gradient in memory."""
    cargoes = []
    for weight in trained:
        both = (weight.element_bytes,) * 2 if setting.mode == "classic" else ()
        elements = layout.largest_tile(weight)
        entries = (*setting.entries(weight), *both)
        cargoes.append(sum(setting.rings.room(elements * entry) for entry in entries))
    return _times(layout, trained, setting.rings.steps) * max(cargoes, default=0)


def _times(layout: Layout, weights: list[Weight], number: int) -> int:
    tiles = sum(1 for weight in weights for _ in layout.tile_elements(weight))
    return min(number, tiles)


def _step(setting: Setting, counted: Counted) -> Iterator[Term]:
    kept = min(counted.kept_bytes, counted.peak_bytes)
    name = "KV cache and result" if setting.state is None else "activations kept for backward"
    yield Term(name, kept, setting.place)
    yield Term("temporary tensors and gradients", counted.peak_bytes - kept, setting.place)
    if setting.state is not None:
        yield Term("temporary tensors of the optimizer", setting.state.temporary_bytes, "host")


def _process(setting: Setting, layout: Layout, counted: Counted) -> Iterator[Term]:
    rates = setting.rates
    trains = setting.state is not None
    used = rates.first_use_bytes if trains else rates.inference_use_bytes
    yield Term("libraries, at first use", used, "host")
    yield Term("workspaces of products", _workspaces(rates, counted), "host")
    if setting.imports:
        yield Term("imports of the optimizer", rates.import_bytes, "host")
    tile = rates.trained_tile_memory if trains else rates.tile_memory
    layer = rates.trained_layer_memory if trains else rates.layer_memory
    layers = len(layout.weights) + setting.rest.tensors
    yield Term("objects of tiles and layers", layout.tiles * tile + layers * layer, "host")


def _workspaces(rates: Rates, counted: Counted) -> int:
    """In float32 as measured for these products; in 16 bits one of each."""
    kinds = counted.products.kinds_16
    if not kinds:
        return counted.workspace_bytes
    sixteen = rates.sixteen_bit_bytes + (kinds - 1) * rates.sixteen_bit_kind_bytes
    return counted.workspace_bytes + sixteen
