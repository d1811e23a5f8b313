"""What each attention module of a model computes, read from one call of the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from ..errors import UnsupportedModelError
from ..spec import AttentionSpec
from ..variants import attention_sinks
from .widths import served_width

# The attention implementations under which a model must be to be probed, with masks and without.
PROBE, PROBE_UNMASKED = "graphattn_probe", "graphattn_probe_unmasked"
# A name with "flash" in it would be taken for flash_attn (transformers utils/generic.py, is_flash_attention_requested).
IMPLEMENTATION = "graphattn"
IMPLEMENTATIONS = (IMPLEMENTATION, PROBE, PROBE_UNMASKED)
UNSERVED_ARGUMENTS = {
    "position_bias": "a position bias",
    "indices": "sparse attention indices",
    "block_indices": "sparse attention blocks",
}
SERVED_LAYER_TYPES = ("full_attention", "sliding_attention")
OWN_CONFIGS = {"text_config", "attn_config", "ffn_config"}  # inside a config, of the decoder itself
LENGTH_DEPENDENT = ("dynamic", "longrope")  # rope types
FARTHEST = 1 << 20  # positions up to which a layer's mask is read


@dataclass(frozen=True)
class Call:
    """One call of the attention function, as the probe saw it; query `[1, H, 2, D]`, key and value `[1, K, 2, D]`."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    arguments: dict


_calls: ContextVar[list[Call]] = ContextVar("graphattn_calls")


def _probe_attention(module, query, key, value, attention_mask, **arguments):
    _calls.get().append(Call(module, query, key, value, attention_mask, arguments))
    return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None


