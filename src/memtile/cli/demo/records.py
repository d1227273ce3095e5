"""The records of the demo: its settings, what each run measured, and the comparison."""

from dataclasses import dataclass
from typing import Any

Document = dict[str, Any]  # a JSON object: json.loads knows no more of its values


@dataclass(frozen=True)
class DemoSettings:
    """The settings of both runs."""

    model: str  # folder in the transformers format
    text: str  # file that the batches are cut from
    steps: int  # of AdamW, 2 or more, since the first one is timed apart
    tokens: int  # in a batch of one sequence
    batches: int  # different ones, taken in turn
    max_tile_bytes: int
    learning_rate: float
    home: str = "disk"  # of the tiled run's weights and moments; or "disk:FOLDER", "host", "none"
    seed: int = 0  # of PyTorch's generator, set before the first step
    trace: str = ""  # the file for what is observed of one step of the tiled run; "": none


@dataclass(frozen=True)
class NamedSize:
    """A size in memory, and the tensor that has it or the operation that made it."""

    nbytes: int
    what: str


@dataclass(frozen=True)
class Side:
    """What one run measured in its own process."""

    losses: list[float]  # of each step, before its update
    seconds: list[float]  # of each step; in the first, allocations are watched too
    peak_bytes: int  # resident memory above the imports, up to the end of training
    parameter_tensors: int  # each shared one counted once
    parameters: int  # elements in them
    largest_tensor: NamedSize  # weight, gradient or optimizer state
    largest_allocation: NamedSize  # storage that an operation of the first step made
    first_batch_loss_before: float
    first_batch_loss_after: float
    continuation: str  # greedy, of the text's first tokens, after training
    home: str = ""  # where weights and moments lived; "": memory
    read_bytes: int = 0  # from the home in a step, the mean without the first
    written_bytes: int = 0
    observed: str = ""  # of one step, as a table, and which file has the trace
    checkpoint_is_dense: bool | None = None  # untiled and saved, it loads in transformers, equal

    @classmethod
    def from_json(cls, fields: Document) -> "Side":
        """The record of what `dataclasses.asdict` gave."""
        pieces = {
            name: NamedSize(**fields[name]) for name in ("largest_tensor", "largest_allocation")
        }
        return cls(**{**fields, **pieces})


@dataclass(frozen=True)
class Machine:
    """The machine and versions that the numbers come from."""

    processor: str
    logical_cpus: int
    system: str
    python: str
    torch: str
    transformers: str
    memtile: str


@dataclass(frozen=True)
class Verdict:
    """A promise of the demo, what was measured, and whether it was kept."""

    promise: str
    measured: str
    kept: bool


@dataclass(frozen=True)
class Outcome:
    """Both runs side by side, with the differences and the verdicts."""

    settings: DemoSettings
    machine: Machine
    dense: Side
    tiled: Side
    logits_difference: float  # max|tiled - dense| / max|dense|, first batch, untrained
    loss_differences: list[float]  # |tiled - dense| / |dense| of each step
    seconds_per_step: dict[str, float]  # medians without the first step
    verdicts: list[Verdict]
    kept: bool
