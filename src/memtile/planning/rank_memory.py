"""The peak of one rank as a sum of named terms: what it keeps, and the moment that takes most.

The moments of a step are its forward, its backward, and the optimizer's step. Each has terms of its
own; the largest moment is added to what is kept all the time. A unit is what is gathered together:
U bytes of the largest one, R bytes of what stays whole.

FSDP2, forward: R + U in use + the buffer that it arrived in + one for each unit that is being
gathered, at least one: the last buffer is freed after the next unit arrived. Backward: R + U in use
+ a buffer for each unit being gathered + the gradients of R + the gradient of U + the buffer in
which the gradient before it is reduced. One rank gathers nothing. A tied weight gets one gradient,
the sum of its uses': autograd keeps those of the later uses, whole, until it comes to the first.

ZeRO-3 gathers into the parameter itself; one rank uses its own. Gradients are reduced from a bucket
that is allocated once and as large as the largest tile. Its content is copied and padded for that.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from memtile.planning.memory_model import activation_terms
from memtile.planning.model_records import Counted, State
from memtile.planning.plan_parts import Place, Term, sorted_terms
from memtile.planning.shards import GatherUnit, Parameter, Sharding, Units, trained_of

Offload = Literal["none", "cpu", "nvme"]

FLOAT32 = 4
_TEMPORARY = "temporary tensors of the optimizer"
_SUB_GROUP = 10**9  # elements that ZeRO-3 steps at once, by its documented default
_SWAP_BUFFERS = 5  # for parameters on a disk, likewise


@dataclass(frozen=True)
class RankSetting:
    """What depends neither on the tiles nor on the number of ranks."""

    offload: Offload  # where shards, gradients and moments live; "none": on the device
    prefetch: int  # units that are gathered ahead of the one in use
    state: State | None  # what the optimizer keeps; None: inference

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


def shards(setting: RankSetting, sharding: Sharding, units: Units) -> Shards:
    """What the fullest rank owns."""
    parameters = gradients = state = padding = trained = 0
    for each, times in units.parameters.items():
        elements = sharding.shard(each) * times
        kept = setting.state_bytes(each, sharding.engine)
        stepped = setting.state is not None and each.trainable
        parameters += elements * each.element_bytes
        gradients += elements * each.element_bytes if stepped else 0
        state += elements * kept
        trained += elements if stepped else 0
        held = each.element_bytes * (2 if stepped else 1) + kept
        padding += (elements - each.elements * times // sharding.world) * held
    return Shards(parameters, gradients, state, padding, trained)


@dataclass(frozen=True)
class Moment:
    """A moment of a step, such as "backward", and what it takes of a device beside what is kept."""

    name: str
    terms: tuple[Term, ...]

    @property
    def nbytes(self) -> int:
        """The sum of its terms."""
        return sum(term.nbytes for term in self.terms)


def kept_terms(setting: RankSetting, sharding: Sharding, units: Units) -> tuple[Term, ...]:
    """What a rank keeps all the time, largest first in each place."""
    own = shards(setting, sharding, units)
    some = [*_kept(setting, sharding, units, own), *_host_step(setting, sharding, units, own)]
    return sorted_terms(some)


def moments(
    setting: RankSetting, sharding: Sharding, units: Units, counted: Counted
) -> tuple[Moment, ...]:
    """The moments of a step, in their order."""
    found = _moments(setting, sharding, units, counted)
    return tuple(Moment(name, sorted_terms(terms)) for name, terms in found)


def peak_moment(moments: Iterable[Moment]) -> Moment:
    """The moment that takes most."""
    return max(moments, key=lambda moment: moment.nbytes)


def _kept(setting: RankSetting, sharding: Sharding, units: Units, own: Shards) -> Iterator[Term]:
    place: Place = {"none": "device", "cpu": "host", "nvme": "disk"}[setting.offload]  # type: ignore[assignment]  # its values are places
    on_disk = place == "disk"
    yield Term("shards of parameters", own.parameters, place)
    yield Term("gradients of shards", own.gradients, "host" if on_disk else place)
    yield Term("optimizer's state of shards", own.state, place)
    if sharding.engine == "zero3":
        yield Term("persistent parameters, whole", _nbytes(units.resident), "device")
        if own.trained:
            yield Term("bucket of gradients", units.bucket, "device")
    if place != "device" and sharding.engine == "zero3":
        yield Term("float32 gradients of shards", own.trained * FLOAT32, place)
    if on_disk:
        largest = _largest(sharding, units, False) // sharding.world
        yield Term("swap buffers of parameters", _SWAP_BUFFERS * largest, "host")


def _moments(
    setting: RankSetting, sharding: Sharding, units: Units, counted: Counted
) -> Iterator[tuple[str, Iterable[Term]]]:
    fsdp2, trains = sharding.engine == "fsdp2", setting.state is not None
    activations = [*activation_terms(counted, setting.state, "device", "temporary tensors")]
    if fsdp2:
        yield "the start of forward", _started(sharding, units)
    yield "forward", [*_gathered(setting, sharding, units, forward=True), *activations]
    if trains:
        whole = _gathered(setting, sharding, units, forward=False)
        yield "backward", [*whole, *activations, *_gradients(sharding, units)]
    if fsdp2 and any(uses.again for _, _, uses in units.tiles):
        found = _recomputed(sharding, units)
        yield "the recomputation", [*found, *activations]
    if trains and fsdp2:
        yield "the end of backward", _root_gradients(sharding, units)
    if trains and setting.offload == "none":
        temporary = _stepping(setting, sharding, units)
        yield "the optimizer's step", [Term(_TEMPORARY, temporary, "device")]


def _gathered(
    setting: RankSetting, sharding: Sharding, units: Units, *, forward: bool
) -> Iterator[Term]:
    """Units that are whole; in forward FSDP2 keeps a unit's buffer until the next one arrived."""
    largest = _largest(sharding, units, False)
    fsdp2, alone = sharding.engine == "fsdp2", sharding.world == 1
    keeps = fsdp2 and forward
    ahead = min(max(setting.prefetch, int(keeps)), max(0, units.number - 1))
    if fsdp2:
        yield Term("untiled, gathered", sharding.whole(units.resident), "device")
    if fsdp2 or not alone or setting.offload != "none":
        yield Term("unit at work", largest, "device")
    if not alone or (not fsdp2 and setting.offload != "none"):
        yield Term("units on their way", ahead * largest, "device")
        yield Term("buffer of the all-gather", largest if keeps else 0, "device")
        several = [
            sharding.whole(unit) for unit, _, _ in units.tiles if len(unit) > 1 and not fsdp2
        ]
        yield Term("copy of what is gathered with others", max(several, default=0), "device")
        waits = not forward and any(len(turn.kept(0)) > ahead for turn in units.turns)
        yield Term("unit that waits", largest if waits else 0, "device")
    if setting.offload != "none":
        yield Term("shard of a unit, from the host", largest // sharding.world, "device")


def _recomputed(sharding: Sharding, units: Units) -> Iterator[Term]:
    """One unit waits for its backward, while its block's units are gathered again one by one."""
    largest = _largest(sharding, units, False)
    yield Term("untiled, gathered", sharding.whole(units.resident), "device")
    yield Term("unit that waits", largest, "device")
    yield Term("unit at work", largest, "device")
    if sharding.world > 1:
        yield Term("buffer of the all-gather", largest, "device")
    yield Term("gradients of the untiled", _nbytes(trained_of(units.resident)), "device")
    yield Term("buffer of the reduce-scatter", _largest(sharding, units, True), "device")


def _started(sharding: Sharding, units: Units) -> Iterator[Term]:
    root, largest = sharding.whole(units.resident), _largest(sharding, units, False)
    yield Term("untiled, gathered", root, "device")
    if sharding.world > 1:
        yield Term("buffers of the all-gather", root + largest, "device")


def _root_gradients(sharding: Sharding, units: Units) -> Iterator[Term]:
    root = trained_of(units.resident)
    yield Term("gradients of the untiled", _nbytes(root), "device")
    yield Term("buffer of the reduce-scatter", sharding.whole(root), "device")


def _gradients(sharding: Sharding, units: Units) -> Iterator[Term]:
    largest = _largest(sharding, units, True)
    if sharding.engine == "fsdp2":
        yield Term("gradients of the untiled", _nbytes(trained_of(units.resident)), "device")
        yield Term("buffer of the reduce-scatter", largest, "device")
    else:
        yield Term("padded copy of the bucket", _leaving(sharding, units), "device")
    trained = [trained_of(unit) for unit, _, _ in units.tiles]
    gradient = max((_nbytes(unit) for unit in trained), default=0)
    yield Term("gradient of a unit, whole", gradient, "device")
    tied = sum(
        _nbytes(trained_of(unit)) * times for unit, times, uses in units.tiles if uses.backward > 1
    )
    yield Term("gradients of what is tied, until its first use", tied, "device")


def _leaving(sharding: Sharding, units: Units) -> int:
    """The most bytes that a full bucket is reduced in: of the parameters with most padding."""
    room, padding = units.bucket, 0
    trained = [(p, times) for p, times in units.parameters.items() if p.trainable]
    for each, times in sorted(trained, key=lambda found: found[0].nbytes):
        fit = min(times, room // each.nbytes)
        room -= fit * each.nbytes
        padding += fit * (sharding.whole((each,)) - each.nbytes)
    return max(units.bucket + padding, _largest(sharding, units, True)) if trained else 0


def _host_step(
    setting: RankSetting, sharding: Sharding, units: Units, own: Shards
) -> Iterator[Term]:
    """Host memory for the optimizer's step, where moments are not on the device."""
    if setting.offload == "none" or setting.state is None:
        return
    yield Term(_TEMPORARY, _stepping(setting, sharding, units), "host")
    if setting.offload == "nvme":
        stepped = min(own.trained, _SUB_GROUP)
        each = own.state // max(1, own.trained) + FLOAT32
        yield Term("swap buffers of the optimizer", stepped * each, "host")


def _stepping(setting: RankSetting, sharding: Sharding, units: Units) -> int:
    """FSDP2: a tensor beside each shard, as torch's optimizers make; ZeRO-3: float32 gradients."""
    assert setting.state is not None
    trained = {p: times for p, times in units.parameters.items() if p.trainable}
    if sharding.engine == "zero3":
        elements = sum(sharding.shard(each) * times for each, times in trained.items())
        return min(elements, _SUB_GROUP) * FLOAT32
    return sum(
        sharding.shard(each) * times * max(setting.state.of(each.element_bytes), default=0)
        for each, times in trained.items()
    )


def _largest(sharding: Sharding, units: Units, trained: bool) -> int:
    found = (trained_of(unit) if trained else unit for unit, _, _ in units.tiles)
    return max((sharding.whole(unit) for unit in found), default=0)


def _nbytes(unit: GatherUnit) -> int:
    return sum(parameter.nbytes for parameter in unit)
