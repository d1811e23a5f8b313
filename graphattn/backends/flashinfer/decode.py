"""Batched decode over pages, one wrapper per bucket, its page tables at fixed addresses."""

from __future__ import annotations

import torch
from flashinfer import BatchDecodeWithPagedKVCacheWrapper
from flashinfer.decode import fast_decode_plan
from torch import Tensor

from ...batch import Batch
from ...spec import AttentionSpec, CacheSpec
from ...state import StepState
from . import private
from .paged import PagedPlan
from .workspace import Workspace

PAGES_AHEAD = 8  # a plan looks this many pages ahead at most, and an eighth of the row's


class DecodePlan(PagedPlan):
    """A bucket's tensor-core decode, split over the context.

    The kernel reads lengths and pages from the state's device buffers; the host plan only splits the work, and in graph
    mode its `plan_info` depends on the bucket alone. With one query token a row, a plan for more pages than a row has
    is right too: chunks beyond its length come out empty (prefill.cuh clamps them to the length it reads). So a plan
    looks ahead, and is kept until a row outgrows it or another row, shorter than was planned for, takes its place.
    """

    def __init__(
        self,
        group: int,
        spec: AttentionSpec,
        cache: CacheSpec,
        state: StepState,
        bucket: int,
        workspace: Workspace,
    ):
        csr = state.csr(bucket, group)
        wrapper = BatchDecodeWithPagedKVCacheWrapper(
            workspace.placeholder(),
            cache.layout,
            use_cuda_graph=True,
            use_tensor_cores=True,
            paged_kv_indptr_buffer=csr.indptr_B1,
            paged_kv_indices_buffer=csr.indices_P,
            paged_kv_last_page_len_buffer=csr.last_page_len_B,
            backend="fa2",
        )
        super().__init__(group, spec, cache, wrapper)
        self._indices_P = csr.indices_P
        self._max_pages = state.max_pages_per_row
        workspace.fit(wrapper, wrapper.workspace_size(*self._rows(self._full(bucket)), *self._shape, **self._options))
        with self._fence:
            # The one full plan, which picks the kernel; later ones reuse it and write no page table.
            wrapper.plan(*self._rows(self._full(bucket)), *self._shape, **self._options)
        self._least_B = self._most_B = torch.zeros(bucket, dtype=torch.int32)

    @property
    def signature(self) -> tuple:
        return private.plan_info(self._wrapper)

    def plan(self, batch: Batch) -> None:
        pages_B = self._read(batch).indptr_B1.diff()
        if torch.all((self._least_B <= pages_B) & (pages_B <= self._most_B)):
            return
        ahead_B = (pages_B // 8).clamp(1, PAGES_AHEAD)
        self._least_B, self._most_B = pages_B, (pages_B + ahead_B).clamp(max=self._max_pages)
        rows = self._rows(self._most_B)
        with self._fence:
            fast_decode_plan(self._wrapper, *rows, *self._shape, **self._options, global_override_indptr_cpu=rows[0])

    def _full(self, bucket: int) -> Tensor:
        return torch.full((bucket,), self._max_pages, dtype=torch.int32)

    def _rows(self, pages_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the planner takes for rows of so many full pages: indptr, indices (only their number counts) and
        last_page_len."""
        indptr_B1 = torch.zeros(len(pages_B) + 1, dtype=torch.int32)
        torch.cumsum(pages_B, 0, out=indptr_B1[1:])
        indices_P = self._indices_P[: int(indptr_B1[-1])]
        return indptr_B1, indices_P, torch.full_like(pages_B, self._shape[-1])
