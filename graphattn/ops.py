"""The torch op through which every layer attends, and the slot that says under which plan.

`torch.ops.graphattn.attend(q, k, v, k_cache, v_cache, group) -> out` appends and attends in one opaque call, so a
compiled step has no graph break (FlashInfer's own calls have one each: flashinfer-ai/flashinfer#2733) and no copy of
the cache (an append in traced code costs one). It takes no layer number, so one compiled layer serves all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from .backends.base import Plan
from .errors import InvalidArgumentError, NoActivePlanError

_active: ContextVar[Sequence[Plan] | None] = ContextVar("graphattn_active_plans", default=None)


@contextmanager
def active_plans(plans: Sequence[Plan]) -> Iterator[None]:
    """Makes `plans[group]` what the op runs under, and restores what was there before; engines may interleave."""
    token = _active.set(plans)
    try:
        yield
    finally:
        _active.reset(token)


def _attend(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, group: int) -> Tensor:
    plans = _active.get()
    if plans is None:
        raise NoActivePlanError(
            "attention ran outside a planned step: call the model through LLM, DecodeRunner or graphattn.hf.attach, "
            "or wrap the call in graphattn.ops.active_plans(...)"
        )
    if k_cache.dim() != 4:
        raise NoActivePlanError("the Attention layer has no cache: call layer.bind(k_cache, v_cache) first")
    if not q.dtype == k.dtype == v.dtype == k_cache.dtype:
        raise InvalidArgumentError(
            f"q is {q.dtype}, k {k.dtype}, v {v.dtype}, the cache {k_cache.dtype}: give all of them one dtype"
        )
    plan = plans[group]
    if k_cache.shape[1:] != plan.page_shape:
        raise InvalidArgumentError(
            f"the cache has pages of {list(k_cache.shape[1:])}, the plan was made for {list(plan.page_shape)}: "
            "give both the same CacheSpec (page_size and layout)"
        )
    return plan.attend(q, k, v, k_cache, v_cache)


def _attend_fake(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, group: int) -> Tensor:
    return q.new_empty(q.shape)


# Library.define costs 2-3 us a call where torch.library.custom_op costs 20-28.
_library = torch.library.Library("graphattn", "DEF")
_library.define("attend(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, int group) -> Tensor")
_library.impl("attend", _attend, "CPU")
_library.impl("attend", _attend, "CUDA")
torch.library.register_fake("graphattn::attend", _attend_fake, lib=_library)
