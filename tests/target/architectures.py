"""Tiny random instances of real classes, made by plain calls to transformers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB_SIZE = 96
WINDOW = 16  # shorter than the rows of the tests

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.25,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
HEADS = {"head_dim": 8}
MOE = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
MLA_MOE = {
    **MLA, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
    "moe_intermediate_size": 16, "n_shared_experts": 1, "num_key_value_heads": 4,
}  # fmt: skip
LONGROPE = {
    "original_max_position_embeddings": 20,
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 20,
        "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
    },
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """A class of transformers, by the stem of its name, and what its config needs.

    Attributes:
        kind: `{kind}Config`, and `{model}` or `{kind}ForCausalLM`.
        changes: fields of the config, or of its text config where there is a `vision`.
        drop: fields of `SIZES` that it does not know.
        slow: left to the slow run.
        oracle_attention: what a plain forward of it is to use.
    """

    kind: str
    changes: dict[str, Any] = field(default_factory=dict)
    model: str | None = None
    vision: dict[str, Any] | None = None
    drop: tuple[str, ...] = ()
    slow: bool = True
    oracle_attention: str = "eager"

    def config(self) -> Any:
        fields = {name: value for name, value in {**SIZES, **self.changes}.items() if name not in self.drop}
        config_class = getattr(transformers, f"{self.kind}Config")
        if self.vision is None:
            return config_class(**fields)
        whole = {name: fields.pop(name) for name in ("tie_word_embeddings",) if name in fields}
        return config_class(text_config=fields, vision_config=self.vision, **whole)

    def make(self) -> Any:
        """A random model in float32, everything one-dimensional moved off its default so that forgetting it shows."""
        config = self.config()
        torch.manual_seed(0)
        model = getattr(transformers, self.model or f"{self.kind}ForCausalLM")(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn(parameter.shape))
        return model

    def save(self, directory: Path) -> Path:
        self.make().save_pretrained(directory)
        return directory


A = Architecture
ARCHITECTURES: dict[str, Architecture] = {
    "Llama": A("Llama", slow=False),
    "Llama tied": A("Llama", {"tie_word_embeddings": True}, slow=False),
    "Llama scaled rope": A("Llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}),
    "Mistral": A("Mistral", {"sliding_window": WINDOW}, slow=False),
    "Mixtral": A("Mixtral", {"num_local_experts": 4, "sliding_window": WINDOW}),
    "Qwen2": A("Qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 3}, slow=False),
    "Qwen2Moe": A("Qwen2Moe", {**MOE, "shared_expert_intermediate_size": 16}),
    "Qwen3": A("Qwen3", HEADS),
    "Qwen3Moe": A("Qwen3Moe", {**HEADS, **MOE}, slow=False),
    "Qwen3Next": A("Qwen3Next", {**HEADS, **MOE, "shared_expert_intermediate_size": 16}),
    "Qwen3.5": A("Qwen3_5Text", HEADS, model="Qwen3_5ForCausalLM"),
    "Phi": A("Phi"),
    "Phi3": A("Phi3", {"sliding_window": WINDOW}),
    "Phi3 longrope": A("Phi3", LONGROPE, slow=False),
    "Phimoe": A("Phimoe", {"num_local_experts": 4}),
    "Gemma": A("Gemma", {**HEADS, "tie_word_embeddings": True}),
    "Gemma2": A(
        "Gemma2", {**HEADS, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
        "sliding_window": WINDOW, "tie_word_embeddings": True}, slow=False),
    "Gemma3 text": A("Gemma3Text", {**HEADS, "sliding_window": WINDOW, "final_logit_softcapping": 3.0,
        "tie_word_embeddings": True}, model="Gemma3ForCausalLM", slow=False),
    "VaultGemma": A("VaultGemma", {**HEADS, "sliding_window": WINDOW, "final_logit_softcapping": 3.0,
        "attn_logit_softcapping": 2.0}),
    "RecurrentGemma": A("RecurrentGemma", {"lru_width": 32, "attention_window_size": WINDOW, "logits_soft_cap": 3.0},
        drop=("max_position_embeddings",)),
    "Granite": A("Granite", {"logits_scaling": 4.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.7},
        slow=False),
    "GraniteMoe": A("GraniteMoe", {"logits_scaling": 4.0, "num_local_experts": 4}),
    "GraniteMoeShared": A("GraniteMoeShared", {"logits_scaling": 4.0, "num_local_experts": 4}),
    "GraniteMoeHybrid": A("GraniteMoeHybrid", {"logits_scaling": 4.0, "num_local_experts": 4, "mamba_n_heads": 4,
        "layer_types": ["mamba", "mamba", "attention"] * 2}),
    "Cohere": A("Cohere", {"logit_scale": 0.25, "tie_word_embeddings": True}),
    "Cohere2": A("Cohere2", {"logit_scale": 0.25, "sliding_window": WINDOW, "tie_word_embeddings": True}, slow=False),
    "Cohere2Moe": A("Cohere2Moe", {**HEADS, "logit_scale": 0.25, "sliding_window": WINDOW, "num_experts": 4,
        "num_experts_per_tok": 2}),
    "GptOss": A("GptOss", {**HEADS, "num_local_experts": 4, "sliding_window": WINDOW}, slow=False),
    "DeepseekV2": A("DeepseekV2", MLA_MOE),
    "DeepseekV3": A("DeepseekV3", MLA_MOE, slow=False),
    "MiniCPM3": A("MiniCPM3", {**MLA, "num_key_value_heads": 4, "dim_model_base": 8}),
    "HyperCLOVAX": A("HyperCLOVAX", {**HEADS, "logits_scaling": 0.25}),
    "Olmo2": A("Olmo2", slow=False),
    "Olmo3": A("Olmo3", {"sliding_window": WINDOW}),
    "Olmoe": A("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "Glm": A("Glm", HEADS),
    "Glm4": A("Glm4", HEADS, slow=False),
    "Glm4Moe": A("Glm4Moe", {**HEADS, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    "Llama4": A("Llama4Text", {**HEADS, "num_local_experts": 4, "intermediate_size_mlp": 48,
        "attention_chunk_size": WINDOW}, model="Llama4ForCausalLM", slow=False),
    "GPT2": A("GPT2", {"tie_word_embeddings": True}, model="GPT2LMHeadModel", slow=False),
    "GPTBigCode": A("GPTBigCode"),
    "GPTJ": A("GPTJ", {"rotary_dim": 4}),
    "GPTNeo": A("GPTNeo", {"attention_types": [[["global", "local"], 3]], "window_size": WINDOW}),
    "GPTNeoX": A("GPTNeoX", slow=False),
    "OPT": A("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "Bloom": A("Bloom"),
    "Mpt": A("Mpt", {"expansion_ratio": 2}),
    "Falcon": A("Falcon", {"num_kv_heads": 2, "new_decoder_architecture": True}, slow=False),
    # Its eager attention adds the bias twice, in transformers 5.23.
    "Falcon alibi": A("Falcon", {"alibi": True}, oracle_attention="sdpa"),
    "FalconH1": A("FalconH1", {**HEADS, "lm_head_multiplier": 0.3, "embedding_multiplier": 2.0, "mamba_d_ssm": 32,
        "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}),
    "StableLm": A("StableLm"),
    "Starcoder2": A("Starcoder2", {"sliding_window": WINDOW}),
    "NanoChat": A("NanoChat", {"final_logit_softcapping": 3.0}),
    "SmolLM3": A("SmolLM3"),
    "SeedOss": A("SeedOss", HEADS),
    "Exaone4": A("Exaone4", {**HEADS, "sliding_window": WINDOW}),
    "Nemotron": A("Nemotron", HEADS),
    "Ernie4.5 MoE": A("Ernie4_5_Moe", {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16}),
    "HunYuan": A("HunYuanDenseV1", HEADS),
    "Mamba": A("Mamba", drop=("max_position_embeddings",)),
    "Jamba": A("Jamba", {"num_experts": 4, "mamba_d_state": 8, "use_mamba_kernels": False}),
    "Lfm2": A("Lfm2"),
    "Llava": A("Llava", {"model_type": "llama"}, model="LlavaForConditionalGeneration",
        vision={"model_type": "clip_vision_model", **VISION}, slow=False),
    "Gemma3": A("Gemma3", {**HEADS, "sliding_window": WINDOW},
        model="Gemma3ForConditionalGeneration", vision={"model_type": "siglip_vision_model", **VISION}, slow=False),
    "Mistral3": A("Mistral3", {"model_type": "mistral", **HEADS}, model="Mistral3ForConditionalGeneration",
        vision={"model_type": "pixtral", **VISION}),
    "Qwen2.5-VL": A("Qwen2_5_VL", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
        "mrope_section": [1, 1, 2]}}, model="Qwen2_5_VLForConditionalGeneration",
        vision={"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32},
        slow=False),
    "Qwen3-VL": A("Qwen3VL", {**HEADS, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
        "mrope_section": [2, 1, 1]}}, model="Qwen3VLForConditionalGeneration",
        vision={"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
        "deepstack_visual_indexes": [0]}),
    "Qwen3-VL MoE": A("Qwen3VLMoe", {**HEADS, **MOE, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
        "mrope_section": [2, 1, 1]}}, model="Qwen3VLMoeForConditionalGeneration",
        vision={"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
        "deepstack_visual_indexes": [0]}),
    "GLM-4V": A("Glm4v", {"model_type": "glm4v_text", "rope_parameters": {"rope_type": "default",
        "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}, model="Glm4vForConditionalGeneration",
        vision={"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
        "image_size": 28, "patch_size": 14}),
    "SmolVLM": A("SmolVLM", {"model_type": "llama"}, model="SmolVLMForConditionalGeneration", vision=VISION),
    "Llama4 multimodal": A("Llama4", {**HEADS, "num_local_experts": 4, "intermediate_size_mlp": 48,
        "attention_chunk_size": WINDOW}, model="Llama4ForConditionalGeneration",
        vision={**VISION, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}),
    "InternVL": A("InternVL", {"model_type": "qwen2"}, model="InternVLForConditionalGeneration",
        vision={**VISION, "image_size": [28, 28], "patch_size": [14, 14]}),
}  # fmt: skip

# What cannot be captured, and why.
REFUSED: dict[str, tuple[Architecture, str]] = {
    "reads both ways": (A("PaliGemma", {"model_type": "gemma", **HEADS}, model="PaliGemmaForConditionalGeneration",
        vision={"model_type": "siglip_vision_model", **VISION, "projection_dim": 32}), "left to right"),
    "encoder": (A("Bert", model="BertLMHeadModel"), "no list of decoder layers"),
    "encoder-decoder": (A("T5", model="T5ForConditionalGeneration"), "encoder-decoder"),
    "no language model": (A("Albert", {"embedding_size": 16}, model="AlbertForMaskedLM"), "an encoder model"),
    "several streams": (A("HYV4", HEADS), "one vector a token"),
    "another head": (
        A("ModernBertDecoder", {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}), "after its head"),
    "layers in another way": (A("HrmText", HEADS), "no list of decoder layers"),
    "another width": (A("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 16}), "16 wide"),
}  # fmt: skip


def named(*, slow: bool) -> list[str]:
    return [name for name, architecture in ARCHITECTURES.items() if architecture.slow is slow]
