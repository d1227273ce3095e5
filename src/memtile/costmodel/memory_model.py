"""The peak of a step as a sum of named terms. Plans use this formula, and so do tests of memory.

For weights that stay in memory: their values and what the optimizer keeps of them. For weights
parked on a disk: a fixed number of slabs, each as large as the largest tile and what belongs to it.
For the step: what was counted. For the process: what was measured on this machine.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from memtile.costmodel.machine_profile import MachineProfile
from memtile.costmodel.model_records import Counted, ParkedLayout, Rest, StateSizes, Weight
from memtile.costmodel.plan import OptimizerMode
from memtile.costmodel.plan_parts import Place, Term, sorted_terms
from memtile.geometry import round_up


@dataclass(frozen=True)
class Rings:
    """The numbers of slabs of a home that is not worked on in place."""

    weights: int  # slabs for tiles in forward and backward
    gradients: int  # slabs for gradients on their way home
    steps: int  # slabs for what the optimizer works on
    activations: int  # slabs for activations on their way
    page: int  # bytes that sizes are rounded up to
    fault_bytes: int  # what the kernel maps around a page that is read through a mapping

    def room(self, nbytes: int) -> int:
        """Bytes, rounded up to pages."""
        return round_up(nbytes, self.page)


@dataclass(frozen=True)
class Setting:
    """What does not depend on the layout."""

    tokens: int  # of a step
    rest: Rest
    state: StateSizes | None  # what the optimizer keeps; None: inference
    mode: OptimizerMode
    in_place: bool  # whether the home is memory that is worked on where it lies
    in_files: bool  # whether parked weights stay in a checkpoint's files
    place: Place  # where the work's memory is
    rings: Rings
    rates: MachineProfile
    imports: bool  # whether the optimizer's imports are still to come

    def entries(self, weight: Weight) -> tuple[int, ...]:
        """Bytes of each tensor that the optimizer keeps for one element of a weight."""
        if self.state is None or not weight.trainable:
            return ()
        return self.state.of(weight.element_bytes)

    def state_bytes(self, weights: Iterable[Weight]) -> int:
        """What the optimizer keeps for some weights."""
        return sum(weight.elements * sum(self.entries(weight)) for weight in weights)

    def sends_gradient(self, weight: Weight) -> bool:
        """Whether its gradient lives at home: that of a tie waits there for the other uses."""
        trains = self.state is not None and weight.trainable
        return trains and (self.mode == "classic" or weight.is_tied)


def terms(setting: Setting, layout: ParkedLayout, counted: Counted) -> tuple[Term, ...]:
    """The predicted peak, largest terms of each place first, those of 0 bytes left out."""
    parked = _parked_in_place(setting, layout)
    if not setting.in_place:
        parked = _parked_on_disk(setting, layout, counted)
    temporary = "temporary tensors and gradients"
    # Weights are loaded before a step's own tensors are there.
    converting = max(0, setting.rest.converting_bytes - counted.peak_bytes)
    return sorted_terms(
        [
            *_resident(setting, layout),
            *parked,
            *activation_terms(counted, setting.state, setting.place, temporary),
            Term("conversion of weights while they are loaded", converting, "host"),
            *_process(setting, layout, counted),
        ]
    )


def activation_terms(
    counted: Counted, state: StateSizes | None, place: Place, temporary: str
) -> Iterator[Term]:
    """What a step makes: what is kept for backward, and temporary tensors under the given name."""
    kept = min(counted.kept_bytes, counted.peak_bytes)
    name = "KV cache and result" if state is None else "activations kept for backward"
    yield Term(name, kept, place)
    yield Term(temporary, counted.peak_bytes - kept, place)


def _resident(setting: Setting, layout: ParkedLayout) -> Iterator[Term]:
    rest, state = setting.rest, setting.state_bytes(layout.resident)
    if setting.state is not None:
        state += sum(count * sum(setting.state.of(size)) for size, count in rest.trainable)
    yield Term("resident weights", sum(w.nbytes for w in layout.resident), setting.place)
    yield Term(rest.large, rest.large_bytes, setting.place)
    others = rest.nbytes - rest.large_bytes
    yield Term("norms, biases and other parameters", others, setting.place)
    yield Term("buffers", rest.buffer_bytes, setting.place)
    yield Term("optimizer state of what is resident", state, setting.place)


def _parked_in_place(setting: Setting, layout: ParkedLayout) -> Iterator[Term]:
    yield Term("parked weights", sum(w.nbytes for w in layout.parked), "host")
    state = setting.state_bytes(layout.parked)
    yield Term("optimizer state of parked weights", state, "host")


def _parked_on_disk(setting: Setting, layout: ParkedLayout, counted: Counted) -> Iterator[Term]:
    rings, parked = setting.rings, layout.parked
    trained = [w for w in parked if w.trainable and setting.state is not None]
    sent = [w for w in trained if setting.sends_gradient(w)]
    looked_up = [w for w in parked if w.is_looked_up]

    def slabs(number: int, weights: Iterable[Weight]) -> int:
        return _slabs(setting, layout, {w: (w.element_bytes,) for w in weights}, number)

    # In backward mode the value is in a slab of the tiles, and the gradient in memory.
    both = 2 if setting.mode == "classic" else 0
    stepped = {w: setting.entries(w) + (w.element_bytes,) * both for w in trained}
    if not setting.in_files:
        yield Term("parked at home", home_bytes(setting, layout), "disk")
    yield Term("activations at home", counted.parked_bytes, "disk")
    steps = _slabs(setting, layout, stepped, rings.steps)
    activations = rings.activations * counted.largest_parked
    if rings.steps == 1 and counted.held_at_steps:  # mapped beside what is still held then
        entry = max((sum(some) for some in stepped.values()), default=0)
        most = max(held + elements * entry for elements, held in counted.held_at_steps)
        steps = min(steps, max(0, most - counted.peak_bytes))
    if rings.activations == 1:  # mapped while it is stored, when no tile is stepped
        activations = max(0, activations - steps)
    yield Term("slabs of activations", activations, "host")
    yield Term("slabs of tiles", slabs(rings.weights, parked), "host")
    yield Term("slabs of optimizer steps", steps, "host")
    yield Term("slabs of gradients", slabs(rings.gradients, sent), "host")
    yield Term("gradient of one tile", slabs(1, trained), "host")
    pages = min(setting.tokens * rings.fault_bytes, slabs(1, looked_up))
    yield Term("file pages around looked-up rows", pages, "host")


def home_bytes(setting: Setting, layout: ParkedLayout) -> int:
    """Of each parked tile: value, state, and a gradient where it goes home."""
    total = 0
    for weight in layout.parked:
        gradient = (weight.element_bytes,) if setting.sends_gradient(weight) else ()
        entries = (weight.element_bytes, *setting.entries(weight), *gradient)
        for elements in layout.tile_elements(weight):
            total += sum(setting.rings.room(elements * entry) for entry in entries)
    return total


def _slabs(
    setting: Setting, layout: ParkedLayout, entries: dict[Weight, tuple[int, ...]], number: int
) -> int:
    """Bytes of some slabs, each with room for the largest tile's entries; no more than tiles."""
    tiles = sum(1 for weight in entries for _ in layout.tile_elements(weight))
    room, largest = setting.rings.room, layout.largest_tile
    sizes = (sum(room(largest(w) * entry) for entry in some) for w, some in entries.items())
    return min(number, tiles) * max(sizes, default=0)


def _process(setting: Setting, layout: ParkedLayout, counted: Counted) -> Iterator[Term]:
    rates, kinds = setting.rates, counted.products.kinds_16
    used, tile, layer = rates.inference_use_bytes, rates.tile_memory, rates.layer_memory
    if setting.state is not None:
        used, tile = rates.first_use_bytes, rates.trained_tile_memory
        layer, temporary = rates.trained_layer_memory, setting.state.temporary_bytes
        yield Term("temporary tensors of the optimizer", temporary, "host")
    workspaces = counted.workspace_bytes
    if kinds:
        workspaces += rates.sixteen_bit_bytes + (kinds - 1) * rates.sixteen_bit_kind_bytes
    yield Term("libraries, at first use", used, "host")
    yield Term("workspaces of products", workspaces, "host")
    if setting.imports:
        yield Term("imports of the optimizer", rates.import_bytes, "host")
    layers = len(layout.weights) + setting.rest.tensors
    yield Term("objects of tiles and layers", layout.tiles * tile + layers * layer, "host")
