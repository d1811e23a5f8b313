"""A model of a given shape: a transformers config as JSON, with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from graphattn import LLM, InvalidArgumentError


def config_of(shape: Path):
    """The transformers config that the file describes.

    Raises:
        InvalidArgumentError: it describes none.
    """
    from transformers import AutoConfig

    try:
        settings = json.loads(shape.read_text())
        return AutoConfig.for_model(settings.pop("model_type"), **settings)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidArgumentError(
            f"{shape} is no config of a model ({type(error).__name__}: {error}): give a JSON file with a model_type, "
            "like those in tools/shapes"
        ) from error


def random_model(shape: Path, dtype: torch.dtype, device: str, attention: str | None = None):
    """A transformers decoder of that config, with random weights; the same weights in every dtype.

    Args:
        shape: the config.
        dtype: of the weights.
        device: where they are drawn and stay.
        attention: transformers' `attn_implementation`; None for its default.
    """
    from transformers import AutoModelForCausalLM

    config = config_of(shape)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model = model.to(dtype).eval()
    if attention is not None:  # flash attention refuses to be asked for while the weights are float32
        model.set_attn_implementation(attention)
        if model.config._attn_implementation != attention:
            raise RuntimeError(f"transformers stays with {model.config._attn_implementation}, asked was {attention}")
    return model


def head_dim_of(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def token_bytes(config, itemsize: int) -> int:
    """Bytes of one token's keys and values in one layer."""
    return 2 * config.num_key_value_heads * head_dim_of(config) * itemsize


def step_bytes(llm: LLM, lens: list[int]) -> int:
    """The fewest bytes a decode step reads: every weight once (of the embedding only rows), every row's keys and
    values once."""
    model, pool = llm.model, llm.pool
    weights = sum(weight.nbytes for weight in model.parameters())
    if not model.config.get_text_config().tie_word_embeddings:
        weights -= model.get_input_embeddings().weight.nbytes
    cached = next(line.bytes for line in llm.ledger().lines if line.name == "KV pages")
    return weights + sum(lens) * cached // ((pool.num_usable + 1) * pool.page_size)
