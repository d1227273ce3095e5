"""One run of the demo, dense or tiled: load, train, generate, and measure all of it.

Both runs are this one function; the only differences are the call of `memtile.tile`, and the
optimizer that steps tiles where they live.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Final

import torch

import memtile
from memtile.cli import models
from memtile.cli.demo.parking import describe_home, make_home
from memtile.cli.demo.records import Piece, Settings, Side
from memtile.cli.demo.text import cut_batches, text_of
from memtile.cli.errors import CommandError, first_line
from memtile.convert import select_linears
from memtile.homes import Home
from memtile.testing import LargestAllocation, PeakMemory

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

StepReport = Callable[[int, float], None]  # called with the step's number, from 1, and its loss

_PROMPT_TOKENS: Final = 8
_NEW_TOKENS: Final = 24
_MOST_TILES: Final = 20_000


def run_side(settings: Settings, tiled: bool, logits_file: Path, report: StepReport) -> Side:
    """Trains the model of `settings` and gives every number of one column of the demo's tables.

    Args:
        settings: What to run; the same for both sides.
        tiled: Whether the model is tiled after loading.
        logits_file: Where the first batch's logits go, as safetensors, before any training.
        report: Called after each step.

    Raises:
        CommandError: If the model or the text does not fit the settings, or the loss diverges.
        UnsupportedPlatformError: Where peak memory cannot be measured.
    """
    tokenizer, batches = _prepare(settings)
    with PeakMemory() as memory:
        model = _load_model(settings.model)
        home = make_home(settings.home) if tiled else None
        if tiled:
            _check_count(model, settings.max_tile_bytes)
            memtile.tile(model, max_tile_bytes=settings.max_tile_bytes, home=home)
        loss_before = _evaluate(model, batches[0], logits_file)
        training = _train(model, batches, settings, home, report)
    return Side(
        losses=training.losses,
        seconds=training.seconds,
        peak_bytes=memory.nbytes,
        parameter_tensors=sum(1 for _ in model.parameters()),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        largest_tensor=training.largest_tensor,
        largest_allocation=training.largest_allocation,
        first_batch_loss_before=loss_before,
        first_batch_loss_after=_evaluate(model, batches[0]),
        continuation=_continue(model, tokenizer, batches[0][:, :_PROMPT_TOKENS]),
        home=describe_home(home),
        read_bytes=training.read_bytes,
        written_bytes=training.written_bytes,
        checkpoint_is_dense=_saves_dense(model) if tiled else None,
    )


def _prepare(settings: Settings) -> tuple["PreTrainedTokenizerBase", list[torch.Tensor]]:
    """Tokenizer and batches; the model's code is imported too, so that no peak counts it."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(
            settings.model, local_files_only=True, trust_remote_code=False
        )
        with torch.device("meta"):
            transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _cannot_load(settings.model, "causal language model", error) from error
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            settings.model, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise _cannot_load(settings.model, "tokenizer", error) from error
    _check_length(settings.tokens, config)
    text = text_of(Path(settings.text))
    return tokenizer, cut_batches(text, tokenizer, settings.batches, settings.tokens)


def _check_count(model: "PreTrainedModel", max_tile_bytes: int) -> None:
    choices = select_linears(model, max_tile_bytes=max_tile_bytes)
    tiles = sum(len(list(choice.grid.indices())) for choice in choices if choice.grid)
    if tiles > _MOST_TILES:
        raise CommandError(
            f"--max-tile {max_tile_bytes} bytes would make {tiles} tiles, which would take hours: "
            "give a larger one, such as 1MiB."
        )


def _cannot_load(folder: str, what: str, error: Exception) -> CommandError:
    reason = first_line(error)
    if "trust_remote_code" in str(error):
        reason = (
            f"it needs {', '.join(models.code_of(Path(folder)))}, and the demo runs no such code"
        )
    return CommandError(
        f"transformers finds no {what} in {folder} ({reason}): "
        "give --model a folder that save_pretrained wrote, with its tokenizer."
    )


