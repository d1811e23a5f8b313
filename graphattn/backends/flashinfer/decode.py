"""Batched decode over pages, one wrapper per bucket, its page tables at fixed addresses."""

from __future__ import annotations

import torch
from flashinfer import BatchDecodeWithPagedKVCacheWrapper
from flashinfer.decode import fast_decode_plan

from ...batch import Batch
from ...spec import AttentionSpec, CacheSpec
from ...state import StepState
from . import private
from .paged import PagedPlan
from .workspace import Workspace


class DecodePlan(PagedPlan):
    """A bucket's tensor-core decode, split over the context.

    The kernel reads lengths and pages from the state's device buffers; the host plan only splits the work. It is made
    anew for each step; in graph mode its `plan_info` depends on the bucket alone.
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
        csr, pages = state.csr(bucket, group), state.max_pages_per_row
        wrapper = BatchDecodeWithPagedKVCacheWrapper(
            workspace.placeholder(),
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=True,
            paged_kv_indptr_buffer=csr.indptr_B1,
            paged_kv_indices_buffer=csr.indices_P,
            paged_kv_last_page_len_buffer=csr.last_page_len_B,
            backend="fa2",
        )
        super().__init__(group, spec, cache, wrapper)
        longest = (
            torch.arange(bucket + 1, dtype=torch.int32) * pages,
            csr.indices_P[: bucket * pages],
            torch.full((bucket,), cache.page_size, dtype=torch.int32),
        )
        workspace.fit(wrapper, wrapper.workspace_size(*longest, *self._shape, **self._options))
        with self._fence:
            # The one full plan, which picks the kernel; later ones reuse it and write no page table.
            wrapper.plan(*longest, *self._shape, **self._options)

    @property
    def signature(self) -> tuple:
        return private.plan_info(self._wrapper)

    def plan(self, batch: Batch) -> None:
        csr = self._read(batch)
        with self._fence:
            fast_decode_plan(
                self._wrapper,
                csr.indptr_B1,
                csr.indices_P,
                csr.last_page_len_B,
                *self._shape,
                **self._options,
                global_override_indptr_cpu=csr.indptr_B1,
            )
