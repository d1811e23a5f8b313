"""Puts an `Attention` layer behind every attention module of one transformers model, and takes it out again."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from ..cache import KVCache
from ..errors import InvalidArgumentError, UnsupportedModelError
from ..layer import Attention
from ..rope import LengthRule, Rotary
from ..scales import KVScales
from ..spec import AttentionSpec, CacheSpec
from .load import max_positions
from .merge import MergedProjections
from .oracle import EAGER, Oracle
from .probe import (
    IMPLEMENTATION,
    PROBE,
    PROBE_UNMASKED,
    Call,
    layer_specs,
    probe,
    refuse_config,
    refuse_positions_by_place,
    takes_positions_by_place,
)
from .rotary import RotaryTakeover
from .widths import widened

LAYER = "graphattn"  # name of the submodule that each attention module gets


def _attention(module, query, key, value, attention_mask, **arguments):
    """transformers' attention function: query `[B, H, T, D]`, key and value `[B, K, T, D]`; returns `[B, T, H, D]`."""
    if attention_mask is not None:
        raise InvalidArgumentError(
            f"an attention mask of shape {tuple(attention_mask.shape)} reached the layer: it attends causally over "
            "each row's own tokens; pass a [batch, tokens] mask of 0 and 1, or none"
        )
    layer = getattr(module, LAYER, None)
    if layer is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} has attn_implementation={IMPLEMENTATION!r} and was not attached (part of a model "
            "that is, or built from its config): attach it, or set another implementation"
        )
    width = layer.spec.head_dim
    packed = (widened(tensor.transpose(1, 2).flatten(0, 1), width) for tensor in (query, key, value))
    out = layer(*packed)[..., : value.shape[3]]
    return out.unflatten(0, (query.shape[0], query.shape[2])), None


# No mask is registered under this name, so transformers builds none and drops what it is given: callers read it before.
AttentionInterface.register(IMPLEMENTATION, _attention)


