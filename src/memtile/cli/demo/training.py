"""One run of the demo, dense or tiled: a fine-tuning run, with text generated and saved after it.

Both runs are this one function; the only differences are the call of `memtile.tile`, and the
optimizer that steps tiles where they live. Both compute the loss without logits.
"""

from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.optim.lr_scheduler import ConstantLR

import memtile
from memtile.cli import models
from memtile.cli.demo.records import DemoSettings, NamedSize, Side
from memtile.cli.errors import CommandError
from memtile.cli.finetune.backend import Backend
from memtile.cli.finetune.run import Run, train
from memtile.cli.finetune.sequences import Sequences, text_pieces
from memtile.cli.finetune.settings import TrainingSettings
from memtile.cli.finetune.tokens import TokenFile, document_tokens
from memtile.cli.terminal import saved_trace
from memtile.convert import select_linears, set_deferring_of
from memtile.costmodel import MAPPED_BYTES
from memtile.homes import DiskHome, Home, resolve_home, usable_folder
from memtile.observing import Observation
from memtile.testing import LargestAllocation, PeakMemory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_TEXT: Final = Path(__file__).with_name("pride_and_prejudice.txt")

_PROMPT_TOKENS: Final = 8
_NEW_TOKENS: Final = 24
_MOST_TILES: Final = 20_000


def run_side(
    settings: DemoSettings, tiled: bool, logits_file: Path, report: Callable[[int, float], None]
) -> Side:
    """Trains the model, and measures one column of the demo's tables.

    The first batch's logits go to a file before any training, as safetensors; `report` is called
    with number and loss of each step.
    """
    tokenizer, batches = _prepare(settings)
    with PeakMemory() as memory:
        model = _load_model(settings.model)
        home = resolve_home(settings.home) if tiled and settings.home != "none" else None
        if home is not None:
            home.mapped_bytes = MAPPED_BYTES  # as plans do: pages kept count as memory here
        if tiled:
            _check_count(model, settings.max_tile_bytes)
            memtile.tile(model, max_tile_bytes=settings.max_tile_bytes, home=home)
        else:
            # As `tile` does. transformers' loss of the first batch is 2.5e-6 (relative) from that
            # in float64, this one 4e-8; over twenty steps it makes 6e-5 of that.
            set_deferring_of(model, True)
        loss_before = _evaluate(model, batches.at(0), logits_file)
        measured = _train(model, batches, settings, home, memory, report)
    return Side(
        parameter_tensors=sum(1 for _ in model.parameters()),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        first_batch_loss_before=loss_before,
        first_batch_loss_after=_evaluate(model, batches.at(0)),
        continuation=_continue(model, tokenizer, batches.at(0)[:, :_PROMPT_TOKENS]),
        home=_described(home),
        **measured,
        checkpoint_is_dense=_saves_dense(model) if tiled else None,
    )


def text_of(file: Path) -> str:
    """The text of `file`; in the demo's own, without the lines on top that name its source."""
    text = "".join(text_pieces(file, "--text"))
    if file == DEFAULT_TEXT:
        text = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    return text.strip()


def cut_batches(
    text: str,
    tokenizer: Any,  # a transformers tokenizer, which is not imported to name its type
    batches: int,
    tokens: int,
) -> Sequences:
    """The first `batches` stretches of `tokens` tokens each, in order."""
    stream = TokenFile(usable_folder(None))
    for ids in document_tokens([text], tokenizer):
        stream.append(array("i", ids))
    if stream.count < batches * tokens:
        fewer = stream.count // batches
        raise CommandError(
            f"--tokens {tokens} needs {batches * tokens} for {batches} batches, and the text "
            f"has {stream.count}: give {f'--tokens {fewer} or ' if fewer >= 2 else ''}"
            "a longer --text."
        )
    return Sequences(stream, tokens, seed=None, count=batches)


def _described(home: Home | None) -> str:
    if isinstance(home, DiskHome):
        return f"{home!r} by {home.path}"
    return "" if home is None else repr(home)