def _probe_mask(*, config: PretrainedConfig, **arguments) -> Tensor:
    """The mask of the call's tokens, with the keys that a far token sees, `[keys]`, as its attribute `far_L`.

    Of `keys` tokens that is the last but one, so that the mask of a window, a chunk or both directions shows.
    """
    whole = {"attention_mask": None, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    keys = min(getattr(config, "max_position_embeddings", None) or FARTHEST, FARTHEST)
    far = {"batch_size": 1, "q_length": 1, "kv_length": keys, "q_offset": keys - 2, "kv_offset": 0}
    mask = sdpa_mask(**{**arguments, **whole})
    mask.far_L = sdpa_mask(**{**arguments, **whole, **far})[0, 0, 0]
    return mask


for name in (PROBE, PROBE_UNMASKED):
    AttentionInterface.register(name, _probe_attention)
AttentionMaskInterface.register(PROBE, _probe_mask)


def refuse_config(model: PreTrainedModel, *, packs: bool) -> None:
    """Raises UnsupportedModelError for what a model's config alone rules out; `packs` as `Binding` takes it."""
    name, config = type(model).__name__, model.config.get_text_config()
    if model.training:
        raise UnsupportedModelError(f"{name} is in training mode: call model.eval() first")
    if model.config.is_encoder_decoder or config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        raise UnsupportedModelError(f"{name} attends to an encoder: only decoders are served")
    if parts := sorted(set(model.config.sub_configs) - OWN_CONFIGS):
        raise UnsupportedModelError(
            f"{name} has parts besides its decoder ({', '.join(parts)}), whose masks would be lost: attach its "
            "language model alone"
        )
    if model._is_stateful:
        raise UnsupportedModelError(f"{name} keeps a state besides keys and values, which is not served")
    for layer, kind in enumerate(getattr(config, "layer_types", None) or ()):
        if kind not in SERVED_LAYER_TYPES:
            raise UnsupportedModelError(f"{name}: layer {layer} is {kind}, which is not served")
    if not packs and (kind := length_dependent(model)):
        raise UnsupportedModelError(
            f"{name}: rope type {kind} takes its frequencies from the longest row of a batch, so rows would change "
            "each other; graphattn.LLM gives each request its own"
        )


def length_dependent(model: PreTrainedModel) -> str | None:
    """A rope type of the model whose frequencies depend on the longest row of a batch; None if it has none."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = [each.get("rope_type") for each in (rope, *rope.values()) if isinstance(each, dict)]
    return next((kind for kind in kinds if kind in LENGTH_DEPENDENT), None)


def takes_positions_by_place(model: PreTrainedModel) -> bool:
    """Whether a model, under `PROBE_UNMASKED`, takes a position from a token's place in the row.

    Where it takes them from `position_ids` alone, the same token twice at one position gives the same queries, keys and
    values.
    """
    scaled = getattr(model.config.get_text_config(), "attn_temperature_tuning", False)
    tensors = [each for call in probe(model, positions=(3, 3)) for each in (call.query, call.key, call.value)]
    near = {"rtol": 0.05, "atol": 1e-4, "equal_nan": True}  # of NaN in weights the comparison with eager tells
    return scaled or not all(torch.allclose(each[:, :, 0], each[:, :, 1], **near) for each in tensors)


def refuse_positions_by_place(model: PreTrainedModel) -> None:
    """Raises UnsupportedModelError for such a model: tokens of several requests are to be packed into one row."""
    if takes_positions_by_place(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} takes positions from a token's place in the row and not from position_ids, so "
            "requests cannot share a step; graphattn.hf.attach(model) may serve it"
        )


def probe(model: PreTrainedModel, positions: tuple[int, int] = (0, 1)) -> list[Call]:
    """Runs two tokens through a model that is to be probed; returns the calls by layer index."""
    ids = torch.full((1, 2), _telling_id(model), dtype=torch.long, device=model.device)
    with _recording() as calls, torch.no_grad():
        try:
            model(input_ids=ids, position_ids=torch.tensor([positions], device=ids.device), use_cache=False)
        except Exception as error:
            raise UnsupportedModelError(
                f"{type(model).__name__} does not run on tokens and positions alone: {type(error).__name__}: {error}"
            ) from error
    return sorted(calls, key=lambda call: getattr(call.module, "layer_idx", None) or 0)


def _telling_id(model: PreTrainedModel) -> int:
    """An id whose embedding is not zero, as that of padding is."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        return 0
    return int(weight.detach().abs().amax(1).argmax())


@contextmanager
def _recording() -> Iterator[list[Call]]:
    token = _calls.set([])
    try:
        yield _calls.get()
    finally:
        _calls.reset(token)


def layer_specs(model: PreTrainedModel, calls: list[Call]) -> list[AttentionSpec]:
    """What each layer computes; sinks are variants, each over its own layer's tensor.

    Raises:
        UnsupportedModelError: a layer is missing, called twice or does something unserved.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    indices = [getattr(call.module, "layer_idx", None) for call in calls]
    if indices != list(range(config.num_hidden_layers)):
        raise UnsupportedModelError(
            f"{name}: transformers' attention interface was called for layers {indices}, expected is each of "
            f"{config.num_hidden_layers} once; only plain decoders that go through it are served"
        )
    return [_spec(f"{name}: layer {layer}", model, call) for layer, call in enumerate(calls)]


def _spec(layer: str, model: PreTrainedModel, call: Call) -> AttentionSpec:
    arguments = call.arguments
    for argument, meaning in UNSERVED_ARGUMENTS.items():
        if arguments.get(argument) is not None:
            raise UnsupportedModelError(f"{layer} uses {meaning} ({argument}), which is not served")
    if arguments.get("is_causal") is False or getattr(call.module, "is_causal", True) is False:
        raise UnsupportedModelError(f"{layer} is not causal, which is not served")
    head_dim, v_dim, device = call.query.shape[3], call.value.shape[3], call.query.device
    if device != model.device:
        raise UnsupportedModelError(
            f"{layer} is on {device}, the model on {model.device}: a model over several devices is not served"
        )
    window = arguments.get("sliding_window")
    if call.mask is not None and not _is_causal(call.mask, window):
        raise UnsupportedModelError(
            f"{layer} asks for window={window}, but its mask is not the causal one of that window; that is not served"
        )
    sinks, num_heads = arguments.get("s_aux"), call.query.shape[1]
    if sinks is not None and sinks.shape != (num_heads,):
        raise UnsupportedModelError(
            f"{layer} has attention sinks (s_aux) of shape {list(sinks.shape)}, served is one for each of "
            f"{num_heads} heads"
        )
    return AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=call.key.shape[1],
        head_dim=served_width(head_dim, v_dim, device),
        scale=arguments.get("scaling") or head_dim**-0.5,
        window=window,
        softcap=arguments.get("softcap"),
        variant=None if sinks is None else attention_sinks(sinks.detach()),  # of one storage: what is loaded shows
    )


def _is_causal(mask: Tensor, window: int | None) -> bool:
    """Whether a mask is what `_probe_mask` makes for causal attention over the latest `window` keys."""
    far_L = getattr(mask, "far_L", None)  # gone where the model made another mask of it
    if far_L is None:
        return False
    key_L, query = torch.arange(len(far_L), device=far_L.device), len(far_L) - 2
    sees_L = key_L <= query
    if window is not None:
        sees_L &= key_L > query - window
    return torch.equal(far_L, sees_L)
