"""What a run trains: a model with its optimizer; `load` makes one for a single process."""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

import memtile
from memtile.cli import models
from memtile.cli.errors import CommandError
from memtile.cli.finetune.settings import Options, TrainingSettings
from memtile.cli.room import free_bytes
from memtile.convert import Resumed
from memtile.costmodel import Plan, format_byte_size
from memtile.engines.ranks import Ranks, of_all_ranks
from memtile.errors import NotFiniteError
from memtile.testing import PeakMemory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")

_OTHERS: Final = "tokenizer, data and adapters"


class Backend:
    """A model with its optimizer and learning rate, in this process or as shards over ranks."""

    def __init__(
        self,
        model: Any,  # of transformers or peft, which are not imported to name its type
        optimizer: Any,  # torch's, or DeepSpeed's around it
        scheduler: LRScheduler,
        has_adapters: bool = False,  # only these are trained and written
        dtype: torch.dtype | None = None,  # to write the model in; None: its own
        device: torch.device | None = None,  # on which sequences are expected; None: CPU
        clip: float | None = None,  # the norm that gradients are scaled down to
    ) -> None:
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.device = device or torch.device("cpu")
        self._has_adapters, self.dtype, self.clip = has_adapters, dtype, clip
        is_alone = not dist.is_initialized()
        self.rank, self.ranks = (0, 1) if is_alone else (dist.get_rank(), dist.get_world_size())

    def loss(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The mean loss of the tokens that count in sequences (batch, tokens), to be trained on."""
        self.optimizer.zero_grad()
        return self._forward(inputs)

    @torch.no_grad()
    def evaluate(self, inputs: Mapping[str, Tensor]) -> float:
        """The mean loss of the tokens that count, without dropout; nothing is changed."""
        self.model.eval()
        try:
            return float(self._forward(inputs))
        finally:
            self.model.train()

    def _forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        loss: Tensor = self._called()(**inputs, use_cache=False).loss
        return loss

    def _called(self) -> Any:
        """What is called with a step's tensors."""
        return self.model

    def update(self, loss: Tensor) -> None:
        """Backward, clipping and step; NotFiniteError where a gradient is not finite."""
        loss.backward()
        self.check_gradients()
        if self.clip is not None:
            norm = self.clip_gradients(self.clip)
            if not math.isfinite(norm):
                raise NotFiniteError(f"the norm of the gradients is {norm}; nothing was stepped")
        self.optimizer.step()
        self.scheduler.step()

    def check_gradients(self) -> None:
        """Raises NotFiniteError where the optimizer would not notice."""

    def clip_gradients(self, limit: float) -> float:
        """Scales the gradients of all weights to a norm of at most `limit`; the norm before."""
        return float(self.optimizer.clip_grad_norm_(limit))

    def of_all_ranks(self, value: T) -> list[T]:
        """The value that each rank gives."""
        return [value] if self.ranks == 1 else of_all_ranks(value)

    def save(self, folder: Path, step: int, position: dict[str, int]) -> None:
        """Saves a checkpoint of the run; `position` is where it is in the data."""
        memtile.save_training(
            folder,
            self.model,
            self.optimizer,
            self.scheduler,
            step=step,
            position=position,
            trainable_only=self._has_adapters,
        )

    def resume(self, folder: Path) -> Resumed:
        """Loads the last checkpoint of the run."""
        return memtile.resume_training(folder, self.model, self.optimizer, self.scheduler)

    def write(self, source: Path, out: Path) -> None:
        """Writes the fine-tuned model, with the tokenizer of its source, for other libraries."""
        self.model.eval()
        if self._has_adapters:
            self.model.save_pretrained(str(out))
        else:
            memtile.save_checkpoint(self.model, out, dtype=self.dtype)
        Ranks().first(lambda: models.copy_tokenizer(source, out))


def load(
    model: "PreTrainedModel",
    settings: TrainingSettings,
    options: Options,
    memory: PeakMemory,
    planned: Callable[[str], None],
) -> Backend:
    """Plans a model on the meta device within the budget, tiles and loads it.

    What `memory` has seen so far is not the model's; `planned` gets sentences on the plan.
    """
    folder = Path(settings.model)
    with suppress(CommandError):  # they are no part of training: at worst, transformers' own
        models.read_settings(model, folder)
    if settings.lora is not None:
        model = _with_adapters(model, settings.lora)
    plan = _plan(model, settings, options, memory, planned)
    with models.printing_warnings():
        memtile.tile(model, plan, checkpoint=folder, strict=options.strict)
    model.train()
    adamw = memtile.TileOptimizer(
        model, torch.optim.AdamW, mode=settings.mode, lr=settings.lr, fused=True
    )
    has_adapters, schedule = settings.lora is not None, schedule_of(adamw, settings)
    check_room(options, settings.steps, *saved_bytes(model, has_adapters))
    return Backend(model, adamw, schedule, has_adapters=has_adapters, clip=settings.clip)


def _plan(
    model: Any,  # of transformers or peft
    settings: TrainingSettings,
    options: Options,
    memory: PeakMemory,
    say: Callable[[str], None],
) -> Plan:
    with models.within(options.budget, memory.nbytes, _OTHERS) as left:
        plan = memtile.plan(
            model,
            budget=left,
            tokens=settings.tokens,
            optimizer=torch.optim.AdamW,
            options={"fused": True},
            home=options.home,
            mode=settings.mode,
            work=None if settings.packing else _padded_step(settings.tokens),
        )
    say(plan.summary)
    if settings.clip is not None:
        trained = sum(each.nbytes for each in model.parameters() if each.requires_grad)
        say(
            "--clip keeps the gradients of all weights until the step, "
            f"{format_byte_size(trained)} more, in memory or where their tiles live"
        )
    say(models.budget_note(options.budget, options.budget - left, _OTHERS))
    return plan


def saved_bytes(model: nn.Module, has_adapters: bool) -> tuple[int, int]:
    """The bytes of a checkpoint of the run, and of the model at its end.

    AdamW keeps two moments, and a float32 master of 16 bits, of what is trained.
    """
    model_bytes = state_bytes = 0
    for parameter in model.parameters():
        if parameter.requires_grad or not has_adapters:
            model_bytes += parameter.nbytes
        if parameter.requires_grad:
            state_bytes += (2 if parameter.itemsize >= 4 else 3) * 4 * parameter.numel()
    return model_bytes + state_bytes, model_bytes


def check_room(options: Options, steps: int, checkpoint_bytes: int, model_bytes: int) -> None:
    """Refuses an --out on a disk that the run's checkpoints and its model do not fit on.

    A new checkpoint is written beside the last, and the model beside the last one of the run.
    """
    is_replaced = options.resume or steps > options.save_every
    needed = checkpoint_bytes + max(checkpoint_bytes if is_replaced else 0, model_bytes)
    if options.resume:  # the last one is there
        needed -= checkpoint_bytes
    free = free_bytes(options.out)
    if free < needed:
        raise CommandError(
            f"--out {options.out}: checkpoints and model take {format_byte_size(needed)}, and "
            f"{format_byte_size(free)} are free there: make room, or give another folder."
        )


def schedule_of(optimizer: torch.optim.Optimizer, settings: TrainingSettings) -> LRScheduler:
    """The learning rate of each step, as transformers' Trainer has it."""
    from transformers import get_scheduler

    if settings.schedule == "cosine" and not settings.warmup:  # as runs have it that were saved so
        return CosineAnnealingLR(optimizer, settings.steps)
    name = "constant_with_warmup" if settings.schedule == "constant" else settings.schedule
    found: LRScheduler = get_scheduler(
        name,
        optimizer,
        num_warmup_steps=settings.warmup,
        num_training_steps=settings.steps,
    )
    return found


def _padded_step(tokens: int) -> Callable[[Any], Tensor]:
    """A step of a sequence that is padded, for the plan: its mask takes memory."""

    def forward(meta_copy: Any) -> Tensor:
        ids = torch.arange(tokens).view(1, tokens) % 2
        loss: Tensor = meta_copy(
            input_ids=ids, labels=ids, attention_mask=ids, use_cache=False
        ).loss
        return loss

    return forward


def check_rank(model: Any, rank: int) -> None:  # of transformers
    """Refuses a rank of adapters that no linear but the head, which gets none, can use."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    linears = (each for each in model.modules() if isinstance(each, nn.Linear | Conv1D))
    most = max((min(each.weight.shape) for each in linears if each is not head), default=rank)
    if rank > most:
        raise CommandError(
            f"--lora {rank} is more than any linear here can use: a change of one has at most the "
            f"rank of its smaller side, {most} for the largest of them; give {most} or less, such "
            "as 8."
        )


def _with_adapters(model: "PreTrainedModel", rank: int) -> Any:  # a PeftModel, not imported here
    """The model with an adapter on each linear but the head; all else is frozen.

    Adapters scale by 2, as alpha = 2 · rank does. They are real, drawn from torch's generator.
    """
    try:
        from peft import LoraConfig, get_peft_model
        from peft.tuners.lora import LoraLayer
    except ImportError as error:
        raise CommandError("--lora needs peft: pip install 'memtile[finetune]'") from error
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    try:
        wrapped = get_peft_model(model, config)
    except ValueError as error:
        raise CommandError(f"--lora: {str(error).splitlines()[0].rstrip('.')}.") from error
    for module in wrapped.modules():
        if isinstance(module, LoraLayer):
            for matrices in (module.lora_A, module.lora_B):
                matrices.to_empty(device="cpu")
            module.reset_lora_parameters("default", True)
    return wrapped
