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


def frequencies(embedding: nn.Module, rule: LengthRule | None, longest: int) -> Tensor:
    """What `Rotary.inv_freq` is to be: `[R / 2]`, or `[F, R / 2]` for rows of up to `longest` tokens under a rule."""
    if rule is None:
        return embedding.inv_freq
    device = embedding.inv_freq.device
    first, last = rule.threshold, rule.threshold + 1 if rule.is_whole else max(longest, rule.threshold)
    lengths = torch.arange(first, last + 1, device=device)
    of_type, config = ROPE_INIT_FUNCTIONS[embedding.rope_type], embedding.config
    if not rule.is_whole:
        return of_type(config, device, seq_len=lengths[:, None])[0].float()
    return torch.stack([of_type(config, device, seq_len=length)[0] for length in lengths.tolist()]).float()
