"""How engines divide a model among ranks: units that are gathered together, and shards.

FSDP2 cuts each parameter along its first dimension, in pieces of as many rows as the largest shard
has: a tile with fewer rows than ranks is padded to one row for each. A module without tiles is a
unit where it is as large as one; all that is smaller belongs to the root, which is whole from the
start of a forward to the end of its backward.

ZeRO-3 cuts each parameter's elements, padded to a multiple of the ranks, and gathers a module's own
parameters together. Small ones are persistent: whole on every rank, and sharded besides. These are
those up to the threshold of `memtile.engines.deepspeed_zero3.config`: a tile's bias, but no tile.

Source: torch 2.13 (`FSDPParam`), DeepSpeed 0.19 (`Init._partition_param`).
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Literal

from memtile.costmodel.model_records import Mlp
from memtile.geometry import Grid

Engine = Literal["fsdp2", "zero3"]


@dataclass(frozen=True)
class Parameter:
    """A parameter before it is sharded."""

    rows: int  # its first dimension
    columns: int  # elements of each row
    element_bytes: int
    trainable: bool

    @property
    def elements(self) -> int:
        """How many values it has."""
        return self.rows * self.columns

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.elements * self.element_bytes


@dataclass(frozen=True)
class Uses:
    """How often a step runs a layer."""

    forward: int
    recomputed: int  # in backward, where activations are recomputed
    backward: int  # how often a gradient comes back through it
    cut_short: int = 0  # how often a recomputation ended inside it: nothing after it is needed
    last: int = 0  # its place in the order in which layers began their last forward
    together: bool = False  # whether its tiles are gathered with those of its MLP

    @property
    def gathers(self) -> int:
        """How often a unit is gathered that is freed after each use."""
        return self.forward + self.recomputed + self.backward


@dataclass(frozen=True)
class ShardedLayer:
    """A linear or an embedding whose tiles are units, with all layers that share its weight."""

    name: str  # of the first module that has it
    weight: Parameter  # whole
    biases: tuple[Parameter, ...]  # of all these modules
    shared: bool  # whether several modules have it: its tiles are never grouped
    uses: Uses  # of all these modules


GatherUnit = tuple[Parameter, ...]


@dataclass(frozen=True)
class LooseModule:
    """A module's own parameters that are no tiles."""

    name: str
    parameters: GatherUnit  # those that no module before it has
    alone: bool  # whether it can be a unit: it holds no module, and shares no parameter
    uses: Uses


@dataclass(frozen=True)
class Turn:
    """The start of a backward; as many units as are gathered ahead are still whole then."""

    units: tuple[GatherUnit, ...]  # those before, the last one first
    times: int  # how often a step has it
    least: int  # how many are whole even where none is gathered ahead

    def kept(self, prefetch: int) -> tuple[GatherUnit, ...]:
        """Those that are still whole."""
        return self.units[: max(prefetch, self.least)]


@dataclass(frozen=True)
class Units:
    """All parameters of a model, as an engine groups them."""

    tiles: tuple[tuple[GatherUnit, int, Uses], ...]  # (unit, how many such, uses of each)
    resident: GatherUnit  # stays whole: FSDP2's root in a step, ZeRO-3's persistent ones always
    # (unit, times): a recomputation ended in them, so they are still whole in their backward
    kept: tuple[tuple[GatherUnit, int], ...] = ()
    turns: tuple[Turn, ...] = ()  # what ZeRO-3 keeps in the same way
    together: tuple[tuple[GatherUnit, ...], ...] = ()  # the largest that are used at once
    bucket: int = 0  # bytes of the buffer that ZeRO-3 reduces gradients from: its largest tile's

    @property
    def parameters(self) -> Counter[Parameter]:
        """Each distinct parameter with its multiplicity."""
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
    """How an engine cuts parameters for some ranks."""

    engine: Engine
    world: int  # ranks
    unit_bytes: int  # FSDP2 gathers neighbouring tiles of a layer together up to this size

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
        mlps: Sequence[Mlp] = (),
    ) -> Units:
        """What is gathered together, of tiled layers (with grids by name) and all other modules.

        Of these MLPs, those whose layers are used together.
        """
        if self.engine == "fsdp2":
            alone = [module for module in loose if self._is_unit(module)]
            others = [module for module in loose if not self._is_unit(module)]
            units = _fsdp2(layers, grids, alone, others, self.unit_bytes)
        else:
            units = _zero3(layers, grids, loose)
        by_name = {layer.name: layer for layer in layers if layer.uses.together}
        adapters = {each.name: each.parameters for each in loose if self._is_unit(each)}
        found = [
            (
                *(self._largest(by_name[name], grids) for name in names),
                *(adapters[name] for name in mlp.adapters if name in adapters),
            )
            for mlp in mlps
            if (names := _used_at_once(mlp, grids)) and by_name.keys() >= set(names)
        ]
        return replace(units, together=tuple(dict.fromkeys(found)))

    def _is_unit(self, module: LooseModule) -> bool:
        """Whether it is gathered when it is called, and not with the root."""
        nbytes = sum(each.nbytes for each in module.parameters)
        return self.engine == "zero3" or (module.alone and nbytes >= max(self.unit_bytes, 1))

    def _largest(self, layer: ShardedLayer, grids: Mapping[str, Grid]) -> GatherUnit:
        """The largest unit of a layer's tiles."""
        grid, bias = grids[layer.name], layer.biases[0] if layer.biases else None
        most = self.unit_bytes if self.engine == "fsdp2" and not layer.shared else 0
        units = _grouped(layer.weight, bias, grid, most)
        return max((unit for unit, _ in units), key=self.whole)


