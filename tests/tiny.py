"""Random models of transformers, small enough to run in milliseconds; made here, nothing is downloaded."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tools.families.table import SIZES

FAMILIES = ("llama", "qwen3", "mistral", "qwen2")


def tiny(
    family: str,
    *,
    dtype: torch.dtype = torch.float64,
    head_dim: int = 16,
    num_layers: int = 2,
    seed: int = 0,
    **config,
) -> PreTrainedModel:
    """A decoder with random weights in eval mode: 4 query heads, 2 kv heads, 128 tokens, 512 positions.

    Args:
        family: one of `FAMILIES`, or another model type of transformers that takes this config.
        dtype: of weights and activations.
        head_dim: width of a head.
        num_layers: how many of them.
        seed: of the weights; torch's own random state stays as it was.
        config: anything else of the config, or other values for what is set here.
    """
    settings = SIZES | {"num_hidden_layers": num_layers, "head_dim": head_dim} | config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings), dtype=dtype)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:  # at its initial 0.02 attention is all but uniform, and errors in it hide
                weight.mul_(4)
    return model.eval()
