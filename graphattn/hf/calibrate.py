"""The scales of an fp8 cache, from the largest keys and values of some text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import InvalidArgumentError
from ..scales import KVScales
from .attach import attach
from .load import load_model, max_positions


@torch.no_grad()
def calibrate(
    model: str | Path | PreTrainedModel,
    prompts: Sequence[str | Sequence[int]],
    *,
    tokenizer=None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> KVScales:
    """Scales for `LLM(kv_scales=...)` under which every key and value of these prompts fits, by layer and kv head.

    A few prompts of a few hundred tokens that are like what will be served suffice; what is larger there saturates.
    Each is computed alone and whole, in the model's dtype, with a cache of that dtype.

    Args:
        model: a model folder, a `.gguf` file, a name on the hub, or a loaded transformers model (eval mode), which is
            left as it was.
        prompts: text, or token ids.
        tokenizer: for a loaded model and text.
        dtype, device: as in `LLM`, for loading.

    Raises:
        InvalidArgumentError: no prompts, an empty or too long one, text without a tokenizer, or keys or values that are
            not finite.
        ModelFileError: no model at that path.
        UnsupportedModelError: its attention does something that `attach` does not serve.

    Example:
        >>> scales = calibrate("Qwen/Qwen3-0.6B", ["Call me Ishmael. Some years ago"])  # doctest: +SKIP
        >>> llm = LLM("Qwen/Qwen3-0.6B", kv_cache_dtype="fp8", kv_scales=scales)  # doctest: +SKIP
    """
    if isinstance(prompts, str) or not len(prompts):
        raise InvalidArgumentError(f"prompts={prompts!r}: give a list of at least one")
    if not isinstance(model, torch.nn.Module):
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model, loaded = load_model(model, dtype=dtype, device=device, with_tokenizer=tokenizer is None)
        tokenizer = tokenizer or loaded
    elif dtype is not None or device is not None:
        raise InvalidArgumentError("dtype and device are for loading; this model is loaded: use model.to(...)")
    limit = max_positions(model)
    rows = [_ids(at, prompt, tokenizer, limit) for at, prompt in enumerate(prompts)]
    with attach(model, check=False) as attached:
        largest = [_Largest(layer.spec.num_kv_heads, model.device) for layer in attached.layers]
        hooks = [layer.register_forward_pre_hook(each) for layer, each in zip(attached.layers, largest, strict=True)]
        try:
            for row in rows:
                model(input_ids=torch.tensor([row], device=model.device), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
    k, v = torch.stack([each.of_KV for each in largest]).cpu().unbind(1)
    return KVScales.of_largest(k, v)


class _Largest:
    """Keeps the largest magnitude of each head that a layer is given, keys then values."""

    def __init__(self, num_kv_heads: int, device: torch.device):
        self.of_KV = torch.zeros(2, num_kv_heads, dtype=torch.float32, device=device)

    def __call__(self, layer: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        _, k_NKD, v_NKD = inputs
        now = torch.stack([each.detach().abs().amax((0, 2)).float() for each in (k_NKD, v_NKD)])
        self.of_KV = torch.maximum(self.of_KV, now)


def _ids(at: int, prompt: str | Sequence[int], tokenizer, limit: int | None) -> list[int]:
    """Token ids of a prompt."""
    if isinstance(prompt, str):
        if tokenizer is None:
            raise InvalidArgumentError(f"prompts[{at}] is text and there is no tokenizer: pass one, or token ids")
        prompt = tokenizer(prompt)["input_ids"]
    ids = list(prompt)
    if not ids or (limit is not None and len(ids) > limit):
        raise InvalidArgumentError(f"prompts[{at}] has {len(ids)} tokens: give 1 to {limit or 'any number'}")
    return ids