def trained_of(unit: GatherUnit) -> GatherUnit:
    """The parameters of a unit that get gradients."""
    return tuple(parameter for parameter in unit if parameter.trainable)


def _used_at_once(mlp: Mlp, grids: Mapping[str, Grid]) -> list[str]:
    """The layers of an MLP, once for each of their tiles that are used with one of down."""
    splits = len(grids[mlp.down].in_parts) - 1
    both = [name for name in mlp.inner for _ in range((len(grids[name].out_parts) - 1) // splits)]
    return [*both, mlp.down]


def _fsdp2(
    layers: Sequence[ShardedLayer],
    grids: Mapping[str, Grid],
    alone: Sequence[LooseModule],
    others: Sequence[LooseModule],
    unit_bytes: int,
) -> Units:
    found: list[tuple[GatherUnit, int, Uses]] = []
    kept: list[tuple[GatherUnit, int]] = []
    for layer in layers:
        bias = layer.biases[0] if layer.biases else None
        most = 0 if layer.shared else unit_bytes
        units = _grouped(layer.weight, bias, grids[layer.name], most)
        found += [(unit, times, layer.uses) for unit, times in units]
        if layer.uses.cut_short:
            kept.append((units[-1][0], layer.uses.cut_short))
    found += [(module.parameters, 1, module.uses) for module in alone]
    kept += [(m.parameters, m.uses.cut_short) for m in alone if m.uses.cut_short]
    root = [bias for layer in layers for bias in layer.biases[1:]]
    root += [parameter for module in others for parameter in module.parameters]
    return Units(tuple(found), tuple(root), tuple(kept))


def _zero3(
    layers: Sequence[ShardedLayer], grids: Mapping[str, Grid], loose: Sequence[LooseModule]
) -> Units:
    cut = [(layer, _cut(layer, grids[layer.name])) for layer in layers]
    own: list[tuple[Uses, tuple[GatherUnit, ...]]] = [
        (each.uses, (each.parameters,)) for each in loose
    ]
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


def _persistent_up_to(tiles: Sequence[GatherUnit]) -> int:
    """As `Sizes.persistent_up_to` of the engine: the largest bias of a tile, but no tile."""
    beside = max((bias.elements for _, *biases in tiles for bias in biases), default=0)
    return min(beside, min((weight.elements for weight, *_ in tiles), default=1) - 1)


def _larger(unit: GatherUnit, threshold: int) -> GatherUnit:
    return tuple(parameter for parameter in unit if parameter.elements > threshold)


def _turns(gathered: Sequence[tuple[Uses, Sequence[GatherUnit]]]) -> Iterator[Turn]:
    """The end of each recomputation, at which nothing is freed, and the end of forward."""
    trained = [(uses, tuple(reversed(units))) for uses, units in gathered if units]
    for uses, units in trained:
        if uses.cut_short:
            yield Turn(units, uses.cut_short, 1)
    if trained:
        _, units = max(trained, key=lambda each: each[0].last)
        yield Turn(units, 1, 0)


def _cut(layer: ShardedLayer, grid: Grid) -> tuple[GatherUnit, ...]:
    """A layer's tiles, each with its bias; the last has the biases of layers that share them."""
    units = list(_tiles(layer.weight, layer.biases[0] if layer.biases else None, grid))
    for bias in layer.biases[1:]:
        rows = _sizes(grid.out_parts)
        units[-1] = (*units[-1], *(replace(bias, rows=height) for height in rows))
    return tuple(units)


@lru_cache(maxsize=1024)  # many layers of a model have the same shape
def _grouped(
    weight: Parameter, bias: Parameter | None, grid: Grid, unit_bytes: int
) -> tuple[tuple[GatherUnit, int], ...]:
    """Units of neighbouring tiles, as in `memtile.engines.torch_fsdp2.shard`, and their numbers.

    The unit that equals the last one comes last.
    """
    units: list[GatherUnit] = []
    unit: GatherUnit = ()
    for tile in _tiles(weight, bias, grid):
        if unit and sum(each.nbytes for each in (*unit, *tile)) > unit_bytes:
            units.append(unit)
            unit = ()
        unit = (*unit, *tile)
    found = Counter([*units, unit])
    times = found.pop(unit)
    return (*found.items(), (unit, times))


def _tiles(weight: Parameter, bias: Parameter | None, grid: Grid) -> Iterator[GatherUnit]:
    """The parameters of each tile, row by row; a bias belongs to the last column."""
    rows, columns = _sizes(grid.out_parts), _sizes(grid.in_parts)
    for height in rows:
        for number, width in enumerate(columns):
            tile = Parameter(height, width, weight.element_bytes, weight.trainable)
            last = number == len(columns) - 1
            yield (tile, replace(bias, rows=height)) if bias and last else (tile,)


def _sizes(parts: tuple[int, ...]) -> list[int]:
    return [stop - start for start, stop in pairwise(parts)]
