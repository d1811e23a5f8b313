"""Puts an `Attention` layer behind every attention module of one transformers model, and takes it out again."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from ..cache import KVCache
from ..errors import GraphattnError, InvalidArgumentError, UnsupportedModelError
from ..layer import Attention
from ..spec import AttentionSpec

# A name with "flash" in it would be taken for flash_attn (transformers utils/generic.py, is_flash_attention_requested).
IMPLEMENTATION = "graphattn"
PROBE = "graphattn_probe"
LAYER = "graphattn"  # name of the submodule that each attention module gets
UNSERVED_ARGUMENTS = {
    "s_aux": "attention sinks",
    "position_bias": "a position bias",
    "indices": "sparse attention indices",
    "block_indices": "sparse attention blocks",
}
UNSERVED_LAYER_TYPES = ("chunked_attention", "linear_attention", "conv", "mamba", "recurrent")
UNSERVED_ROPE_TYPES = ("dynamic", "longrope")


@dataclass(frozen=True)
class _Call:
    """One call of the attention function, as the probe saw it."""

    module: nn.Module
    q_shape: tuple[int, ...]
    k_shape: tuple[int, ...]
    v_shape: tuple[int, ...]
    arguments: dict


_probed: ContextVar[list[_Call]] = ContextVar("graphattn_probed")


def _probe_attention(module, query, key, value, attention_mask, **arguments):
    _probed.get().append(_Call(module, tuple(query.shape), tuple(key.shape), tuple(value.shape), arguments))
    return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None


def _attention(module, query, key, value, attention_mask, **arguments):
    """transformers' attention function: query `[B, H, T, D]`, key and value `[B, K, T, D]`; returns `[B, T, H, D]`."""
    if attention_mask is not None:
        raise InvalidArgumentError(
            f"an attention mask of shape {tuple(attention_mask.shape)} reached the layer: it attends causally over "
            "each row's own tokens; pass a [batch, tokens] mask of 0 and 1, or none"
        )
    packed = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    out = getattr(module, LAYER)(*packed)
    return out.unflatten(0, (query.shape[0], query.shape[2])), None


AttentionInterface.register(PROBE, _probe_attention)
AttentionInterface.register(IMPLEMENTATION, _attention)


class Binding:
    """One model's attention modules, each with an `Attention` layer that answers for it.

    The model gets private copies of its configs, since transformers reads the attention implementation from a config
    that other models may share.

    Args:
        model: a decoder of transformers, in eval mode.

    Attributes:
        layers: the `Attention` layers by layer index.
        spec: what each of them computes.

    Raises:
        UnsupportedModelError: the model's attention does something this layer does not serve; names it.
    """

    def __init__(self, model: PreTrainedModel):
        if not isinstance(model, PreTrainedModel):
            raise UnsupportedModelError(f"{type(model).__name__} is no transformers PreTrainedModel")
        if any(hasattr(module, LAYER) for module in model.modules()):
            raise UnsupportedModelError(f"{type(model).__name__} is attached already: detach it first")
        _refuse_config(model)
        self.model = model
        self._configs = _private_configs(model)
        self._modules: list[nn.Module] = []
        try:
            calls = self._probe()
            self.spec = _shared_spec(model, calls)
        except BaseException:
            self.detach()
            raise
        spec = self.spec
        for call in calls:
            layer = Attention(
                spec.num_heads, spec.head_dim, spec.scale, spec.num_kv_heads, window=spec.window, softcap=spec.softcap
            )
            call.module.add_module(LAYER, layer)
            self._modules.append(call.module)
        self._implement(IMPLEMENTATION)

    @property
    def layers(self) -> list[Attention]:
        return [getattr(module, LAYER) for module in self._modules]

    def bind(self, cache: KVCache) -> None:
        """Gives every layer its pages."""
        for layer, pages in zip(self.layers, cache.layers, strict=True):
            layer.bind(*pages)

    def detach(self) -> None:
        """Restores the model exactly; does nothing the second time."""
        for module in self._modules:
            delattr(module, LAYER)
        self._modules = []
        for module, original, _ in self._configs:
            module.config = original
        self._configs = []

    def _implement(self, name: str) -> None:
        for _, _, config in self._configs:
            config._attn_implementation = name

    def _probe(self) -> list[_Call]:
        """Runs two tokens through the model and returns what its attention modules asked for, by layer index."""
        self._implement(PROBE)
        ids = torch.zeros(1, 2, dtype=torch.long, device=self.model.device)
        with _recording() as calls, torch.no_grad():
            try:
                self.model(input_ids=ids, position_ids=torch.arange(2, device=ids.device)[None], use_cache=False)
            except GraphattnError:
                raise
            except Exception as error:
                raise UnsupportedModelError(
                    f"{type(self.model).__name__} does not run on packed tokens without a cache of its own: {error}"
                ) from error
        return sorted(calls, key=lambda call: getattr(call.module, "layer_idx", -1))


