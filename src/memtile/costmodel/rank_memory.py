"""The peak memory of one rank as a sum of named terms.

It is what is kept all the time and the largest of three phases: forward, backward, and the
optimizer's step, each with its own terms. A unit is what is gathered at once. The largest unit has
U bytes, and the parameters that stay gathered have R bytes. Of an MLP in tiles the units that are
used together are in use at once, and their gradients are whole at once.

FSDP2, forward: R + U in use + the buffer that it arrived in + one for each unit that is being
gathered, at least one: the last buffer is freed after the next unit arrived. Backward: R + U in use
+ a buffer for each unit being gathered + the gradients of R + the gradient of U + the buffer in
which the gradient before it is reduced. One rank gathers nothing. A tied weight gets one gradient,
the sum of its uses': autograd keeps those of the later uses, whole, until it comes to the first.

ZeRO-3 gathers into the parameter itself; one rank uses its own. Gradients are reduced from a bucket
that is allocated once and as large as the largest tile. Its content is copied and padded first.

Activations that are parked in host memory are copied there from a clone, and back ahead of their
use: a few are on their way. Those on a disk go through slabs of host memory.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from memtile.costmodel.memory_model import activation_terms
from memtile.costmodel.model_records import Counted, StateSizes
from memtile.costmodel.plan_parts import Place, Term, sorted_terms
from memtile.costmodel.shards import GatherUnit, Parameter, Sharding, Units, trained_of

Offload = Literal["none", "cpu", "nvme"]

FLOAT32 = 4
_TEMPORARY = "temporary tensors of the optimizer"
_SUB_GROUP = 10**9  # elements that ZeRO-3 steps at once, by its documented default
_SWAP_BUFFERS = 5  # for parameters on a disk, likewise
_PLACES: dict[Offload, Place] = {"none": "device", "cpu": "host", "nvme": "disk"}


@dataclass(frozen=True)
class RankSetting:
    """What depends neither on the tiles nor on the number of ranks."""

    offload: Offload  # where shards, gradients and moments live; "none": on the device
    prefetch: int  # units that are gathered ahead of the one in use
    state: StateSizes | None  # what the optimizer keeps; None: inference
    home: Place = "host"  # where activations live that are parked
    copies: int = 0  # of them, that are on their way between device and host at most
    slabs: int = 0  # of host memory, that they go through to a disk
    converting_bytes: int = 0  # the most that one conversion takes while weights are loaded

    def state_bytes(self, parameter: Parameter, engine: str) -> int:
        """Bytes that the optimizer keeps for one element of a parameter."""
        if self.state is None or not parameter.trainable:
            return 0
        kept = sum(self.state.of(parameter.element_bytes))
        # DeepSpeed would step float32 in place, but compares a device with its name: never equal.
        copied = engine == "zero3" and parameter.element_bytes == FLOAT32
        return kept + (FLOAT32 if copied else 0)


@dataclass(frozen=True)
class Shards:
    """What one rank owns, in bytes."""

    parameters: int
    gradients: int
    state: int  # of the optimizer
    padding: int  # how many of all these pad shards to one size
    trained: int  # elements that are trained, not bytes


@dataclass(frozen=True)
class Rank:
    """One rank of a model that is divided among ranks: the fullest of them."""

    setting: RankSetting
    sharding: Sharding
    units: Units

    @property
    def alone(self) -> bool:
        """Whether it is the only rank."""
        return self.sharding.world == 1

    @property
    def fsdp2(self) -> bool:
        """Whether the engine is FSDP2, not ZeRO-3."""
        return self.sharding.engine == "fsdp2"

    @property
    def trains(self) -> bool:
        """Whether there is an optimizer."""
        return self.setting.state is not None

    @cached_property
    def shards(self) -> Shards:
        """What it owns."""
        parameters = gradients = state = padding = trained = 0
        for each, times in self.units.parameters.items():
            elements = self.sharding.shard(each) * times
            kept = self.setting.state_bytes(each, self.sharding.engine)
            stepped = self.trains and each.trainable
            parameters += elements * each.element_bytes
            gradients += elements * each.element_bytes if stepped else 0
            state += elements * kept
            trained += elements if stepped else 0
            held = each.element_bytes * (2 if stepped else 1) + kept
            padding += (elements - each.elements * times // self.sharding.world) * held
        return Shards(parameters, gradients, state, padding, trained)

    @cached_property
    def largest_unit(self) -> int:
        """Bytes of the largest unit that is gathered."""
        return max((self.sharding.whole(unit) for unit, _, _ in self.units.tiles), default=0)

    @cached_property
    def in_use(self) -> int:
        """The most bytes of units that are used at once."""
        together = (sum(map(self.sharding.whole, units)) for units in self.units.together)
        return max([self.largest_unit, *together])

    @cached_property
    def largest_trained(self) -> int:
        """Bytes of the largest padded gradients of a unit."""
        units = (trained_of(unit) for unit, _, _ in self.units.tiles)
        return max(map(self.sharding.whole, units), default=0)


@dataclass(frozen=True)
class Moment:
    """A moment of a step, such as "backward", and what it takes of a device beside what is kept."""

    name: str
    terms: tuple[Term, ...]

    @property
    def nbytes(self) -> int:
        """The sum of its terms."""
        return sum(term.nbytes for term in self.terms)


def kept_terms(rank: Rank, counted: Counted) -> tuple[Term, ...]:
    """What a rank keeps all the time, largest first in each place."""
    stepping = [*_host_step(rank)]
    # Weights are loaded before the optimizer's first step.
    converting = rank.setting.converting_bytes - sum(term.nbytes for term in stepping)
    loading = Term("conversion of weights while they are loaded", max(0, converting), "host")
    parked = Term("activations at home", counted.parked_bytes, rank.setting.home)
    slabs = Term("slabs of activations", rank.setting.slabs * counted.largest_parked, "host")
    return sorted_terms([*_kept(rank), *stepping, loading, parked, slabs])


def moments(rank: Rank, counted: Counted) -> tuple[Moment, ...]:
    """The moments of a step, in their order."""
    return tuple(Moment(name, sorted_terms(terms)) for name, terms in _moments(rank, counted))


def peak_moment(moments: Iterable[Moment]) -> Moment:
    """The moment that takes most."""
    return max(moments, key=lambda moment: moment.nbytes)


def _kept(rank: Rank) -> Iterator[Term]:
    place = _PLACES[rank.setting.offload]
    on_disk = place == "disk"
    yield Term("shards of parameters", rank.shards.parameters, place)
    yield Term("gradients of shards", rank.shards.gradients, "host" if on_disk else place)
    yield Term("optimizer's state of shards", rank.shards.state, place)
    if not rank.fsdp2:
        yield Term("persistent parameters, whole", _nbytes(rank.units.resident), "device")
        if rank.shards.trained:
            yield Term("bucket of gradients", rank.units.bucket, "device")
    if place != "device" and not rank.fsdp2:
        yield Term("float32 gradients of shards", rank.shards.trained * FLOAT32, place)
    if on_disk:
        largest = rank.largest_unit // rank.sharding.world
        yield Term("swap buffers of parameters", _SWAP_BUFFERS * largest, "host")


def _moments(rank: Rank, counted: Counted) -> Iterator[tuple[str, Iterable[Term]]]:
    moving = min(rank.setting.copies * counted.largest_parked, counted.parked_bytes)
    activations = [
        *activation_terms(counted, rank.setting.state, "device", "temporary tensors"),
        Term("activations on their way", moving, "device"),
    ]
    if rank.fsdp2:
        yield "the start of forward", _started(rank)
    yield "forward", [*_gathered(rank, forward=True), *activations]
    if rank.trains:
        yield "backward", [*_gathered(rank, forward=False), *activations, *_gradients(rank)]
    if rank.fsdp2 and any(uses.recomputed for _, _, uses in rank.units.tiles):
        yield "the recomputation", [*_recomputed(rank), *activations]
    if rank.fsdp2 and rank.trains:
        yield "the end of backward", _root_gradients(rank)
    if rank.trains and rank.setting.offload == "none":
        yield "the optimizer's step", [Term(_TEMPORARY, _stepping(rank), "device")]


def _gathered(rank: Rank, *, forward: bool) -> Iterator[Term]:
    """Units that are whole; in forward FSDP2 keeps a unit's buffer until the next one arrived."""
    largest, fsdp2, offloads = rank.largest_unit, rank.fsdp2, rank.setting.offload != "none"
    keeps = fsdp2 and forward
    ahead = min(max(rank.setting.prefetch, int(keeps)), max(0, rank.units.number - 1))
    if fsdp2:
        yield Term("untiled, gathered", rank.sharding.whole(rank.units.resident), "device")
    if fsdp2 or not rank.alone or offloads:
        yield Term("unit in use", rank.in_use, "device")
    if not rank.alone or (not fsdp2 and offloads):
        yield Term("units on their way", ahead * largest, "device")
        yield Term("buffer of the all-gather", largest if keeps else 0, "device")
        several = [unit for unit, _, _ in rank.units.tiles if len(unit) > 1 and not fsdp2]
        copied = max(map(rank.sharding.whole, several), default=0)
        yield Term("copy of what is gathered with others", copied, "device")
        waits = not forward and any(len(turn.kept(0)) > ahead for turn in rank.units.turns)
        yield Term("unit that waits", largest if waits else 0, "device")
    if offloads:
        yield Term("shard of a unit, from the host", largest // rank.sharding.world, "device")


def _recomputed(rank: Rank) -> Iterator[Term]:
    """One unit waits for its backward, while its block's units are gathered again one by one.

    Those of an MLP in tiles are gathered after the recomputation that their backward asks for.
    Where they are recomputed, they are in use together, and others may be on their way.
    """
    largest = rank.largest_unit
    together = any(uses.together and uses.recomputed for _, _, uses in rank.units.tiles)
    yield Term("untiled, gathered", rank.sharding.whole(rank.units.resident), "device")
    yield Term("unit that waits", largest, "device")
    yield Term("unit in use", rank.in_use if together else largest, "device")
    if not rank.alone:
        ahead = rank.setting.prefetch if together else 0
        yield Term("units on their way", ahead * largest, "device")
        yield Term("buffer of the all-gather", largest, "device")
    yield Term("gradients of the untiled", _nbytes(trained_of(rank.units.resident)), "device")
    yield Term("buffer of the reduce-scatter", rank.largest_trained, "device")


def _started(rank: Rank) -> Iterator[Term]:
    root, largest = rank.sharding.whole(rank.units.resident), rank.largest_unit
    yield Term("untiled, gathered", root, "device")
    if not rank.alone:
        yield Term("buffers of the all-gather", root + largest, "device")


def _root_gradients(rank: Rank) -> Iterator[Term]:
    root = trained_of(rank.units.resident)
    yield Term("gradients of the untiled", _nbytes(root), "device")
    yield Term("buffer of the reduce-scatter", rank.sharding.whole(root), "device")


def _gradients(rank: Rank) -> Iterator[Term]:
    if rank.fsdp2:
        yield Term("gradients of the untiled", _nbytes(trained_of(rank.units.resident)), "device")
        yield Term("buffer of the reduce-scatter", rank.largest_trained, "device")
    else:
        yield Term("padded copy of the bucket", _leaving(rank), "device")
    found = [(_nbytes(trained_of(unit)), times, uses) for unit, times, uses in rank.units.tiles]
    together = (sum(_nbytes(trained_of(u)) for u in units) for units in rank.units.together)
    gradient = max([0, *(nbytes for nbytes, _, _ in found), *together])
    yield Term("gradient of a unit, whole", gradient, "device")
    tied = sum(nbytes * times for nbytes, times, uses in found if uses.backward > 1)
    yield Term("gradients of what is tied, until its first use", tied, "device")


def _leaving(rank: Rank) -> int:
    """The most bytes that a full bucket is reduced in: of the parameters with most padding."""
    room, padding = rank.units.bucket, 0
    trained = [(p, times) for p, times in rank.units.parameters.items() if p.trainable]
    for each, times in sorted(trained, key=lambda found: found[0].nbytes):
        fit = min(times, room // each.nbytes)
        room -= fit * each.nbytes
        padding += fit * (rank.sharding.whole((each,)) - each.nbytes)
    return max(rank.units.bucket + padding, rank.largest_trained) if trained else 0


def _host_step(rank: Rank) -> Iterator[Term]:
    """Host memory for the optimizer's step, where moments are not on the device."""
    if rank.setting.offload == "none" or not rank.trains:
        return
    yield Term(_TEMPORARY, _stepping(rank), "host")
    if rank.setting.offload == "nvme":
        stepped = min(rank.shards.trained, _SUB_GROUP)
        each = rank.shards.state // max(1, rank.shards.trained) + FLOAT32
        yield Term("swap buffers of the optimizer", stepped * each, "host")


def _stepping(rank: Rank) -> int:
    """FSDP2: a tensor beside each shard, as torch's optimizers make; ZeRO-3: float32 gradients."""
    if not rank.fsdp2:
        return min(rank.shards.trained, _SUB_GROUP) * FLOAT32
    state, shard = rank.setting.state, rank.sharding.shard
    assert state is not None
    return sum(
        shard(each) * times * max(state.of(each.element_bytes), default=0)
        for each, times in rank.units.parameters.items()
        if each.trainable
    )


def _nbytes(unit: GatherUnit) -> int:
    return sum(parameter.nbytes for parameter in unit)
