"""Our decode kernel, which needs no plan, beside FlashInfer's prefill.

Suffix letters: N tokens (one a row), H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..batch import Batch
from ..kernels import has_gluon
from ..padded import PaddedBatch
from ..rope import Rotary
from ..spec import AttentionSpec, CacheSpec
from ..state import StepState
from .base import Plan, PrefillPlan, check_step
from .flashinfer import FlashInferBackend

HEAD_DIMS = (64, 128, 256)
MAX_GROUP_SIZE = 16


class FusedBackend:
    """Norm, rotation, append and attention of a decode step in one kernel; prefill by FlashInfer."""

    name = "fused"
    capturable = True

    def __init__(self, group: int, spec: AttentionSpec, cache: CacheSpec, device: torch.device):
        self._group, self._spec, self._cache = group, spec, cache
        self._prefill = FlashInferBackend(group, spec, cache, device)
        self._workspaces: WeakKeyDictionary[StepState, tuple[Tensor, Tensor, Tensor]] = WeakKeyDictionary()

    @staticmethod
    def rejections(spec: AttentionSpec, cache: CacheSpec, device: torch.device) -> list[str]:
        reasons = [f"its prefill: {reason}" for reason in FlashInferBackend.rejections(spec, cache, device)]
        if spec.variant is not None:
            reasons.append(f"variant {spec.variant.name}: its decode kernel computes none")
        if spec.pos_encoding != "none":
            reasons.append(f"pos_encoding {spec.pos_encoding}: its decode kernel caches keys that were turned")
        if spec.head_dim not in HEAD_DIMS:
            reasons.append(f"head_dim {spec.head_dim}: its decode kernel is for {', '.join(map(str, HEAD_DIMS))}")
        if not has_gluon():
            reasons.append("its decode kernel is written in Gluon, which Triton has from 3.6")
        is_there = device.type == "cuda" and torch.cuda.is_available()
        if is_there and torch.cuda.get_device_capability(device) < (8, 0):
            reasons.append("its decode kernel copies asynchronously, which takes compute capability 8.0")
        if spec.group_size > MAX_GROUP_SIZE:
            reasons.append(f"{spec.group_size} query heads share a kv head: its decode kernel takes {MAX_GROUP_SIZE}")
        return reasons

    def decode_plan(self, state: StepState, bucket: int) -> Plan:
        if state not in self._workspaces:
            self._workspaces[state] = allocate(self._spec, state)
        return DecodePlan(self._group, self._spec, self._cache, bucket, self._workspaces[state])

    def prefill_plan(self, kernel: str = "auto", max_tokens: int = 0) -> PrefillPlan:
        return self._prefill.prefill_plan(kernel, max_tokens)

    def padded_plan(self, padded: PaddedBatch, kernel: str = "auto") -> PrefillPlan:
        return self._prefill.padded_plan(padded, kernel)

    @property
    def num_bytes(self) -> int:
        return self._prefill.num_bytes + sum(buffer.nbytes for each in self._workspaces.values() for buffer in each)


def allocate(spec: AttentionSpec, state: StepState) -> tuple[Tensor, Tensor, Tensor]:
    """Parts of rows that are split, their maxima and sums, and how many parts of each row and kv head are done."""
    parts = max(rows * split(rows, spec).splits for rows in range(1, state.max_batch + 1))
    floats = {"dtype": torch.float32, "device": state.device}
    with torch.inference_mode(False):
        return (
            torch.empty(parts * spec.num_heads * spec.head_dim, **floats),
            torch.empty(parts * spec.num_heads * 2, **floats),
            torch.zeros(state.max_batch * spec.num_kv_heads, dtype=torch.int32, device=state.device),
        )


class Split(NamedTuple):
    """How rows are split into chunks, one program each per kv head, and what a program is.

    Attributes:
        splits: chunks of a row at most.
        near: chunks of a row, as long as that makes none longer than `whole`.
        whole, fine: tokens; a chunk that would be longer than `whole` is `fine` long, if `splits` are enough for that.
        warps: of a program, each with tokens of its own.
        stages: blocks of a program that are on their way at once.
        is_ordered: whether the longest rows begin first, so that none is left over when the others have ended.
    """

    splits: int
    near: int
    whole: int
    fine: int
    warps: int
    stages: int
    is_ordered: bool


def split(rows: int, spec: AttentionSpec) -> Split:
    """The split for so many rows.

    Few programs leave most of the device idle, so short rows are split too; many fill it, and only rows much longer
    than the others gain; docs/design-notes.md says what was tried.
    """
    programs = rows * spec.num_kv_heads
    bits = max(1, (programs * spec.head_dim // 128 - 1).bit_length())  # what they read counts, in programs of 128
    near = max(1, 256 >> bits)
    if near >= 32:
        return Split(near, near // 2, whole=256, fine=128, warps=4, stages=2, is_ordered=False)
    splits = 16 if programs <= 1024 else 8
    is_full, is_wide = bits > 8, spec.head_dim > 128
    stages = 2 if bits < 8 or (is_wide and not is_full) else 3
    warps = 2 if is_full else 4
    return Split(splits, near, whole=2048, fine=1024, warps=warps, stages=stages, is_ordered=bits >= 8)


class DecodePlan:
    """A bucket's launch; nothing in it depends on the rows, so nothing is ever planned."""

    def __init__(
        self,
        group: int,
        spec: AttentionSpec,
        cache: CacheSpec,
        bucket: int,
        workspace: tuple[Tensor, Tensor, Tensor],
    ):
        self._group, self._cache, self._workspace = group, cache, workspace
        self.page_shape, self.spec = cache.page_shape(spec), spec
        self._split = split(bucket, spec)
        if cache.is_fp8:  # as many bytes are to be on their way
            self._split = self._split._replace(stages=2 * self._split.stages)

    @property
    def signature(self) -> tuple:
        return self._split

    def plan(self, batch: Batch) -> None:
        self._csr, self._order_B = batch.groups[self._group], batch.order_B

    def attend(
        self,
        q_NHD: Tensor,
        k_NKD: Tensor,
        v_NKD: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        rotary: Rotary | None = None,
        values: Sequence[Tensor] = (),
        scales_2K: Tensor | None = None,
    ) -> Tensor:
        check_step(self._cache, len(self._csr.last_page_len_B), q_NHD, k_cache, scales_2K)
        from ..kernels.chain import is_chained
        from ..kernels.decode import decode_kernel

        spec, csr = self.spec, self._csr
        q, k, v = (_heads_together(tensor) for tensor in (q_NHD, k_NKD, v_NKD))
        out_NHD = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        slot, head = (1, 2) if self._cache.layout == "NHD" else (2, 1)
        if scales_2K is not None:  # pairs of neighbours
            k_cache, v_cache = k_cache.view(torch.int16), v_cache.view(torch.int16)
        has_norm = rotary is not None and rotary.q_weight is not None
        chained, depends = is_chained(q.device), rotary is not None and rotary.depends_on_length
        with torch.cuda.device_of(q):  # Triton launches on the current device
            decode_kernel[(spec.num_kv_heads, len(q), self._split.splits)](
                q,
                k,
                v,
                k_cache,
                v_cache,
                csr.indptr_B1,
                csr.indices_P,
                csr.last_page_len_B,
                self._order_B if self._split.is_ordered else None,
                out_NHD,
                *self._workspace,
                None if rotary is None else rotary.inv_freq,
                rotary.q_weight if has_norm else None,
                rotary.k_weight if has_norm else None,
                scales_2K,
                q.stride(0),
                k.stride(0),
                v.stride(0),
                k_cache.stride(0),
                k_cache.stride(slot),
                k_cache.stride(head),
                spec.scale,
                spec.softcap or 0.0,
                spec.window or 0,
                0 if rotary is None else rotary.threshold,
                len(rotary.inv_freq) if depends else 1,
                1.0 if rotary is None else rotary.scaling,
                0.0 if rotary is None else rotary.eps,
                GROUP=spec.group_size,
                HEADS=1 << (spec.group_size - 1).bit_length(),
                HALF=spec.head_dim // 2,
                TURNED=spec.head_dim // 2 if rotary is None else rotary.num_turned,
                DEPENDS=depends,
                PAGE=self._cache.page_size,
                WARPS=self._split.warps,
                STAGES=self._split.stages,
                SPLITS=self._split.splits,
                NEAR=self._split.near,
                WHOLE=self._split.whole,
                FINE=self._split.fine,
                HAS_WINDOW=spec.window is not None,
                HAS_SOFTCAP=spec.softcap is not None,
                HAS_ROTARY=rotary is not None,
                HAS_NORM=has_norm,
                FP8=scales_2K is not None,
                CHAINED=chained,
                num_warps=self._split.warps,
                launch_pdl=chained,
            )
        return out_NHD


def _heads_together(x_NHD: Tensor) -> Tensor:
    """Rows may lie apart (columns of a merged projection), a row's heads may not."""
    return x_NHD if x_NHD.stride()[1:] == (x_NHD.shape[2], 1) else x_NHD.contiguous()
