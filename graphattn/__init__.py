"""Paged attention on FlashInfer for torch.compile and CUDA graphs.

Names are loaded when they are first used: importing this package imports neither FlashInfer, transformers, Triton nor
NVML, and leaves CUDA alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graphattn import errors, hf, memory, variants
    from graphattn.batch import ragged_batch
    from graphattn.buckets import BucketLadder
    from graphattn.cache import KVCache
    from graphattn.choice import LadderChoice, best_ladder, best_ladders
    from graphattn.engine.llm import LLM
    from graphattn.engine.request import Delta, RequestOutput
    from graphattn.errors import (
        BackendError,
        BucketError,
        CaptureError,
        CaptureMemoryError,
        DeviceMemoryError,
        GraphattnError,
        InvalidArgumentError,
        InvalidRequestError,
        MemoryLeakError,
        ModelCheckError,
        ModelFileError,
        NoActivePlanError,
        NotANumberError,
        OutOfPagesError,
        UnsupportedModelError,
    )
    from graphattn.groups import GroupPools
    from graphattn.hf.calibrate import calibrate
    from graphattn.layer import Attention
    from graphattn.ledger import Ledger
    from graphattn.ops import active_plans
    from graphattn.pages import BlockTable, PagePool
    from graphattn.plan import Planner
    from graphattn.prefill_runner import PrefillRunner
    from graphattn.profile import BackendProfile, BucketProfile, CaptureProfile, StartCosts
    from graphattn.rope import Rotary
    from graphattn.runner import DecodeRunner
    from graphattn.sampling import SamplingParams
    from graphattn.scales import KVScales
    from graphattn.spans import BackendSpan, StepTime, best_spans
    from graphattn.spec import AttentionSpec, CacheSpec
    from graphattn.state import StepState
    from graphattn.traffic import Traffic

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "Attention",
    "AttentionSpec",
    "BackendError",
    "BackendProfile",
    "BackendSpan",
    "BlockTable",
    "BucketError",
    "BucketLadder",
    "BucketProfile",
    "CacheSpec",
    "CaptureError",
    "CaptureMemoryError",
    "CaptureProfile",
    "DecodeRunner",
    "Delta",
    "DeviceMemoryError",
    "GraphattnError",
    "GroupPools",
    "InvalidArgumentError",
    "InvalidRequestError",
    "KVCache",
    "KVScales",
    "LadderChoice",
    "Ledger",
    "MemoryLeakError",
    "ModelCheckError",
    "ModelFileError",
    "NoActivePlanError",
    "NotANumberError",
    "OutOfPagesError",
    "PagePool",
    "Planner",
    "PrefillRunner",
    "RequestOutput",
    "Rotary",
    "SamplingParams",
    "StartCosts",
    "StepState",
    "StepTime",
    "Traffic",
    "UnsupportedModelError",
    "__version__",
    "active_plans",
    "best_ladder",
    "best_ladders",
    "best_spans",
    "calibrate",
    "errors",
    "hf",
    "memory",
    "ragged_batch",
    "variants",
]

_SUBMODULES = frozenset({"errors", "hf", "memory", "variants"})

_MODULE_OF = {
    "LLM": "engine.llm",
    "Attention": "layer",
    "AttentionSpec": "spec",
    "BackendError": "errors",
    "BackendProfile": "profile",
    "BackendSpan": "spans",
    "BlockTable": "pages",
    "BucketError": "errors",
    "BucketLadder": "buckets",
    "BucketProfile": "profile",
    "CacheSpec": "spec",
    "CaptureError": "errors",
    "CaptureMemoryError": "errors",
    "CaptureProfile": "profile",
    "DecodeRunner": "runner",
    "Delta": "engine.request",
    "DeviceMemoryError": "errors",
    "GraphattnError": "errors",
    "GroupPools": "groups",
    "InvalidArgumentError": "errors",
    "InvalidRequestError": "errors",
    "KVCache": "cache",
    "KVScales": "scales",
    "LadderChoice": "choice",
    "Ledger": "ledger",
    "MemoryLeakError": "errors",
    "ModelCheckError": "errors",
    "ModelFileError": "errors",
    "NoActivePlanError": "errors",
    "NotANumberError": "errors",
    "OutOfPagesError": "errors",
    "PagePool": "pages",
    "Planner": "plan",
    "PrefillRunner": "prefill_runner",
    "RequestOutput": "engine.request",
    "Rotary": "rope",
    "SamplingParams": "sampling",
    "StartCosts": "profile",
    "StepState": "state",
    "StepTime": "spans",
    "Traffic": "traffic",
    "UnsupportedModelError": "errors",
    "active_plans": "ops",
    "best_ladder": "choice",
    "best_ladders": "choice",
    "best_spans": "spans",
    "calibrate": "hf.calibrate",
    "ragged_batch": "batch",
}


def __getattr__(name: str) -> object:
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