@contextmanager
def _recording() -> Iterator[list[_Call]]:
    token = _probed.set([])
    try:
        yield _probed.get()
    finally:
        _probed.reset(token)


def _private_configs(model: PreTrainedModel) -> list[tuple[nn.Module, PretrainedConfig, PretrainedConfig]]:
    """Replaces each submodule's config by a copy, one per distinct config; returns (module, original, copy)."""
    memo: dict = {}
    replaced = []
    for module in model.modules():
        original = module.__dict__.get("config")
        if isinstance(original, PretrainedConfig):
            module.config = copy.deepcopy(original, memo)
            replaced.append((module, original, module.config))
    return replaced


def _refuse_config(model: PreTrainedModel) -> None:
    name, config = type(model).__name__, model.config.get_text_config()
    if model.training:
        raise UnsupportedModelError(f"{name} is in training mode: call model.eval() first")
    if config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder: only decoders are served")
    for layer, kind in enumerate(getattr(config, "layer_types", None) or ()):
        if kind in UNSERVED_LAYER_TYPES:
            raise UnsupportedModelError(f"{name}: layer {layer} is {kind}, which is not served")
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if parameters.get("rope_type") in UNSERVED_ROPE_TYPES:
            raise UnsupportedModelError(
                f"{name}: rope type {parameters['rope_type']} takes its frequencies from the longest row of a batch, "
                "so rows would change each other; it is not served"
            )


def _shared_spec(model: PreTrainedModel, calls: list[_Call]) -> AttentionSpec:
    """The one spec of all layers.

    Raises:
        UnsupportedModelError: a layer is missing, called twice, does something unserved, or differs from layer 0.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    indices = [getattr(call.module, "layer_idx", None) for call in calls]
    if indices != list(range(config.num_hidden_layers)):
        raise UnsupportedModelError(
            f"{name}: its attention function was called for layers {indices}, expected each of "
            f"{config.num_hidden_layers} once; it does not go through transformers' attention "
            "interface as a plain decoder"
        )
    layer_types = getattr(config, "layer_types", None)
    specs = []
    for layer, call in enumerate(calls):
        arguments = call.arguments
        for argument, meaning in UNSERVED_ARGUMENTS.items():
            if arguments.get(argument) is not None:
                raise UnsupportedModelError(f"{name}: layer {layer} uses {meaning} ({argument}), which is not served")
        if arguments.get("is_causal") is False or getattr(call.module, "is_causal", True) is False:
            raise UnsupportedModelError(f"{name}: layer {layer} is not causal, which is not served")
        if call.v_shape[3] != call.q_shape[3]:
            raise UnsupportedModelError(
                f"{name}: layer {layer} has values of width {call.v_shape[3]} under keys of width {call.q_shape[3]}, "
                "which is not served"
            )
        window = arguments.get("sliding_window")
        if layer_types and layer_types[layer] == "sliding_attention" and window is None:
            raise UnsupportedModelError(f"{name}: layer {layer} slides by its mask alone, which is not served")
        spec = AttentionSpec(
            num_heads=call.q_shape[1],
            num_kv_heads=call.k_shape[1],
            head_dim=call.q_shape[3],
            scale=arguments.get("scaling"),
            window=window,
            softcap=arguments.get("softcap"),
        )
        if specs and spec != specs[0]:
            raise UnsupportedModelError(
                f"{name}: layer {layer} is {spec}, layer 0 is {specs[0]}; layers that differ are not served"
            )
        specs.append(spec)
    return specs[0]
