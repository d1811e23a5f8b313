"""Tiny models whose layers attend in several ways, and what transformers' eager attention makes of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from graphattn.errors import InvalidArgumentError
from tests.tiny import tiny

WINDOW = 8
# A soft cap of 2, since one of 50 barely shows.
MODELS = {
    "gemma2": {"num_layers": 4, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 9},
    "gemma3_text": {"num_layers": 6, "query_pre_attn_scalar": 9},
    "qwen2": {"num_layers": 4, "use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {"num_layers": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "mistral": {"num_layers": 2},
    "cohere2": {"num_layers": 4},
    "gpt_oss": {
        "num_layers": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "experts_implementation": "eager",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}


def grouped(name: str, window: int = WINDOW, **options) -> PreTrainedModel:
    """One of `MODELS` under transformers' eager attention, with windows of so many tokens and sinks that matter."""
    if name == "qwen3":
        options["use_sliding_window"] = True
    model = tiny(name, **(MODELS[name] | {"sliding_window": window} | options))
    model.set_attn_implementation("eager")  # sdpa ignores soft caps
    generator = torch.Generator().manual_seed(1)
    for weight_name, weight in model.named_parameters():
        if weight_name.endswith("sinks"):
            weight.data.copy_(2 * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    return model


@torch.no_grad()
def logprobs_after(model: PreTrainedModel, tokens: Sequence[int], first: int) -> torch.Tensor:
    """Of every token from `first` on and one beyond, by the whole text at once; `[len(tokens) - first + 1, vocab]`."""
    if model.config._attn_implementation != "eager":
        raise InvalidArgumentError("the oracle is transformers' eager attention")
    return model(torch.tensor([list(tokens)])).logits[0, first - 1 :].log_softmax(-1)