def _prepare(settings: DemoSettings) -> tuple["PreTrainedTokenizerBase", Sequences]:
    """Tokenizer and batches; the model's code is imported too, so that no peak counts it."""
    folder = Path(settings.model)
    model = models.empty_of(folder)
    tokenizer = models.tokenizer_of(folder)
    models.check_length(model, settings.tokens, f"--tokens {settings.tokens}")
    text = text_of(Path(settings.text))
    return tokenizer, cut_batches(text, tokenizer, settings.batches, settings.tokens)


def _check_count(model: "PreTrainedModel", max_tile_bytes: int) -> None:
    decisions = select_linears(model, max_tile_bytes=max_tile_bytes)
    tiles = sum(len(list(decision.grid.indices())) for decision in decisions if decision.grid)
    if tiles > _MOST_TILES:
        raise CommandError(
            f"--max-tile {max_tile_bytes} bytes would make {tiles} tiles, which would take hours: "
            "give a larger one, such as 1MiB."
        )


def _load_model(folder: str) -> "PreTrainedModel":
    import transformers
    from safetensors import SafetensorError

    kinds = (OSError, ValueError, SafetensorError)
    problem, way_out = "has weights that cannot be loaded", "take another copy"
    with models.reading(Path(folder), problem, way_out, kinds):
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )


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


def _train(
    model: "PreTrainedModel",
    batches: Sequences,
    settings: DemoSettings,
    home: Home | None,
    memory: PeakMemory,
    report: Callable[[int, float], None],
) -> dict[str, Any]:
    """Trains, and gives the fields of `Side` that are measured in training."""
    model.train()
    optimizer = _optimizer(model, settings.learning_rate, home)
    training = TrainingSettings(
        model=settings.model,
        data=(settings.text,),
        steps=settings.steps,
        tokens=settings.tokens,
        lr=settings.learning_rate,
        seed=settings.seed,
    )
    run = Run(training, Backend(model, optimizer, ConstantLR(optimizer, 1.0)), batches, memory)
    torch.manual_seed(settings.seed)
    # The first step also makes the optimizer's state, so it is watched, which slows it.
    with LargestAllocation() as probe:
        entries = train(run, lambda entry: report(entry.step, entry.loss), until=1).entries
    before = _traffic(home)
    seen: dict[int, Observation] = {}
    if settings.trace and home is not None:
        run.on_traced = seen.__setitem__
    result = train(run, lambda entry: report(entry.step, entry.loss))
    entries += result.entries
    read, written = (
        (now - then) // (settings.steps - 1)
        for now, then in zip(_traffic(home), before, strict=True)
    )
    return {
        "losses": [entry.loss for entry in entries],
        "seconds": [entry.seconds for entry in entries],
        "peak_bytes": result.peak_bytes,
        "largest_tensor": max(_tensors(model, optimizer), key=lambda tensor: tensor.nbytes),
        "largest_allocation": NamedSize(probe.nbytes, probe.op),
        "read_bytes": read,
        "written_bytes": written,
        "observed": "".join(_observed(*each, Path(settings.trace)) for each in seen.items()),
    }


def _observed(step: int, seen: Observation, trace: Path) -> str:
    """Saves what was observed of a step; gives its table, and where the file is."""
    return f"step {step}, observed:\n{seen}\n{saved_trace(seen, trace)}"


def _optimizer(
    model: "PreTrainedModel", learning_rate: float, home: Home | None
) -> torch.optim.Optimizer:
    if home is None:
        return torch.optim.AdamW(model.parameters(), lr=learning_rate, fused=True)
    return memtile.TileOptimizer(
        model, torch.optim.AdamW, mode="in_backward", lr=learning_rate, fused=True
    )


def _traffic(home: Home | None) -> tuple[int, int]:
    return (0, 0) if home is None else (home.traffic.read_bytes, home.traffic.written_bytes)


def _tensors(model: "PreTrainedModel", optimizer: torch.optim.Optimizer) -> Iterator[NamedSize]:
    for name, parameter in model.named_parameters():
        yield NamedSize(parameter.nbytes, name)
        if parameter.grad is not None:
            yield NamedSize(parameter.grad.nbytes, f"gradient of {name}")
        for state, value in optimizer.state[parameter].items():
            if isinstance(value, torch.Tensor):
                yield NamedSize(value.nbytes, f"{state} of {name}")


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
    if any(report.values()) or here.keys() != there.keys():
        return False
    return all(torch.equal(here[name], there[name]) for name in here)