class Binding:
    """One model's attention modules, each with an `Attention` layer that answers for it.

    The model gets private copies of its configs, since transformers reads the attention implementation from a config
    that other models may share.

    Args:
        model: a decoder of transformers, in eval mode.
        packs: whether tokens of several requests will share a row, at positions that are those of their slots. Then
            the layers also take over norm and rotation, and projections of one input are merged.
        checks: whether to record what transformers' eager attention computes, to be compared with.

    Attributes:
        model: the model.
        layers: the `Attention` layers by layer index.
        groups: what layers compute, in the order in which the first layer of each does; `layer.group` counts them.
        rotary, merged: what was taken over and merged; None unless it packs.
        widths: by group, of the model's own heads, of queries and of values, where our layers have wider ones; else
            None.
        oracle: what was recorded, until it was compared with; None unless it checks.

    Raises:
        UnsupportedModelError: the model's attention does something this layer does not serve; names it.
    """

    def __init__(self, model: PreTrainedModel, *, packs: bool, checks: bool = False):
        if not isinstance(model, PreTrainedModel):
            raise UnsupportedModelError(f"{type(model).__name__} is no transformers PreTrainedModel")
        if any(hasattr(module, LAYER) for module in model.modules()):
            raise UnsupportedModelError(
                f"{type(model).__name__} is attached already: detach it first (graphattn.hf.detach(model), or close() "
                "of the LLM it runs in)"
            )
        refuse_config(model, packs=packs)
        self.model = model
        self.rotary: RotaryTakeover | None = None
        self.merged: MergedProjections | None = None
        self.oracle: Oracle | None = None
        self._configs = _private_configs(model)
        self._modules: list[nn.Module] = []
        try:
            self._implement(PROBE)
            calls = probe(model)
            specs = layer_specs(model, calls)
            self.groups = tuple(dict.fromkeys(specs))
            self.widths = tuple(_widths(calls[specs.index(spec)], spec) for spec in self.groups)
            rotaries: list[Rotary | None] = [None] * len(calls)
            if packs:
                self._implement(PROBE_UNMASKED)
                refuse_positions_by_place(model)
                self.rotary = RotaryTakeover(model, [call.module for call in calls])
                rotaries = self.rotary.rotaries
            if checks:
                self._implement(PROBE_UNMASKED)
                is_ragged = packs or not takes_positions_by_place(model)
                self._implement(EAGER)
                self.oracle = Oracle(model, [call.module for call in calls], self._longest_alike, is_ragged=is_ragged)
            if packs:
                self.merged = MergedProjections(model)
            for call, spec, rotary in zip(calls, specs, rotaries, strict=True):
                self._add_layer(call.module, spec, rotary)
            self._implement(IMPLEMENTATION)
        except BaseException:
            self.detach()
            raise

    @property
    def length_rule(self) -> LengthRule | None:
        """How the model's rotary frequencies depend on a request's length; None if they do not."""
        return None if self.rotary is None else self.rotary.length_rule

    @property
    def _longest_alike(self) -> int | None:
        """Tokens of a row up to which its length changes no frequencies; None for no limit."""
        limits = (max_positions(self.model), self.length_rule and self.length_rule.threshold)
        return min((limit for limit in limits if limit), default=None)

    @property
    def layers(self) -> list[Attention]:
        return [getattr(module, LAYER) for module in self._modules]

    @property
    def is_training(self) -> bool:
        """Whether some attention module would drop weights out, which ours never do."""
        return any(module.training for module in self._modules)

    def layers_of(self, group: int) -> list[Attention]:
        """The layers of a group, in order."""
        return [layer for layer in self.layers if layer.group == group]

    def allocate(self, caches: Sequence[CacheSpec]) -> list[KVCache]:
        """A cache for the layers of each group, of which every layer is given its pages."""
        device = self.model.device
        made = [
            KVCache(len(self.layers_of(group)), spec, cache, device)
            for group, (spec, cache) in enumerate(zip(self.groups, caches, strict=True))
        ]
        for group, cache in enumerate(made):
            for layer, pages in zip(self.layers_of(group), cache.layers, strict=True):
                layer.bind(*pages)
        return made

    def set_scales(self, scales: KVScales) -> None:
        """Gives every layer its scales of an fp8 cache, in place where it has some.

        Raises:
            InvalidArgumentError: they are for other layers or heads; nothing was changed.
        """
        layers = self.layers
        wanted = (len(layers), *{layer.spec.num_kv_heads for layer in layers})
        if tuple(scales.k.shape) != wanted:
            raise InvalidArgumentError(
                f"kv_scales are for {tuple(scales.k.shape)} layers and kv heads, the model has {wanted}: calibrate "
                "this model"
            )
        for layer, k_K, v_K in zip(layers, scales.k, scales.v, strict=True):
            layer.set_scales(k_K, v_K)

    def unbind(self) -> None:
        """Has every layer let go of its pages."""
        for layer in self.layers:
            layer.unbind()

    @property
    def implementation(self) -> str:
        """The attention implementation that the model runs under now."""
        return self.model.config.get_text_config()._attn_implementation

    def detach(self) -> None:
        """Restores the model exactly; does nothing the second time."""
        for module in self._modules:
            delattr(module, LAYER)
        self._modules = []
        for module, original, _ in self._configs:
            module.config = original
        self._configs = []
        if self.rotary is not None:
            self.rotary.detach()
        if self.merged is not None:
            self.merged.detach()

    def _add_layer(self, module: nn.Module, spec: AttentionSpec, rotary: Rotary | None) -> None:
        options = {"window": spec.window, "softcap": spec.softcap, "variant": spec.variant, "rotary": rotary}
        group, sizes = self.groups.index(spec), (spec.num_heads, spec.head_dim, spec.scale, spec.num_kv_heads)
        layer = Attention(*sizes, group=group, **options)
        module.add_module(LAYER, layer)
        self._modules.append(module)

    def _implement(self, name: str) -> None:
        for _, _, config in self._configs:
            config._attn_implementation = name


def _widths(call: Call, spec: AttentionSpec) -> tuple[int, int] | None:
    widths = (call.query.shape[3], call.value.shape[3])
    return None if set(widths) == {spec.head_dim} else widths


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
