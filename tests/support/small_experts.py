"""Small random mixtures of experts, one for each way that transformers keeps and computes them."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

EXPERTS, USED, VOCABULARY = 5, 2, 97

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 36,
    "moe_intermediate_size": 14,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": USED,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _deepseek() -> Any:
    others = {k: v for k, v in _SIZES.items() if k not in ("head_dim", "num_experts")}
    heads = {"q_lora_rank": 12, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8}
    groups = {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
    others |= {**heads, **groups, "v_head_dim": 8, "num_key_value_heads": 4}
    return transformers.DeepseekV3Config(n_routed_experts=EXPERTS, **others)


def _glm() -> Any:
    groups = {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
    return transformers.Glm4MoeConfig(n_routed_experts=EXPERTS, **groups, **_SIZES)


def _jetmoe() -> Any:
    others = {k: v for k, v in _SIZES.items() if k not in ("head_dim", "num_attention_heads")}
    return transformers.JetMoeConfig(kv_channels=8, **others)


CONFIGS: dict[str, Callable[[], Any]] = {
    "qwen3": lambda: transformers.Qwen3MoeConfig(**_SIZES),
    "mixtral": lambda: transformers.MixtralConfig(**_SIZES),
    "gpt-oss": lambda: transformers.GptOssConfig(**_SIZES),
    "qwen2": lambda: transformers.Qwen2MoeConfig(shared_expert_intermediate_size=20, **_SIZES),
    "olmoe": lambda: transformers.OlmoeConfig(**_SIZES | {"intermediate_size": 14, "head_dim": 6}),
    "glm4": _glm,
    "deepseek": _deepseek,
    "jetmoe": _jetmoe,
}


def experts_model(name: str, implementation: str = "batched_mm", **config: Any) -> Any:
    """A model with seeded values, also of biases and of what its class starts at zero."""
    made = CONFIGS[name]()
    for key, value in config.items():
        setattr(made, key, value)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(made)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.02 if parameter.dim() == 1 else 0.15
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    if name != "jetmoe":
        model.set_experts_implementation(implementation)
    return model.train()


class ExpertsLoss(nn.Module):
    """One of these models with a loss, the mean square of its logits."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float64, **config: Any) -> None:
        super().__init__()
        self.inner = experts_model(name, **config).to(dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Of ids (batch, length)."""
        logits: torch.Tensor = self.inner(input_ids=ids, use_cache=False).logits
        return logits.square().mean()


def tokens(batch: int = 2, length: int = 19, seed: int = 3) -> torch.Tensor:
    """Seeded ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def experts_of(model: nn.Module) -> Any:
    """The model's last experts module."""
    return [module for module in model.modules() if hasattr(module, "_is_expert_parallel")][-1]
