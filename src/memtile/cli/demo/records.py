"""The records of the demo: its settings, what each run measured, and the comparison."""

from dataclasses import dataclass
from typing import Any

Document = dict[str, Any]  # a JSON object: json.loads knows no more of its values


@dataclass(frozen=True)
class Settings:
    """The settings of both runs.

    Attributes:
        model: Folder of the dense model in the transformers format, float32.
        text: File that the batches are cut from.
        steps: Optimizer steps, 2 or more, since the first one is timed apart.
        tokens: Tokens in a batch of one sequence.
        batches: Different batches; step `n` trains on batch `n % batches`.
        max_tile_bytes: The largest tile that the tiled run may make.
        learning_rate: Of `torch.optim.AdamW`, everything else at its default.
        home: Where the tiled run's weights and moments live: "disk", "disk:FOLDER", "host", "none".
        seed: For PyTorch's generator, set before the first training step.
    """

    model: str
    text: str
    steps: int
    tokens: int
    batches: int
    max_tile_bytes: int
    learning_rate: float
    home: str = "disk"
    seed: int = 0


@dataclass(frozen=True)
class Extent:
    """A size in memory, and the tensor that has it or the operation that made it."""

    nbytes: int
    what: str


@dataclass(frozen=True)
class Side:
    """What one run measured in its own process.

    Attributes:
        losses: Loss of each training step, before that step's update.
        seconds: Wall time of each step; in the first, allocations are watched too.
        peak_bytes: Peak of resident memory above the imports, up to the end of training.
        parameter_tensors: Number of parameter tensors, each shared one counted once.
        parameters: Number of elements in them.
        largest_tensor: The largest weight, gradient or optimizer state.
        largest_allocation: The largest storage that any operation of the first step made.
        first_batch_loss_before: Loss on the first batch before training.
        first_batch_loss_after: The same after the last step.
        home: Where weights and moments lived, in words; "" for memory.
        read_bytes: Read from the home in a step, the mean without the first.
        written_bytes: Written to it, likewise.
        continuation: Greedy continuation of the text's first tokens, after training.
        checkpoint_is_dense: For the tiled run, whether the untiled model, saved, loads in plain
            transformers with every name it expects and every parameter bit-identical.
    """

    losses: list[float]
    seconds: list[float]
    peak_bytes: int
    parameter_tensors: int
    parameters: int
    largest_tensor: Extent
    largest_allocation: Extent
    first_batch_loss_before: float
    first_batch_loss_after: float
    continuation: str
    home: str = ""
    read_bytes: int = 0
    written_bytes: int = 0
    checkpoint_is_dense: bool | None = None

    @classmethod
    def from_json(cls, fields: Document) -> "Side":
        """The record of what `dataclasses.asdict` gave."""
        pieces = {name: Extent(**fields[name]) for name in ("largest_tensor", "largest_allocation")}
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
    """Both runs side by side, with the differences and the verdicts.

    Attributes:
        logits_difference: max|tiled - dense| / max|dense| of the first batch's logits, untrained.
        loss_differences: |tiled - dense| / |dense| of each step's loss.
        seconds_per_step: Medians of all steps but the first, dense and tiled.
    """

    settings: Settings
    machine: Machine
    dense: Side
    tiled: Side
    logits_difference: float
    loss_differences: list[float]
    seconds_per_step: dict[str, float]
    verdicts: list[Verdict]
    kept: bool
