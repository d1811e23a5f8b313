"""Rotary frequencies of a model, for every length where they depend on it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..rope import LengthRule


def length_rule(embedding: nn.Module) -> LengthRule | None:
    """How the frequencies of a rotary embedding depend on the length; None if they do not.

    transformers takes the longest row of a batch (`dynamic_rope_update` in modeling_rope_utils.py). A model whose
    frequencies change at once, with longrope, must compute keys anew then (Phi3ForCausalLM drops its cache).
    """
    kind = getattr(embedding, "rope_type", None)
    if kind == "longrope":
        threshold = embedding.config.rope_parameters["original_max_position_embeddings"]
        return LengthRule(threshold=threshold, is_whole=True)
    if kind == "dynamic":
        return LengthRule(threshold=embedding.original_max_seq_len, is_whole=False)
    return None


def tables(module: nn.Module) -> list[tuple[Tensor, float]]:
    """The frequencies of a rotary embedding and what scales its cosines and sines, for each type of layers where those
    have their own; none for any other module."""
    found = [
        (getattr(module, f"{kind}inv_freq", None), getattr(module, f"{kind}attention_scaling", 1.0))
        for kind in ("", *(f"{kind}_" for kind in _layer_types(module)))
    ]
    return [(inv_freq, float(scaling)) for inv_freq, scaling in found if isinstance(inv_freq, Tensor)]


def _layer_types(module: nn.Module) -> list[str]:
    kinds = getattr(module, "rope_type", None)
    return [kind for kind in kinds if isinstance(kind, str)] if isinstance(kinds, dict) else []


def frequencies(embedding: nn.Module, rule: LengthRule, longest: int) -> Tensor:
    """What `Rotary.inv_freq` is to be under a rule, `[F, R / 2]` for rows of up to `longest` tokens."""
    device = embedding.inv_freq.device
    first, last = rule.threshold, rule.threshold + 1 if rule.is_whole else max(longest, rule.threshold)
    lengths = torch.arange(first, last + 1, device=device)
    of_type, config = ROPE_INIT_FUNCTIONS[embedding.rope_type], embedding.config
    if not rule.is_whole:
        return of_type(config, device, seq_len=lengths[:, None])[0].float()
    return torch.stack([of_type(config, device, seq_len=length)[0] for length in lengths.tolist()]).float()
