"""The torch op through which every layer attends, and the slot that says under which plan.

`torch.ops.graphattn.attend(q, k, v, k_cache, v_cache, group) -> out` appends and attends in one opaque call, so a
compiled step has no graph break (FlashInfer's own calls have one each: flashinfer-ai/flashinfer#2733) and no copy of
the cache (an append in traced code costs one). It takes no layer number, so one compiled layer serves all, and one page
for the whole cache (`cache.all_pages`), so a compiled layer serves caches of any size.
`rotary_attend` takes queries and keys as they leave their projections, and norms and rotates them too. `variant_attend`
is either for layers with a variant: it takes the layer's tensors, and the digest of the variant that they are for.
`scales` of any is `[2, kv heads]` float32, for a cache of fp8: a tensor and no number, so that neither what is compiled
nor what is captured depends on it. `layer` says what the layer computes (`AttentionSpec.told`), to be held against the
plan; None where the caller knows.

`torch.ops.graphattn.linear(x, weight, ...) -> out` is a linear layer with the norm before it, and the gate and residual
after it, by one kernel of ours where rows are few. How many they are is looked at in each call, so one compiled step
serves every bucket. `linear_pair` is two of them with a residual and a norm between, which are one pass where rows are
many.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from .backends.base import Plan
from .cache import all_pages
from .errors import InvalidArgumentError, NoActivePlanError
from .rope import Rotary

_active: ContextVar[Sequence[Plan] | None] = ContextVar("graphattn_active_plans", default=None)


@contextmanager
def active_plans(plans: Sequence[Plan]) -> Iterator[None]:
    """Makes `plans[group]` what the op runs under, and restores what was there before; engines may interleave."""
    token = _active.set(plans)
    try:
        yield
    finally:
        _active.reset(token)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    group: int,
    rotary: Rotary | None = None,
    variant: str | None = None,
    values: Sequence[Tensor] = (),
    scales: Tensor | None = None,
    layer: str | None = None,
) -> Tensor:
    plans = _active.get()
    if plans is None:
        raise NoActivePlanError(
            "attention ran outside a planned step: call the model through LLM, DecodeRunner or graphattn.hf.attach, "
            "or wrap the call in graphattn.ops.active_plans(...)"
        )
    if k_cache.dim() != 4:
        raise NoActivePlanError("the Attention layer has no cache: call layer.bind(k_cache, v_cache) first")
    if not q.dtype == k.dtype == v.dtype == (k_cache.dtype if scales is None else q.dtype):
        raise InvalidArgumentError(
            f"q is {q.dtype}, k {k.dtype}, v {v.dtype}, the cache {k_cache.dtype}: give all of them one dtype"
        )
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise InvalidArgumentError("attention on pages has no gradient: wrap the step in torch.no_grad()")
    if not 0 <= group < len(plans):
        raise InvalidArgumentError(f"group {group}: the step has plans of groups 0 to {len(plans) - 1}")
    plan = plans[group]
    if k_cache.shape[1:] != plan.page_shape:
        raise InvalidArgumentError(
            f"the cache has pages of {list(k_cache.shape[1:])}, the plan was made for {list(plan.page_shape)}: "
            "give both the same CacheSpec (page_size and layout)"
        )
    spec = plan.spec
    kv_heads = (spec.num_kv_heads, spec.head_dim)
    if q.shape[1:] != (spec.num_heads, spec.head_dim) or not k.shape[1:] == v.shape[1:] == kv_heads:
        raise InvalidArgumentError(
            f"q is {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}; the plan of group {group} was made for "
            f"{spec.num_heads} query heads and {spec.num_kv_heads} kv heads of {spec.head_dim}: give layers with other "
            "heads a group of their own"
        )
    if layer is not None and layer != spec.told:
        raise InvalidArgumentError(
            f"the layer computes {layer}, the plan of group {group} was made for {spec.told}: give Planner the layer's "
            "spec, and layers that compute another thing groups of their own (Attention(group=...))"
        )
    planned = None if spec.variant is None else spec.variant.digest
    if variant != planned:
        raise InvalidArgumentError(
            f"the layer has variant {variant}, the plan of group {group} was made for {planned}: give Planner the "
            "layer's spec, and layers with other variants groups of their own"
        )
    if spec.variant is not None:
        spec.variant.check(values, q.device)
        values = [value.detach() for value in values]
    return plan.attend(q, k, v, all_pages(k_cache), all_pages(v_cache), rotary, values, scales)


def _rotary_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    group: int,
    inv_freq: Tensor,
    scaling: float,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    threshold: int,
    scales: Tensor | None = None,
    layer: str | None = None,
) -> Tensor:
    rotary = Rotary(inv_freq, scaling, q_weight, k_weight, eps, threshold)
    return _attend(q, k, v, k_cache, v_cache, group, rotary, scales=scales, layer=layer)


def _plain_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    group: int,
    scales: Tensor | None = None,
    layer: str | None = None,
) -> Tensor:
    return _attend(q, k, v, k_cache, v_cache, group, scales=scales, layer=layer)


def _variant_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    group: int,
    variant: str,
    values: Sequence[Tensor],
    inv_freq: Tensor | None = None,
    scaling: float = 1.0,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
    threshold: int = 0,
    scales: Tensor | None = None,
    layer: str | None = None,
) -> Tensor:
    rotary = None if inv_freq is None else Rotary(inv_freq, scaling, q_weight, k_weight, eps, threshold)
    return _attend(q, k, v, k_cache, v_cache, group, rotary, variant, values, scales, layer)


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    if _is_ours(x, weight):
        from .kernels.linear import linear

        if norm is not None and x.dtype == torch.float16 and x.shape[:-1].numel() > 1:
            x, norm = _normed(x, norm, eps), None  # x * norm, not yet scaled, may exceed float16
        return linear(x, weight, bias, norm_K=norm, eps=eps, gated=gated, residual=residual)
    if norm is not None:
        x = _normed(x, norm, eps)
    out = F.linear(x, weight, bias)
    if gated and _has_kernels(x):
        from .kernels.gate import gate

        out = gate(out)
    elif gated:
        first, second = out.chunk(2, -1)
        out = F.silu(first) * second
    return out if residual is None else out + residual


def _linear_pair(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Tensor,
    eps: float,
    next_weight: Tensor,
    next_bias: Tensor | None,
    gated: bool,
) -> tuple[Tensor, Tensor]:
    if _has_kernels(x) and not _is_ours(x, weight):
        from .kernels.norm import add_norm

        total, normed = add_norm(F.linear(x, weight, bias), residual, norm, eps)
        return total, _linear(normed, next_weight, next_bias, gated=gated)
    total = _linear(x, weight, bias, residual=residual)
    return total, _linear(total, next_weight, next_bias, norm, eps, gated)


def _normed(x: Tensor, norm: Tensor, eps: float) -> Tensor:
    if not _has_kernels(x):
        return F.rms_norm(x, norm.shape, norm, eps)
    from .kernels.norm import rms_norm

    return rms_norm(x, norm, eps)


def _has_kernels(x: Tensor) -> bool:
    return x.is_cuda and find_spec("triton") is not None


def _is_ours(x: Tensor, weight: Tensor) -> bool:
    if not _has_kernels(x):
        return False
    from .kernels.linear import is_faster, suits

    return suits(weight) and is_faster(x.shape[:-1].numel(), weight)


def _linear_fake(x: Tensor, weight: Tensor, bias=None, norm=None, eps=0.0, gated=False, residual=None) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(weight) // 2 if gated else len(weight)))


def _linear_pair_fake(
    x: Tensor, residual: Tensor, weight: Tensor, bias, norm, eps, next_weight, next_bias, gated
) -> tuple[Tensor, Tensor]:
    total = x.new_empty((*x.shape[:-1], len(weight)))
    return total, _linear_fake(total, next_weight, gated=gated)


def _attend_fake(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, group: int, *others, **options
) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


# Library.define costs 2-3 us a call where torch.library.custom_op costs 20-28.
_library = torch.library.Library("graphattn", "DEF")
_ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, int group"
_ROTARY = (
    "Tensor inv_freq, float scaling, Tensor? q_weight, Tensor? k_weight, float eps, int threshold, "
    "Tensor? scales=None, str? layer=None"
)
_VARIANT = (
    "str variant, Tensor[] values, Tensor? inv_freq=None, float scaling=1.0, Tensor? q_weight=None, "
    "Tensor? k_weight=None, float eps=0.0, int threshold=0, Tensor? scales=None, str? layer=None"
)
_LINEAR = (
    "Tensor x, Tensor weight, Tensor? bias=None, Tensor? norm=None, float eps=0.0, bool gated=False, "
    "Tensor? residual=None"
)
_LINEAR_PAIR = (
    "Tensor x, Tensor residual, Tensor weight, Tensor? bias, Tensor norm, float eps, Tensor next_weight, "
    "Tensor? next_bias, bool gated"
)
for _name, _schema, _function, _fake in (
    ("attend", f"({_ARGUMENTS}, Tensor? scales=None, str? layer=None) -> Tensor", _plain_attend, _attend_fake),
    ("rotary_attend", f"({_ARGUMENTS}, {_ROTARY}) -> Tensor", _rotary_attend, _attend_fake),
    ("variant_attend", f"({_ARGUMENTS}, {_VARIANT}) -> Tensor", _variant_attend, _attend_fake),
    ("linear", f"({_LINEAR}) -> Tensor", _linear, _linear_fake),
    ("linear_pair", f"({_LINEAR_PAIR}) -> (Tensor, Tensor)", _linear_pair, _linear_pair_fake),
):
    _library.define(f"{_name}{_schema}")
    _library.impl(_name, _function, "CPU")
    _library.impl(_name, _function, "CUDA")
    torch.library.register_fake(f"graphattn::{_name}", _fake, lib=_library)
