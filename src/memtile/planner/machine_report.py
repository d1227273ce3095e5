"""What a machine offers to tiles: its rates beside the saved ones, and what would stop a run."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from operator import methodcaller
from pathlib import Path
from typing import Any, Final, get_args

import torch

from memtile.costmodel import MachineProfile, format_byte_size
from memtile.costmodel.time_model import ReachedBy, free_from
from memtile.errors import MemtileError
from memtile.planner import machine_rates, saved_rates
from memtile.planner.machine_facts import FolderFacts, SystemFacts
from memtile.planner.moving_rates import MeasuredDisk, link_rates

_FEW, _MANY = 16, 1024  # tokens
_STALE: Final = 2.0
_LEAST_MEMORY: Final = 512 << 20  # torch, transformers and their first step


@dataclass(frozen=True)
class Rate:
    """One rate, in its unit a second, and the one that plans use."""

    what: str
    unit: str  # "B", "FLOP", "visit", or "" for numbers: a second
    now: float
    saved: float | None  # None: nothing is saved, or plans do not use it

    @property
    def change(self) -> float | None:
        """The rate over the saved one."""
        return self.now / self.saved if self.saved else None


@dataclass(frozen=True)
class FreeFrom:
    """The tokens of a step from which on a home is free; see `costmodel.time_model.free_from`."""

    home: ReachedBy
    work: str  # "inference" or "AdamW"
    dtype: str
    tokens: int | None  # None: at no number up to 2^20


@dataclass(frozen=True)
class Extra:
    """Rates in bytes a second that plans do not use; None: not measured."""

    mixed_bytes: float | None = None  # of direct reads and writes at once
    to_accelerator: float | None = None  # from pinned memory
    from_accelerator: float | None = None


@dataclass(frozen=True)
class MachineReport:
    """All that was found. `problems` would stop a run; `warnings` would slow it down."""

    folder: FolderFacts
    system: SystemFacts
    saved_in: str
    rates: tuple[Rate, ...]
    free_from: tuple[FreeFrom, ...]
    problems: tuple[str, ...]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As objects of JSON; each rate with how it changed."""
        rates = [{**asdict(rate), "change": rate.change} for rate in self.rates]
        return {**asdict(self), "rates": rates}

    def with_more(
        self, problems: Sequence[str] = (), warnings: Sequence[str] = ()
    ) -> "MachineReport":
        """The same with what the caller found besides."""
        return replace(
            self,
            problems=(*self.problems, *problems),
            warnings=(*self.warnings, *warnings),
        )


def examine(given: Path | None, started: Callable[[str], None]) -> MachineReport:
    """Measures this machine and the disk of a folder, in half a minute or less.

    The rates of an idle machine are saved for plans where none are; those that were saved stay.

    Args:
        given: a folder that exists; None: where homes lie by default.
        started: called with the name of each measurement when it begins.
    """
    folder, system = FolderFacts.of(given), SystemFacts.here()
    disk = Path(folder.path) if folder.path and not folder.why_unusable else None
    extra, now, problems = Extra(), None, []
    try:
        extra = _extra(disk, system, started)
    except MemtileError as error:  # such as a quota: what does not need the disk is measured
        disk = None
        problems.append(getattr(error, "strerror", None) or str(error))
    saved = saved_rates.saved(disk)
    try:
        now = machine_rates.measured(disk, started)
    except machine_rates.MeasuringError as error:
        problems.append(str(error))
    saves = now is not None and saved is None and not system.is_busy
    warnings = tuple(_save(now, disk)) if now and saves else ()
    found = report(folder, system, now, extra, saved, str(saved_rates.place_of(disk)))
    return found.with_more(problems, warnings)


def report(
    folder: FolderFacts,
    system: SystemFacts,
    now: MachineProfile | None,
    extra: Extra,
    saved: MachineProfile | None,
    saved_in: str,
) -> MachineReport:
    """The report of what was found; measures nothing. `now` is None where measuring failed."""
    rates = tuple(_rates(folder, now, extra, saved)) if now else ()
    return MachineReport(
        folder=folder,
        system=system,
        saved_in=saved_in,
        rates=rates,
        free_from=tuple(_free_from(folder, now)) if now else (),
        problems=tuple(_problems(folder, system)),
        warnings=tuple(_warnings(folder, system, rates, saved_in)),
    )


def _save(now: MachineProfile, disk: Path | None) -> Iterator[str]:
    """Saves the rates for plans, or says why it cannot be done."""
    try:
        saved_rates.save(now, disk)
    except OSError as error:
        yield (
            f"{saved_rates.place_of(disk)} cannot be written ({error.strerror}), so every plan "
            "measures anew: set XDG_CACHE_HOME to a folder that can"
        )


