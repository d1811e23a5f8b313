"""The families, each as a tiny random model of transformers."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

ROPE = {"rope_type": "default", "rope_theta": 1e4}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
WINDOW = 9  # tokens, of those families that have one: shorter than the rows
SOFTCAP = 2.0  # the cap of real models, 50, hardly shows
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family.

    Attributes:
        title: as its models are called.
        kind: transformers' `model_type`.
        config: of the tiny model, where it differs from `SIZES`.
        num_layers: how many, so that every kind of layer occurs.
        has_experts: whether it routes tokens to experts.
    """

    title: str
    kind: str
    config: dict = field(default_factory=dict)
    num_layers: int = 2
    has_experts: bool = False


def _family(title: str, kind: str, num_layers: int = 2, **config) -> Family:
    has_experts = "num_experts_per_tok" in config
    return Family(title=title, kind=kind, config=config, num_layers=num_layers, has_experts=has_experts)


def _full_and_sliding(num_layers: int, every: int) -> list[str]:
    return ["full_attention" if layer % every == every - 1 else "sliding_attention" for layer in range(num_layers)]


SOFTCAPS = {"attn_logit_softcapping": SOFTCAP, "final_logit_softcapping": SOFTCAP, "query_pre_attn_scalar": 16}
GPT2 = {"n_layer": 2, "n_head": 4, "n_embd": 64, "n_positions": 512}
DEEPSEEK = {
    "head_dim": 8,  # that of the part that turns
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    **MOE,
}

FAMILIES = {
    "llama": _family("Llama 3.x", "llama", rope_parameters=LLAMA3),
    "llama-80": _family("Llama with heads of 80", "llama", head_dim=80),
    "llama-96": _family("Llama with heads of 96", "llama", head_dim=96),
    "qwen2": _family("Qwen 2 and 2.5", "qwen2"),
    "qwen2-window": _family(
        "Qwen 2 with windows",
        "qwen2",
        4,
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=2,
    ),
    "qwen3": _family("Qwen 3", "qwen3"),
    "qwen3-moe": _family("Qwen 3 MoE", "qwen3_moe", num_experts=8, **MOE),
    "mistral": _family("Mistral", "mistral", sliding_window=WINDOW),
    "mixtral": _family("Mixtral", "mixtral", sliding_window=None, num_local_experts=4, num_experts_per_tok=2),
    "gemma2": _family("Gemma 2", "gemma2", sliding_window=WINDOW, **SOFTCAPS),
    "gemma3": _family("Gemma 3", "gemma3_text", 6, sliding_window=WINDOW),
    "gpt-oss": _family(
        "gpt-oss",
        "gpt_oss",
        4,
        sliding_window=WINDOW,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters=ROPE,
    ),
    "phi3": _family("Phi-3", "phi3", pad_token_id=0),
    "phi4": _family("Phi-4-mini", "phi3", pad_token_id=0, rope_parameters={**ROPE, "partial_rotary_factor": 0.75}),
    "olmo2": _family("OLMo 2", "olmo2"),
    "granite": _family(
        "Granite",
        "granite",
        attention_multiplier=0.4,
        logits_scaling=2.0,
        residual_multiplier=0.5,
        embedding_multiplier=3.0,
    ),
    "glm4": _family("GLM-4", "glm4", pad_token_id=0),
    "smollm3": _family("SmolLM3", "smollm3", 4, pad_token_id=0),
    "cohere": _family("Cohere", "cohere", pad_token_id=0, logit_scale=0.5, use_qk_norm=True),
    "cohere2": _family("Cohere 2", "cohere2", 4, pad_token_id=0, sliding_window=WINDOW),
    "starcoder2": _family("StarCoder2", "starcoder2", sliding_window=WINDOW),
    "gpt2": _family("GPT-2", "gpt2", **GPT2),
    "opt": _family("OPT", "opt", ffn_dim=96, word_embed_proj_dim=64, pad_token_id=1),
    "gpt-neox": _family("GPT-NeoX", "gpt_neox", rope_parameters={**ROPE, "partial_rotary_factor": 0.25}),
    "stablelm": _family("StableLM", "stablelm", use_qkv_bias=True, qk_layernorm=True),
    "nemotron": _family("Nemotron", "nemotron"),
    "exaone4": _family("EXAONE 4", "exaone4", 4, sliding_window=WINDOW, layer_types=_full_and_sliding(4, 4)),
    "deepseek-v3": _family("DeepSeek-V3, keys and values expanded", "deepseek_v3", 3, **DEEPSEEK),
    "deepseek-v3-yarn": _family(
        "DeepSeek-V3 with YaRN", "deepseek_v3", 3, **DEEPSEEK | {"rope_parameters": {**YARN, "mscale_all_dim": 1.0}}
    ),
}


def to_every_expert(family: Family) -> Family:
    """The family with every token at all experts. Which of them score best a rounding may change, and with that the
    logits, so in half types no two ways of computing the same model need agree where some are left out."""
    if not family.has_experts:
        return family
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    changed = {"num_experts_per_tok": next(family.config[name] for name in names if name in family.config)}
    if "n_group" in family.config:
        changed["topk_group"] = family.config["n_group"]
    return replace(family, config=family.config | changed)


def build(family: Family, *, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> PreTrainedModel:
    """The tiny model in eval mode; torch's own random state stays as it was.

    Matrices are four times as large as transformers makes them, since attention is all but uniform otherwise, and norms
    and biases are uneven, since what is left out shows only then.
    """
    settings = SIZES | {"num_hidden_layers": family.num_layers} | family.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family.kind, **settings), dtype=torch.float32)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1:
                    weight.mul_(4)
                else:
                    weight.add_(0.2 * torch.randn_like(weight))
    return model.to(dtype).to(device).eval()


def eager(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy in a dtype that computes as transformers' plain torch does, its experts one after another."""
    copied = copy.deepcopy(model).to(dtype)
    copied.set_attn_implementation("eager")
    if copied._can_set_experts_implementation():
        copied.set_experts_implementation("eager")
    return copied
