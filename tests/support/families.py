"""Tiny random models of the families that people run, one line each where that is enough."""

from collections.abc import Mapping
from typing import Any, Final

import torch
import transformers

TOKENS: Final = {"vocab_size": 131, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT: Final = {
    **TOKENS,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
}
TWO: Final = {"num_hidden_layers": 2}  # where layers differ
GPT: Final = {**TOKENS, "n_embd": 24, "n_layer": 1, "n_head": 4, "n_positions": 64}
BERT: Final = {k: v for k, v in TEXT.items() if k not in ("num_key_value_heads", "head_dim")}
HEADS: Final = {k: v for k, v in BERT.items() if k != "intermediate_size"}
WIDE: Final = {**TEXT, "num_key_value_heads": 4}  # as many heads of keys as of queries
EXPERTS: Final = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
JET: Final = {k: v for k, v in TEXT.items() if k not in ("num_attention_heads", "head_dim")}
LOCAL: Final = {"num_local_experts": 5, "num_experts_per_tok": 2}
SPECIAL: Final = {"cls_token_id": 1, "sep_token_id": 2, "eos_token_id": 2}
BART: Final = {
    **TOKENS,
    "d_model": 24,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 44,
    "decoder_ffn_dim": 44,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
}
T5: Final = {**TOKENS, "d_model": 24, "d_ff": 44, "num_layers": 1, "num_heads": 4, "d_kv": 6}
VISION: Final = {
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
SPEECH: Final = {
    **BERT,
    "conv_dim": (8, 8),
    "conv_kernel": (5, 3),
    "conv_stride": (4, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "feat_extract_norm": "layer",
    "layerdrop": 0.0,
    "mask_time_prob": 0.0,
}
LATENT: Final = {  # attention through latent vectors
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}
GRID: Final = {"mrope_section": [1, 1, 1], "rope_type": "default", "rope_theta": 10000.0}
QWEN_VL: Final = {**TEXT, "rope_parameters": GRID}
IMAGE: Final = 100  # the placeholder of images


def _vision(config: str, **more: Any) -> Any:
    return getattr(transformers, config)(**{**VISION, **more})


def _text(config: str, **more: Any) -> Any:
    return getattr(transformers, config)(**{**TEXT, **more})


def _clip() -> dict[str, Any]:
    text = {**BERT, "projection_dim": 20, "hidden_act": "gelu"}
    return {"text_config": text, "vision_config": VISION, "projection_dim": 20}


# By the family's name: the class, and what its config is made of, or a function that makes that.
SOURCES: Final[Mapping[str, tuple[str, Any]]] = {
    "GPT-2": ("GPT2LMHeadModel", GPT),
    "GPT-Neo": (
        "GPTNeoForCausalLM",
        {
            **HEADS,
            **TWO,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
        },
    ),
    "GPT-NeoX": ("GPTNeoXForCausalLM", BERT),
    "GPT-J": ("GPTJForCausalLM", {**GPT, "rotary_dim": 4}),
    "OPT": ("OPTForCausalLM", {**HEADS, "ffn_dim": 44, "word_embed_proj_dim": 20}),
    "BLOOM": ("BloomForCausalLM", {**TOKENS, "hidden_size": 24, "n_layer": 1, "n_head": 4}),
    "Falcon": ("FalconForCausalLM", {**HEADS, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "MPT": (
        "MptForCausalLM",
        {**TOKENS, "d_model": 24, "n_layers": 1, "n_heads": 4, "max_seq_len": 64},
    ),
    "Llama": ("LlamaForCausalLM", TEXT),
    "Mistral": ("MistralForCausalLM", TEXT),
    "Mixtral": ("MixtralForCausalLM", {**TEXT, **LOCAL}),
    "Qwen2": ("Qwen2ForCausalLM", TEXT),
    "Qwen2-MoE": (
        "Qwen2MoeForCausalLM",
        {**TEXT, **EXPERTS, "shared_expert_intermediate_size": 28},
    ),
    "Qwen3": ("Qwen3ForCausalLM", TEXT),
    "Qwen3-MoE": ("Qwen3MoeForCausalLM", {**TEXT, **EXPERTS}),
    "Qwen3-Next": (
        "Qwen3NextForCausalLM",
        {
            **TEXT,
            **TWO,
            **EXPERTS,
            "shared_expert_intermediate_size": 28,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 6,
            "linear_value_head_dim": 6,
            "head_dim": 8,
        },
    ),
    "Gemma": ("GemmaForCausalLM", TEXT),
    "Gemma-2": ("Gemma2ForCausalLM", {**TEXT, **TWO, "sliding_window": 8}),
    "Gemma-3": ("Gemma3ForCausalLM", {**TEXT, **TWO, "sliding_window": 8}),
    "Phi": ("PhiForCausalLM", {**WIDE, "partial_rotary_factor": 1.0}),
    "Phi-3": ("Phi3ForCausalLM", TEXT),
    "PhiMoE": ("PhimoeForCausalLM", {**TEXT, **LOCAL}),
    "StableLM": (
        "StableLmForCausalLM",
        {
            **WIDE,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 1.0,
            },
        },
    ),
    "StarCoder2": ("Starcoder2ForCausalLM", TEXT),
    "Cohere": ("CohereForCausalLM", TEXT),
    "Cohere2": ("Cohere2ForCausalLM", {**TEXT, **TWO, "sliding_window": 8}),
    "OLMo": ("OlmoForCausalLM", TEXT),
    "OLMo2": ("Olmo2ForCausalLM", TEXT),
    "OLMoE": ("OlmoeForCausalLM", {**TEXT, **EXPERTS}),
    "GLM": ("GlmForCausalLM", TEXT),
    "GLM-4": ("Glm4ForCausalLM", TEXT),
    "GLM-4-MoE": (
        "Glm4MoeForCausalLM",
        {
            **TEXT,
            **TWO,
            "n_routed_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "Ernie-4.5": ("Ernie4_5ForCausalLM", TEXT),
    "Ernie-4.5-MoE": (
        "Ernie4_5_MoeForCausalLM",
        {
            **TEXT,
            **TWO,
            "moe_num_experts": 5,
            "moe_k": 2,
            "moe_intermediate_size": 20,
            "moe_layer_start_index": 1,
        },
    ),
    "MiniMax": (
        "MiniMaxForCausalLM",
        {
            **TEXT,
            **TWO,
            **LOCAL,
            "layer_types": ["linear_attention", "full_attention"],
            "block_size": 8,
        },
    ),
    "Granite": ("GraniteForCausalLM", TEXT),
    "GraniteMoE": ("GraniteMoeForCausalLM", {**TEXT, **LOCAL}),
    "gpt-oss": ("GptOssForCausalLM", {**TEXT, **TWO, **LOCAL, "sliding_window": 8}),
    "DeepSeek-V3": (
        "DeepseekV3ForCausalLM",
        {
            **WIDE,
            **TWO,
            **LATENT,
            "head_dim": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
        },
    ),
    "SmolLM3": ("SmolLM3ForCausalLM", TEXT),
    "Mamba": (
        "MambaForCausalLM",
        {**TOKENS, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 3},
    ),
    "T5": ("T5ForConditionalGeneration", {**T5, "decoder_start_token_id": 0}),
    "mT5": ("MT5ForConditionalGeneration", T5),
    "BART": ("BartForConditionalGeneration", BART),
    "mBART": ("MBartForConditionalGeneration", BART),
    "Pegasus": ("PegasusForConditionalGeneration", BART),
    "M2M-100": ("M2M100ForConditionalGeneration", BART),
    "Marian": ("MarianMTModel", BART),
    "Whisper": (
        "WhisperForConditionalGeneration",
        {**BART, "num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 64},
    ),
    "BERT": ("BertForSequenceClassification", BERT),
    "ModernBERT": ("ModernBertForSequenceClassification", {**BERT, "mlp_bias": True, **SPECIAL}),
    "RoBERTa": ("RobertaForMaskedLM", {**BERT, "max_position_embeddings": 66}),
    "ALBERT": ("AlbertForTokenClassification", {**BERT, "embedding_size": 20}),
    "DistilBERT": (
        "DistilBertForQuestionAnswering",
        {
            **TOKENS,
            "dim": 24,
            "hidden_dim": 44,
            "n_layers": 1,
            "n_heads": 4,
            "max_position_embeddings": 64,
        },
    ),
    "ELECTRA": ("ElectraForMaskedLM", {**BERT, "embedding_size": 20}),
    "DeBERTa-v2": (
        "DebertaV2ForSequenceClassification",
        {**BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    ),
    "ViT": ("ViTForImageClassification", {**VISION, "num_labels": 3}),
    "DeiT": ("DeiTForImageClassification", {**VISION, "num_labels": 3}),
    "Swin": (
        "SwinForImageClassification",
        {
            "image_size": 16,
            "patch_size": 2,
            "embed_dim": 12,
            "depths": [1, 1],
            "num_heads": [2, 4],
            "window_size": 2,
        },
    ),
    "CLIP": ("CLIPModel", _clip),
    "SigLIP": (
        "SiglipModel",
        lambda: {"text_config": {**BERT, "max_position_embeddings": 64}, "vision_config": VISION},
    ),
    "Wav2Vec2": ("Wav2Vec2ForCTC", SPEECH),
    "HuBERT": ("HubertModel", SPEECH),
    "Qwen2-VL": (
        "Qwen2VLForConditionalGeneration",
        lambda: {
            "text_config": QWEN_VL,
            "vision_config": {
                "depth": 1,
                "embed_dim": 32,
                "hidden_size": 24,
                "num_heads": 4,
                "patch_size": 4,
                "image_size": 16,
                "mlp_ratio": 2,
            },
            "image_token_id": IMAGE,
            "video_token_id": IMAGE + 1,
            "vision_start_token_id": IMAGE + 2,
            "vision_end_token_id": IMAGE + 3,
        },
    ),
    "Qwen2.5-VL": (
        "Qwen2_5_VLForConditionalGeneration",
        lambda: {
            "text_config": QWEN_VL,
            "vision_config": {
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 44,
                "out_hidden_size": 24,
                "num_heads": 4,
                "patch_size": 4,
                "image_size": 16,
                "window_size": 16,
                "fullatt_block_indexes": [1],
            },
            "image_token_id": IMAGE,
            "video_token_id": IMAGE + 1,
            "vision_start_token_id": IMAGE + 2,
            "vision_end_token_id": IMAGE + 3,
        },
    ),
    "Qwen3-VL": (
        "Qwen3VLForConditionalGeneration",
        lambda: {
            "text_config": QWEN_VL,
            "vision_config": {
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 44,
                "out_hidden_size": 24,
                "num_heads": 4,
                "patch_size": 4,
                "image_size": 16,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
            "image_token_id": IMAGE,
            "video_token_id": IMAGE + 1,
            "vision_start_token_id": IMAGE + 2,
            "vision_end_token_id": IMAGE + 3,
        },
    ),
    "LLaVA": (
        "LlavaForConditionalGeneration",
        lambda: {
            "text_config": _text("LlamaConfig"),
            "vision_config": _vision("CLIPVisionConfig"),
            "image_token_index": IMAGE,
        },
    ),
    "Gemma-3 with images": (
        "Gemma3ForConditionalGeneration",
        lambda: {
            "text_config": {**TEXT, **TWO, "sliding_window": 8},
            "vision_config": VISION,
            "image_token_index": IMAGE,
            "mm_tokens_per_image": 4,
            "boi_token_index": IMAGE + 1,
            "eoi_token_index": IMAGE + 2,
        },
    ),
    "PaliGemma": (
        "PaliGemmaForConditionalGeneration",
        lambda: {
            "text_config": _text("GemmaConfig"),
            "vision_config": _vision("SiglipVisionConfig"),
            "image_token_index": IMAGE,
            "projection_dim": 24,
        },
    ),
    "Idefics3": (
        "Idefics3ForConditionalGeneration",
        lambda: {
            "text_config": _text("LlamaConfig"),
            "vision_config": VISION,
            "image_token_id": IMAGE,
            "scale_factor": 2,
        },
    ),
    "JetMoE": ("JetMoeForCausalLM", {**JET, **LOCAL, "kv_channels": 6}),
    "DeepSeek-V4": (
        "DeepseekV4ForCausalLM",
        {
            **TEXT,
            **TWO,
            "head_dim": 16,
            "q_lora_rank": 12,
            "o_lora_rank": 8,
            "o_groups": 2,
            "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
            "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
            "index_n_heads": 2,
            "index_head_dim": 16,
            "index_topk": 4,
            "sliding_window": 8,
            "hc_mult": 2,
            "partial_rotary_factor": 0.25,
            "mlp_layer_types": ["hash_moe", "moe"],
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
        },
    ),
    "CPM-Ant": (
        "CpmAntForCausalLM",
        {
            "vocab_size": 131,
            "hidden_size": 24,
            "num_attention_heads": 4,
            "init_std": 0.1,  # of 1.0 its logits are so large that float32 is off by 2e-5
            "dim_head": 6,
            "dim_ff": 44,
            "num_hidden_layers": 1,
            "prompt_length": 4,
            "prompt_types": 4,
            "segment_types": 4,
        },
    ),
}


def build(family: str) -> Any:  # a PreTrainedModel
    """A model of the family with seeded random weights, in evaluation mode, without dropout."""
    name, source = SOURCES[family]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    config = cls.config_class(**(source() if callable(source) else source))
    return cls(config).eval()