def _check_length(tokens: int, config: "PretrainedConfig") -> None:
    longest = getattr(config, "max_position_embeddings", None) or tokens
    if tokens > longest:
        raise CommandError(
            f"--tokens {tokens} is more than the model reads at once: give {longest} or fewer."
        )


def _load_model(folder: str) -> "PreTrainedModel":
    import transformers
    from safetensors import SafetensorError

    try:
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise _cannot_load(folder, "weights", error) from error


@torch.no_grad()
def _evaluate(
    model: "PreTrainedModel", batch: torch.Tensor, logits_file: Path | None = None
) -> float:
    from safetensors.torch import save_file

    model.eval()
    output = model(input_ids=batch, labels=batch)
    if logits_file is not None:
        save_file({"logits": output.logits.contiguous()}, logits_file)
    return float(output.loss)


@dataclass(frozen=True)
class _Training:
    losses: list[float]
    seconds: list[float]
    largest_tensor: Piece
    largest_allocation: Piece
    read_bytes: int
    written_bytes: int


def _train(
    model: "PreTrainedModel",
    batches: list[torch.Tensor],
    settings: Settings,
    home: Home | None,
    report: StepReport,
) -> _Training:
    model.train()
    optimizer = _optimizer(model, settings.learning_rate, home)
    torch.manual_seed(settings.seed)
    losses: list[float] = []
    seconds: list[float] = []
    probe = LargestAllocation()
    before = traffic = (0, 0)
    for step, batch in enumerate(islice(cycle(batches), settings.steps), start=1):
        started = time.perf_counter()
        # The first step also makes the optimizer's state, so it is the one to probe: that slows it.
        with probe if step == 1 else nullcontext():
            loss = _step(model, optimizer, batch)
        seconds.append(time.perf_counter() - started)
        if not math.isfinite(loss):
            raise CommandError(
                f"The loss is {loss} at step {step}: give a --lr below {settings.learning_rate}."
            )
        losses.append(loss)
        report(step, loss)
        traffic = _traffic(home)
        before = traffic if step == 1 else before  # the first step also makes the moments
    read, written = (
        (now - then) // (settings.steps - 1) for now, then in zip(traffic, before, strict=True)
    )
    largest = max(_tensors(model, optimizer), key=lambda piece: piece.nbytes)
    piece = Piece(probe.nbytes, probe.op)
    return _Training(losses, seconds, largest, piece, read, written)


def _optimizer(
    model: "PreTrainedModel", learning_rate: float, home: Home | None
) -> torch.optim.Optimizer:
    if home is None:
        return torch.optim.AdamW(model.parameters(), lr=learning_rate)
    return memtile.TileOptimizer(model, torch.optim.AdamW, mode="in_backward", lr=learning_rate)


def _traffic(home: Home | None) -> tuple[int, int]:
    return (0, 0) if home is None else (home.traffic.read_bytes, home.traffic.written_bytes)


def _step(model: "PreTrainedModel", optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> float:
    optimizer.zero_grad()
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def _tensors(model: "PreTrainedModel", optimizer: torch.optim.Optimizer) -> Iterator[Piece]:
    for name, parameter in model.named_parameters():
        yield Piece(parameter.nbytes, name)
        if parameter.grad is not None:
            yield Piece(parameter.grad.nbytes, f"gradient of {name}")
        for state, value in optimizer.state[parameter].items():
            if isinstance(value, torch.Tensor):
                yield Piece(value.nbytes, f"{state} of {name}")


def _continue(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", prompt: torch.Tensor
) -> str:
    model.eval()
    token_ids = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=_NEW_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
    )
    return str(tokenizer.decode(token_ids[0], skip_special_tokens=True))


def _saves_dense(model: "PreTrainedModel") -> bool:
    """Whether the untiled model, saved, is what plain transformers expects, bit for bit."""
    memtile.untile(model)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded, report = type(model).from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
    here, there = dict(model.named_parameters()), dict(loaded.named_parameters())
    nothing_odd = not any(report.values())
    return (
        nothing_odd
        and here.keys() == there.keys()
        and all(torch.equal(here[name], there[name]) for name in here)
    )