def _extra(disk: Path | None, system: SystemFacts, started: Callable[[str], None]) -> Extra:
    extra = Extra()
    if disk:
        started("disk, direct reads and writes at once")
        with MeasuredDisk(disk) as measured:
            extra = Extra(mixed_bytes=measured.mix())
    if system.accelerator:
        started(f"the link to {system.accelerator}")
        device = torch.accelerator.current_accelerator()
        assert device is not None
        there, back = link_rates(device)
        extra = replace(extra, to_accelerator=there, from_accelerator=back)
    return extra


def _rates(
    folder: FolderFacts, now: MachineProfile, extra: Extra, saved: MachineProfile | None
) -> Iterator[Rate]:
    """All rates that were measured."""

    def rate(what: str, unit: str, of: Callable[[MachineProfile], float]) -> Rate:
        return Rate(what, unit, of(now), of(saved) if saved else None)

    def extra_rate(what: str, bytes_a_second: float | None) -> Iterator[Rate]:
        if bytes_a_second is not None:
            yield Rate(what, "B", bytes_a_second, None)

    for name, element_bytes in (("float32", 4), ("bfloat16", 2)):
        for tokens in (_FEW, _MANY):
            what = f"products, {name}, {tokens} tokens"
            yield rate(what, "FLOP", methodcaller("flops", tokens, element_bytes))
    yield rate("memory", "B", lambda of: of.touched_bytes)
    yield rate("elements of AdamW, float32", "", lambda of: of.stepped_elements)
    yield rate("tiles, without their products", "visit", lambda of: 1 / (of.tile_seconds or 1e-9))
    if now.mapped_bytes:
        yield rate("disk, page cache, mapped", "B", lambda of: of.mapped_bytes)
    if now.read_bytes and folder.direct:
        yield rate("disk, direct, read", "B", lambda of: of.read_bytes)
        yield rate("disk, direct, write", "B", lambda of: of.written_bytes)
        yield from extra_rate("disk, direct, both at once", extra.mixed_bytes)
    yield from extra_rate("link to the accelerator", extra.to_accelerator)
    yield from extra_rate("link from the accelerator", extra.from_accelerator)


def _free_from(folder: FolderFacts, now: MachineProfile) -> Iterator[FreeFrom]:
    measured = {
        "host": True,
        "page cache": now.mapped_bytes > 0,
        "direct": folder.direct and now.read_bytes > 0,
    }
    for home in get_args(ReachedBy):
        for trains, work in ((False, "inference"), (True, "AdamW")):
            for dtype, element_bytes in (("float32", 4), ("bfloat16", 2)):
                if measured[home]:
                    tokens = free_from(now, home, trains=trains, element_bytes=element_bytes)
                    yield FreeFrom(home, work, dtype, tokens)


def _problems(folder: FolderFacts, system: SystemFacts) -> Iterator[str]:
    """What would stop a run, with the way out."""
    if folder.path is None:
        yield str(folder.why_unusable)
    elif folder.why_unusable:
        yield (
            f"no home can be in {folder.path}: {folder.why_unusable}; give a folder on a disk "
            'with room, home="disk:FOLDER"'
        )
    if system.free_bytes is not None and system.free_bytes < _LEAST_MEMORY:
        yield (
            f"{format_byte_size(system.free_bytes)} of memory are free, and libraries alone take "
            f"{format_byte_size(_LEAST_MEMORY)}: end other processes, or raise the cgroup's limit"
        )


def _warnings(
    folder: FolderFacts, system: SystemFacts, rates: tuple[Rate, ...], saved_in: str
) -> Iterator[str]:
    """What would slow a run down or make its plan wrong, with the way out."""
    if folder.path and not folder.why_unusable and not folder.direct:
        yield (
            f"direct I/O does not work in {folder.path} ({folder.filesystem}), so reads and writes "
            "go through the page cache: for models larger than memory give a folder on ext4 or xfs"
        )
    if system.free_bytes is None:
        yield "the system does not say how much memory is free: no home uses the page cache"
    usable = system.usable_processors
    if system.threads > usable:
        yield (
            f"torch uses {system.threads} threads, and this process has the time of {usable:g} "
            f"processors: set OMP_NUM_THREADS={max(1, int(usable))}"
        )
    if system.is_busy:
        yield (
            f"{system.load:.1f} other processes were busy on {usable:g} processors, so rates are "
            "not those of an idle machine, and none are saved: run it again later"
        )
    for words, limit in system.resource_limits.items():
        yield f"{words} is limited to {format_byte_size(limit)}: larger homes are refused"
    if system.is_busy:
        return
    stale = [rate for rate in rates if rate.change and not 1 / _STALE < rate.change < _STALE]
    if stale:
        names = "; ".join(f"{rate.what}: {rate.change:.2g} ×" for rate in stale)
        yield (
            f"rates are not those that plans use ({names}): if the machine was idle now, delete "
            f"{saved_in}, and the next plan measures anew"
        )
