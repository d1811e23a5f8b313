"""A tiny random model of any model type of transformers, from the defaults of its config."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

MOST_PARAMETERS = 30_000_000
VOCAB, POSITIONS, WINDOW = 128, 512, 9
LAYERS = 4  # enough for most patterns of layers that differ
# Names of config fields, as patterns, and what they become if the default is larger.
SIZES = {
    r"(num_hidden_layers|n_layers?|num_layers|num_decoder_layers|decoder_layers|encoder_layers)": LAYERS,
    r"(num_attention_heads|n_heads?|num_heads|decoder_attention_heads|encoder_attention_heads)": 4,
    r"(num_key_value_heads|num_kv_heads|n_kv_heads)": 2,
    r"(hidden_size|n_embd|d_model|dim|model_dim|embed_dim|word_embed_proj_dim|attention_hidden_size)": 64,
    r"(embedding_size|lru_width)": 64,
    r"(head_dim|d_kv|attention_head_dim|global_head_dim|d_head|kv_channels)": 16,
    r"(moe_intermediate_size|expert_ffn_hidden_size|moe_ffn_hidden_size|shared_intermediate_size)": 32,
    r"(shared_expert_intermediate_size|moe_shared_expert_intermediate_size)": 32,
    r"(intermediate_size|intermediate_size_mlp|ffn_dim|d_ff|n_inner|ffn_hidden_size)": 96,
    r"(decoder_ffn_dim|encoder_ffn_dim)": 96,
    r"(num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_routed_experts)": 8,
    r"(num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts|experts_per_token)": 2,
    r"(sliding_window|attention_window_size|local_window_size|window_size)": WINDOW,
    r"(vocab_size|text_vocab_size|vocab_size_per_layer_input)": VOCAB,
    r"(max_position_embeddings|n_positions|max_sequence_length|n_ctx|max_seq_len)": POSITIONS,
    r"(pad_token_id|bos_token_id|eos_token_id|sep_token_id|decoder_start_token_id|image_token_id|audio_token_id)": 1,
    r"(q_lora_rank|kv_lora_rank)": 16,
    r"(qk_nope_head_dim|v_head_dim)": 16,
    r"(qk_rope_head_dim|rotary_dim|index_head_dim)": 8,
    r"(index_n_heads|n_group|mamba_n_heads|mamba_num_heads|linear_num_value_heads|linear_num_key_heads)": 2,
    r"(topk_group|n_shared_experts|first_k_dense_replace|num_dense_layers|moe_num_shared_experts)": 1,
    r"(mamba_d_state|state_size|ssm_state_size|mamba_d_head|mamba_head_dim|linear_(key|value)_head_dim)": 16,
    r"(hidden_size_per_layer_input|time_step_rank|mamba_chunk_size|chunk_size|index_topk)": 16,
}
LATENT = {"head_dim": 8, "num_key_value_heads": 4}  # of DeepSeek's attention: the width of what turns
PER_LAYER = {"per_layer_config": {"03": {"head_dim": 32}}}
# What follows from other fields, or may not be as the defaults are.
EXTRAS: dict[str, dict[str, Any]] = {
    "axk1": LATENT,
    "deepseek_v2": {**LATENT, "num_experts_per_tok": 2, "n_routed_experts": 8},
    "deepseek_v3": LATENT,
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n_text": {
        "intermediate_size": [96] * LAYERS,
        "activation_sparsity_pattern": [0.0] * LAYERS,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 0,
    },
    "gemma4_text": PER_LAYER,
    "gemma4_unified_text": PER_LAYER,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "glm4_moe_lite": LATENT,
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "longcat_flash": LATENT,
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "minicpm3": LATENT,
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {"is_decoder": True},
    "youtu": LATENT,
}


class NotBuilt(Exception):
    """No tiny model could be made; says why."""


def shrunk(kind: str) -> PretrainedConfig:
    """The config of a tiny model of that type.

    Raises:
        NotBuilt: the config class refuses it.
    """
    try:
        default = AutoConfig.for_model(kind)
        return type(default)(**(_small(default) | EXTRAS.get(kind, {})))
    except Exception as error:
        raise NotBuilt(f"config: {type(error).__name__}: {first_line(error)}") from error


def tiny(kind: str, *, seed: int = 0) -> PreTrainedModel:
    """A model of that type in float32 and eval mode, its random weights four times as large as transformers makes them.

    Raises:
        NotBuilt: it cannot be made, or is too large still.
    """
    config = shrunk(kind)
    try:
        with torch.device("meta"):
            size = sum(x.numel() for x in AutoModelForCausalLM.from_config(config, dtype=torch.float32).parameters())
    except Exception as error:
        raise NotBuilt(f"model: {type(error).__name__}: {first_line(error)}") from error
    if size > MOST_PARAMETERS:
        raise NotBuilt(f"model: {size:,} parameters where {MOST_PARAMETERS:,} are allowed")
    torch.manual_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(shrunk(kind), dtype=torch.float32)
    except Exception as error:
        raise NotBuilt(f"model: {type(error).__name__}: {first_line(error)}") from error
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4)
            elif weight.is_floating_point():
                weight.add_(0.2 * torch.randn_like(weight))
    return model.eval()


def first_line(error: BaseException) -> str:
    """The first line of what an exception says."""
    return (str(error).strip().splitlines() or [""])[0][:300]


def _small(default: PretrainedConfig) -> dict[str, Any]:
    """Arguments for a config class, as small as `SIZES`; those of configs inside likewise."""
    found: dict[str, Any] = {}
    names = {*default.to_dict(), *getattr(default, "attribute_map", {})}
    for name in names:
        own_name = getattr(default, "attribute_map", {}).get(name, name)
        if isinstance(getattr(type(default), own_name, None), property):
            continue  # it follows from others
        try:
            value = getattr(default, name, None)
        except (AttributeError, RuntimeError):  # transformers raises where layers differ in it
            value = default.to_dict().get(name)
        if isinstance(value, PretrainedConfig):
            found[name] = type(value)(**_small(value))
        elif name == "layer_types" and isinstance(value, list):
            found[name] = _kinds(value)
        elif name in ("mlp_layer_types", "layers_block_type", "no_rope_layers") and isinstance(value, list):
            found[name] = value[:LAYERS]
        elif isinstance(value, int) and not isinstance(value, bool):
            for pattern, size in SIZES.items():
                if re.fullmatch(pattern, name) and value > size:
                    found[name] = size
    taken = set(getattr(default, "attribute_map", {})) & set(found)
    for name in taken:  # the same field under another name
        found.pop(default.attribute_map[name], None)
    return found


def _kinds(layer_types: list[str]) -> list[str]:
    """As many kinds of layers as there are, each at least once, in their order."""
    kinds = list(dict.fromkeys(layer_types))
    return (layer_types[: LAYERS - len(kinds) + 1] + kinds[1:])[-LAYERS:] if len(kinds) > 1 else layer_types[:LAYERS]
