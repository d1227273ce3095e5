"""Small models of families whose files transformers renames, merges, splits or transposes."""

import warnings
from typing import Any

import torch
import transformers
from small_models import SIZES

_HEAD = {"head_dim": 8}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED = {
    "moe_intermediate_size": 20,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
_LATENT = {
    "num_key_value_heads": 4,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_EYES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
_TEXT = {**SIZES, "hidden_size": 32}

FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {  # class, config, what it takes
    "deepseek-v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {**_TEXT, **_LATENT, **_ROUTED},
    ),
    "ernie-moe": (
        "Ernie4_5_MoeForCausalLM",
        "Ernie4_5_MoeConfig",
        {**_TEXT, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 20},
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "text_config": {**_TEXT, **_HEAD},
            "vision_config": _EYES,
            "mm_tokens_per_image": 4,
        },
    ),
    "glm4-moe": ("Glm4MoeForCausalLM", "Glm4MoeConfig", {**_TEXT, **_HEAD, **_ROUTED}),
    "gpt-neox": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {k: v for k, v in _TEXT.items() if k != "num_key_value_heads"},
    ),
    "gpt-oss": ("GptOssForCausalLM", "GptOssConfig", {**_TEXT, **_HEAD, **_LOCAL}),
    "granite-moe": ("GraniteMoeForCausalLM", "GraniteMoeConfig", {**_TEXT, **_LOCAL}),
    "jamba": (
        "JambaForCausalLM",
        "JambaConfig",
        {
            **_TEXT,
            "num_experts": 4,
            "use_mamba_kernels": False,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
        },
    ),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {**_TEXT, **_HEAD, **_LOCAL, "intermediate_size_mlp": 52, "interleave_moe_layer_step": 1},
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": {**_TEXT, "model_type": "llama"},
            "vision_config": {**_EYES, "model_type": "clip_vision_model"},
        },
    ),
    "minimax": (
        "MiniMaxForCausalLM",
        "MiniMaxConfig",
        {**_TEXT, **_HEAD, **_LOCAL, "layer_types": ["full_attention", "linear_attention"]},
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_TEXT, **_LOCAL}),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", {**_TEXT, **_EXPERTS}),
    "qwen2-moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**_TEXT, **_EXPERTS, "shared_expert_intermediate_size": 24},
    ),
    "qwen2-vl": (
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        {
            "text_config": {**_TEXT, "rope_parameters": _ROPE},
            "vision_config": {
                "depth": 1,
                "embed_dim": 16,
                "num_heads": 2,
                "hidden_size": 32,
                "patch_size": 4,
                "mlp_ratio": 2,
            },
        },
    ),
    "qwen3-moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_TEXT, **_EXPERTS, **_HEAD}),
    "qwen3-vl-moe": (
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3VLMoeConfig",
        {
            "text_config": {**_TEXT, **_EXPERTS, **_HEAD, "rope_parameters": _ROPE},
            "vision_config": {
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_heads": 2,
                "out_hidden_size": 32,
                "patch_size": 4,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
        },
    ),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        {**_EYES, "num_labels": 3},
    ),
}


def make(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model of a family with seeded random weights, biases and buffers too."""
    cls, config, sizes = FAMILIES[family]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = getattr(transformers, config)(**{**sizes, **changes})
        model = getattr(transformers, cls)._from_config(made, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    return model.eval()


def empty(like: Any, dtype: torch.dtype | None = None) -> Any:
    """A model without values, of the class and the config of another."""
    import memtile

    config = type(like.config).from_dict(like.config.to_dict())
    dtype = dtype or like.dtype
    return memtile.empty_model(lambda: type(like)._from_config(config, dtype=dtype)).eval()
