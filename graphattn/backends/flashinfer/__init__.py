"""FlashInfer's paged kernels: tensor-core decode inside CUDA graphs, and ragged prefill there and outside them."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from ...errors import BackendError
from ...padded import PaddedBatch
from ...spec import AttentionSpec, CacheSpec
from ...state import StepState
from ..base import Plan, PrefillPlan, fp8_rejections

VERSION = "0.7.2.post1"
HEAD_DIMS = (64, 128, 256)


class FlashInferBackend:
    """One layer group on FlashInfer; every wrapper's workspace is as large as its plans need and no larger."""

    name = "flashinfer"
    capturable = True

    def __init__(self, group: int, spec: AttentionSpec, cache: CacheSpec, device: torch.device):
        from .workspace import Workspace

        self._group, self._spec, self._cache = group, spec, cache
        self._decode_workspace, self._prefill_workspace = Workspace(device), Workspace(device)

    @staticmethod
    def rejections(spec: AttentionSpec, cache: CacheSpec, device: torch.device) -> list[str]:
        reasons = []
        if device.type != "cuda":
            reasons.append(f"it needs a CUDA device, this is {device}")
        elif find_spec("flashinfer") is None:
            reasons.append('it is not installed: pip install "graphattn[cuda]"')
        else:
            try:
                from . import private  # noqa: F401  refuses versions it was not written for
            except BackendError as error:
                reasons.append(str(error))
            except Exception as error:  # a broken install raises whatever its libraries do
                reasons.append(f"importing it failed: {type(error).__name__}: {error}")
        if spec.variant is not None and spec.pos_encoding != "none":
            reasons.append(
                f"variant {spec.variant.name} with pos_encoding {spec.pos_encoding}: rotate before the layer"
            )
        if find_spec("triton") is None:
            reasons.append("Triton is not installed: pip install triton (torch's CUDA builds bring it)")
        if spec.head_dim not in HEAD_DIMS:
            reasons.append(f"head_dim {spec.head_dim}: it has kernels for {', '.join(map(str, HEAD_DIMS))}")
        if cache.query_dtype not in (torch.bfloat16, torch.float16):
            what = "query_dtype" if cache.is_fp8 else "dtype"
            reasons.append(f"{what} {cache.query_dtype}: it has kernels for torch.bfloat16 and torch.float16")
        if cache.is_fp8 and spec.pos_encoding != "none":
            reasons.append(
                f"dtype {cache.dtype}: it turns no fp8 keys, as pos_encoding {spec.pos_encoding} would have it"
            )
        return reasons + fp8_rejections(cache, device)

    def decode_plan(self, state: StepState, bucket: int) -> Plan:
        from .decode import DecodePlan

        csr, max_pages = state.csr(bucket, self._group), state.max_pages_per_row
        return DecodePlan(self._group, self._spec, self._cache, csr, max_pages, self._decode_workspace)

    def prefill_plan(self, kernel: str = "auto", max_tokens: int = 0) -> PrefillPlan:
        from .prefill import RaggedPlan

        return RaggedPlan(self._group, self._spec, self._cache, self._prefill_workspace, kernel, max_tokens)

    def padded_plan(self, padded: PaddedBatch, kernel: str = "auto") -> PrefillPlan:
        from .padded import PaddedPlan

        return PaddedPlan(self._group, self._spec, self._cache, padded, self._prefill_workspace, kernel)

    @property
    def num_bytes(self) -> int:
        return self._decode_workspace.num_bytes + self._prefill_workspace.num_bytes
