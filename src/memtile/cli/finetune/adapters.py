"""LoRA adapters around a model whose weights are still on the meta device."""

from typing import TYPE_CHECKING, Any

from memtile.cli.errors import CommandError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def with_adapters(
    model: "PreTrainedModel", rank: int
) -> Any:  # a PeftModel, which is not imported to name its type
    """The model with an adapter on each linear but the head; all else is frozen.

    Adapters scale by 2, as alpha = 2 · rank does. They are real, drawn from torch's generator.

    Raises:
        CommandError: peft is not installed, or knows no linear of the model.
    """
    try:
        from peft import LoraConfig, get_peft_model
        from peft.tuners.lora import LoraLayer
    except ImportError as error:
        raise CommandError("--lora needs peft: pip install 'memtile[finetune]'") from error
    settings = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    try:
        wrapped = get_peft_model(model, settings)
    except ValueError as error:
        raise CommandError(f"--lora: {str(error).splitlines()[0].rstrip('.')}.") from error
    for module in wrapped.modules():
        if isinstance(module, LoraLayer):
            for matrices in (module.lora_A, module.lora_B):
                matrices.to_empty(device="cpu")
            module.reset_lora_parameters("default", True)
    return wrapped
