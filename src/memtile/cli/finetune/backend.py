"""What a run trains: a model with its optimizer; `load` makes one for a single process."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

import memtile
from memtile.cli import models
from memtile.cli.errors import CommandError
from memtile.cli.finetune.settings import Options, TrainingSettings
from memtile.convert import Resumed
from memtile.engines.ranks import Ranks, of_all_ranks
from memtile.testing import PeakMemory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")

_OTHERS: Final = "tokenizer, texts and adapters"


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
    ) -> None:
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.device = device or torch.device("cpu")
        self._has_adapters, self.dtype = has_adapters, dtype
        is_alone = not dist.is_initialized()
        self.rank, self.ranks = (0, 1) if is_alone else (dist.get_rank(), dist.get_world_size())

    def loss(self, ids: Tensor) -> Tensor:
        """The loss of sequences (batch, tokens), which are their own labels."""
        self.optimizer.zero_grad()
        loss: Tensor = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        return loss

    def update(self, loss: Tensor) -> None:
        """Backward and step; NotFiniteError where a gradient is not finite."""
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()

    def of_all_ranks(self, value: T) -> list[T]:
        """The value that each rank gives."""
        return [value] if self.ranks == 1 else of_all_ranks(value)

    def save(self, folder: Path, step: int, position: dict[str, int]) -> None:
        """Saves a checkpoint of the run; `position` is where it is in the texts."""
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
    with models.within(options.budget, memory.nbytes, _OTHERS) as left:
        plan = memtile.plan(
            model,
            budget=left,
            tokens=settings.tokens,
            optimizer=torch.optim.AdamW,
            home=options.home,
            mode="in_backward",
        )
    planned(plan.summary)
    planned(models.budget_note(options.budget, options.budget - left, _OTHERS))
    with models.printing_warnings():
        memtile.tile(model, plan, checkpoint=folder, strict=options.strict)
    model.train()
    adamw = memtile.TileOptimizer(model, torch.optim.AdamW, mode="in_backward", lr=settings.lr)
    cosine = CosineAnnealingLR(adamw, settings.steps)
    return Backend(model, adamw, cosine, has_adapters=settings.lora is not None)


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
