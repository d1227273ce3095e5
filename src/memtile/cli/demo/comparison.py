"""Compares the dense and the tiled run: differences, and whether each bound was met."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Final

from memtile.cli.demo.records import DemoSettings, Machine, Outcome, Side, Verdict
from memtile.costmodel import format_byte_size
from memtile.planner.saved_rates import processor

LOGITS_BOUND: Final = 2e-5  # both are in the verdicts' text
LOSS_BOUND: Final = 1e-5
MEMORY_BOUND: Final = 0.25

_STATE_BYTES: Final = 16  # of a parameter: weight, gradient and two moments in float32
_WORTH_JUDGING: Final = 0.75  # of the dense run's peak: below, activations are too much of it


def compare(settings: DemoSettings, dense: Side, tiled: Side, logits_difference: float) -> Outcome:
    """Everything that the demo shows, from what the two workers measured on this machine."""
    loss_differences = [
        abs(ours - theirs) / abs(theirs)
        for ours, theirs in zip(tiled.losses, dense.losses, strict=True)
    ]
    verdicts = _verdicts(settings, dense, tiled, logits_difference, loss_differences)
    sides = {"dense": dense, "tiled": tiled}
    return Outcome(
        settings,
        this_machine(),
        dense,
        tiled,
        logits_difference,
        loss_differences,
        seconds_per_step={name: median(side.seconds[1:]) for name, side in sides.items()},
        verdicts=verdicts,
        kept=all(verdict.kept for verdict in verdicts),
    )


def _verdicts(
    settings: DemoSettings, dense: Side, tiled: Side, logits: float, losses: list[float]
) -> list[Verdict]:
    """The bounds, for the relative differences of the logits and of each loss."""
    largest, limit = tiled.largest_tensor.nbytes, settings.max_tile_bytes
    return [
        Verdict(
            "first logits equal the dense ones within 2e-5 relative",
            f"{logits:.1e}",
            logits <= LOGITS_BOUND,
        ),
        Verdict(
            "losses equal the dense ones within 1e-5 relative at every step",
            f"{max(losses):.1e} at most",
            all(difference <= LOSS_BOUND for difference in losses),
        ),
        _learning_verdict(dense, tiled),
        Verdict(
            f"no weight, gradient or optimizer state is above {format_byte_size(limit)}",
            f"{format_byte_size(largest)} at most",
            largest <= limit,
        ),
        Verdict(
            "untiled and saved, it loads in plain transformers, every parameter bit-identical",
            "yes" if tiled.checkpoint_is_dense else "no",
            tiled.checkpoint_is_dense is True,
        ),
        *_memory_verdict(dense, tiled),
    ]


def relative_difference(tiled_file: Path, dense_file: Path) -> float:
    """max|tiled - dense| / max|dense| over the logits in two safetensors files, in float64."""
    from safetensors.torch import load_file

    tiled = load_file(tiled_file)["logits"].double()
    dense = load_file(dense_file)["logits"].double()
    return float((tiled - dense).abs().max() / dense.abs().max())


def this_machine() -> Machine:
    """The machine and the versions that the numbers come from."""
    return Machine(
        processor=processor().rpartition(":")[2].strip(),
        logical_cpus=os.cpu_count() or 1,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        torch=version("torch"),
        transformers=version("transformers"),
        memtile=version("memtile"),
    )


def _learning_verdict(dense: Side, tiled: Side) -> Verdict:
    before, after = tiled.first_batch_loss_before, tiled.first_batch_loss_after
    return Verdict(
        "the first batch's loss has fallen in both runs",
        f"{before:.3f} to {after:.3f} tiled ({after / before - 1:+.0%}), "
        f"{dense.first_batch_loss_before:.3f} to {dense.first_batch_loss_after:.3f} dense",
        after < before and dense.first_batch_loss_after < dense.first_batch_loss_before,
    )


def _memory_verdict(dense: Side, tiled: Side) -> list[Verdict]:
    """Only where weights lived on disk and most of the dense run's peak can be moved there."""
    movable = dense.parameters * _STATE_BYTES / max(1, dense.peak_bytes)
    if "Disk" not in tiled.home or movable < _WORTH_JUDGING:
        return []
    ratio = tiled.peak_bytes / dense.peak_bytes
    promise = "peak memory is at most a quarter of the dense run's"
    return [Verdict(promise, f"1/{1 / ratio:.1f}", ratio <= MEMORY_BOUND)]
