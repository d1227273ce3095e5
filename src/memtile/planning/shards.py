"""What engines make of a model on several ranks: units that are gathered, and one rank's shards.

FSDP2 cuts each parameter along its first dimension, in pieces of as many rows as the largest share
has: a tile with fewer rows than ranks is padded to one row for each. A module without tiles is a
unit where it is as large as one; all that is smaller is the root's, which is whole from the start
of a forward to the end of its backward.

ZeRO-3 cuts each parameter's elements, padded to a multiple of the ranks, and gathers a module's own
parameters together. Small ones are persistent: whole on every rank, and sharded besides. They are
those up to the threshold of `memtile.engines.deepspeed_zero3.config`: a tile's bias, but no tile.

Source: torch 2.13 (`FSDPParam`), DeepSpeed 0.19 (`Init._partition_param`).
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Literal

from memtile.geometry import Grid

Engine = Literal["fsdp2", "zero3"]


@dataclass(frozen=True)
class Parameter:
    """A parameter before it is sharded.

    Args:
        rows: its first dimension.
        columns: elements of each.
        element_bytes: of one value.
        trainable: whether it gets gradients.
    """

    rows: int
    columns: int
    element_bytes: int
    trainable: bool

    @property
    def elements(self) -> int:
        """Values."""
        return self.rows * self.columns

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.elements * self.element_bytes


@dataclass(frozen=True)
class Uses:
    """How often a step runs a layer.

    Args:
        forward: in forward.
        again: in backward, where activations are recomputed.
        backward: how often a gradient comes back through it.
        cut_short: how often a recomputation ended inside it, since nothing after it is needed.
        last: how many layers forward had begun when it began this one for the last time.
    """

    forward: int
    again: int
    backward: int
    cut_short: int = 0
    last: int = 0

    @property
    def gathers(self) -> int:
        """Times that a unit which is let go of after each use is gathered."""
        return self.forward + self.again + self.backward


@dataclass(frozen=True)
class ShardedLayer:
    """A linear or an embedding whose tiles are units, with all layers that share its weight.

    Args:
        name: of the first module that has it.
        weight: its weight, whole.
        biases: of those modules.
        rows_only: whether only rows can be cut.
        shared: whether several modules have it: its tiles are never grouped.
        uses: of all of them.
    """

    name: str
    weight: Parameter
    biases: tuple[Parameter, ...]
    rows_only: bool
    shared: bool
    uses: Uses

    def used(self, uses: Uses) -> "ShardedLayer":
        """The same with other uses."""
        return replace(self, uses=uses)


Unit = tuple[Parameter, ...]


@dataclass(frozen=True)
class LooseModule:
    """A module's own parameters that are no tiles.

    Args:
        name: the module's.
        parameters: those that no module before it has.
        alone: whether it can be a unit: it holds no module, and shares no parameter.
        uses: of it.
    """

    name: str
    parameters: Unit
    alone: bool
    uses: Uses

    def used(self, uses: Uses) -> "LooseModule":
        """The same with other uses."""
        return replace(self, uses=uses)


@dataclass(frozen=True)
class Turn:
    """Where a backward begins; as many units as are gathered ahead are still whole then.

    Args:
        units: those before, the last one first.
        times: how often it comes in a step.
        least: how many are whole even where none is gathered ahead.
    """

    units: tuple[Unit, ...]
    times: int
    least: int

    def kept(self, prefetch: int) -> tuple[Unit, ...]:
        """Those that are still whole."""
        return self.units[: max(prefetch, self.least)]


@dataclass(frozen=True)
class Units:
    """Everything that ranks share, as an engine groups it.

    Args:
        tiles: (unit, how many such, uses of each), gathered and let go of one after the other.
        resident: what stays whole: FSDP2's root during a pass, ZeRO-3's persistent ones always.
        kept: (unit, times): those that a recomputation ended in, and that are still whole when
            their backward comes.
        turns: what ZeRO-3 keeps in the same way.
        bucket: bytes of the buffer that ZeRO-3's gradients leave through: its largest tile's.
    """

    tiles: tuple[tuple[Unit, int, Uses], ...]
    resident: Unit
    kept: tuple[tuple[Unit, int], ...] = ()
    turns: tuple[Turn, ...] = ()
    bucket: int = 0

    @property
    def parameters(self) -> Counter[Parameter]:
        """Every parameter, and how often there is one like it."""
        found = Counter(self.resident)
        for unit, times, _ in self.tiles:
            for parameter in unit:
                found[parameter] += times
        return found

    @property
    def number(self) -> int:
        """How many units there are, beside what stays whole."""
        return sum(times for _, times, _ in self.tiles)


@dataclass(frozen=True)
class Sharding:
    """How an engine cuts parameters for so many ranks.

    Args:
        engine: "fsdp2" or "zero3".
        world: ranks.
        unit_bytes: FSDP2 gathers neighbouring tiles of a layer together up to this size.
    """

    engine: Engine
    world: int
    unit_bytes: int

    def shard(self, parameter: Parameter) -> int:
        """Elements of the fullest rank's shard, padding included."""
        if self.engine == "fsdp2":
            return -(-parameter.rows // self.world) * parameter.columns
        return -(-parameter.elements // self.world)

    def whole(self, unit: Iterable[Parameter]) -> int:
        """Bytes of a unit that is gathered, padding included."""
        return sum(self.shard(each) * each.element_bytes for each in unit) * self.world

    def units(
        self,
        layers: Sequence[ShardedLayer],
        grids: Mapping[str, Grid],
        loose: Sequence[LooseModule],
    ) -> Units:
        """What is gathered together.

        Args:
            layers: those that are cut into tiles, or are one tile.
            grids: of each of them, by its name.
            loose: the modules of all other parameters.
        """
        if self.engine == "fsdp2":
            return _fsdp2(layers, grids, loose, self.unit_bytes)
        return _zero3(layers, grids, loose)


def trained_of(unit: Unit) -> Unit:
    """The parameters of a unit that get gradients."""
    return tuple(parameter for parameter in unit if parameter.trainable)


def _fsdp2(
    layers: Sequence[ShardedLayer],
    grids: Mapping[str, Grid],
    loose: Sequence[LooseModule],
    unit_bytes: int,
) -> Units:
    found: list[tuple[Unit, int, Uses]] = []
    kept: list[tuple[Unit, int]] = []
    for layer in layers:
        bias = layer.biases[0] if layer.biases else None
        most = 0 if layer.shared else unit_bytes
        units = _grouped(layer.weight, bias, grids[layer.name], most)
        found += [(unit, times, layer.uses) for unit, times in units]
        if layer.uses.cut_short:
            kept.append((units[-1][0], layer.uses.cut_short))
    root = [bias for layer in layers for bias in layer.biases[1:]]
    for module in loose:
        nbytes = sum(each.nbytes for each in module.parameters)
        if module.alone and nbytes >= max(unit_bytes, 1):
            found.append((module.parameters, 1, module.uses))
        else:
            root += module.parameters
    return Units(tuple(found), tuple(root), tuple(kept))


def _zero3(
    layers: Sequence[ShardedLayer], grids: Mapping[str, Grid], loose: Sequence[LooseModule]
) -> Units:
    cut = [(layer, _cut(layer, grids[layer.name])) for layer in layers]
    own: list[tuple[Uses, tuple[Unit, ...]]] = [(each.uses, (each.parameters,)) for each in loose]
    own += [(layer.uses, units) for layer, units in cut]
    tiles = [unit for _, units in cut for unit in units]
    threshold = _persistent_up_to(tiles)
    persistent = [p for _, units in own for unit in units for p in unit if p.elements <= threshold]
    gathered = [
        (uses, [unit for whole in units if (unit := _larger(whole, threshold))])
        for uses, units in own
    ]
    found = [
        (unit, times, uses) for uses, units in gathered for unit, times in Counter(units).items()
    ]
    bucket = max((tile[0].nbytes for tile in tiles), default=0)
    return Units(tuple(found), tuple(persistent), turns=tuple(_turns(gathered)), bucket=bucket)


def _persistent_up_to(tiles: Sequence[Unit]) -> int:
    """As `Sizes.persistent_up_to` of the engine: the largest bias of a tile, but no tile."""
    beside = max((bias.elements for _, *biases in tiles for bias in biases), default=0)
    return min(beside, min((weight.elements for weight, *_ in tiles), default=1) - 1)


def _larger(unit: Unit, threshold: int) -> Unit:
    return tuple(parameter for parameter in unit if parameter.elements > threshold)


def _turns(gathered: Sequence[tuple[Uses, Sequence[Unit]]]) -> Iterator[Turn]:
    """The ends of recomputations, which let go of nothing, and that of forward."""
    trained = [(uses, tuple(reversed(units))) for uses, units in gathered if units]
    for uses, units in trained:
        if uses.cut_short:
            yield Turn(units, uses.cut_short, 1)
    if trained:
        _, units = max(trained, key=lambda each: each[0].last)
        yield Turn(units, 1, 0)


def _cut(layer: ShardedLayer, grid: Grid) -> tuple[Unit, ...]:
    """A layer's tiles, each with its bias; biases of other layers that share them come with it."""
    units = list(_tiles(layer.weight, layer.biases[0] if layer.biases else None, grid))
    for bias in layer.biases[1:]:
        rows = _sizes(grid.out_parts)
        units[-1] = (*units[-1], *(replace(bias, rows=height) for height in rows))
    return tuple(units)


@lru_cache(maxsize=1024)  # a model's blocks are alike
def _grouped(
    weight: Parameter, bias: Parameter | None, grid: Grid, unit_bytes: int
) -> tuple[tuple[Unit, int], ...]:
    """Neighbours together while they fit, as `memtile.engines.torch_fsdp2.shard` has them.

    Of units that are alike, how many there are; the one like the last comes last.
    """
    units: list[Unit] = []
    unit: Unit = ()
    for tile in _tiles(weight, bias, grid):
        if unit and sum(each.nbytes for each in (*unit, *tile)) > unit_bytes:
            units.append(unit)
            unit = ()
        unit = (*unit, *tile)
    found = Counter([*units, unit])
    times = found.pop(unit)
    return (*found.items(), (unit, times))


def _tiles(weight: Parameter, bias: Parameter | None, grid: Grid) -> Iterator[Unit]:
    """The parameters of each tile, row by row; a bias belongs to the last column."""
    rows, columns = _sizes(grid.out_parts), _sizes(grid.in_parts)
    for height in rows:
        for number, width in enumerate(columns):
            tile = Parameter(height, width, weight.element_bytes, weight.trainable)
            last = number == len(columns) - 1
            yield (tile, replace(bias, rows=height)) if bias and last else (tile,)


def _sizes(parts: tuple[int, ...]) -> list[int]:
    return [stop - start for start, stop in pairwise(parts)]
