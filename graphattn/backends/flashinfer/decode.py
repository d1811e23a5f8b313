"""Batched decode over pages, one wrapper per bucket, its page tables at fixed addresses."""

from __future__ import annotations

import torch
from flashinfer import BatchDecodeWithPagedKVCacheWrapper
from flashinfer.decode import fast_decode_plan
from torch import Tensor

from ...batch import CSR, Batch
from ...spec import AttentionSpec, CacheSpec
from . import private
from .paged import PagedPlan
from .workspace import Workspace

# Pages from which a row is planned for in steps of 2, 4 and 8 pages.
STEPS_FROM = torch.tensor([16, 32, 64], dtype=torch.int32, device="cpu")


def planned_pages(pages_B: Tensor, max_pages: int) -> Tensor:
    """Pages that rows of `pages_B` are planned for: the next multiple of 1, 2, 4 or 8, an eighth of the row's at most.

    A function of the step alone and not of the steps before it, so that a row's split, and with it its bits, do not
    depend on what else ran.
    """
    step_B = torch.bitwise_left_shift(1, torch.bucketize(pages_B, STEPS_FROM, out_int32=True, right=True))
    return (-(-pages_B // step_B) * step_B).clamp(max=max_pages)


class DecodePlan(PagedPlan):
    """A bucket's tensor-core decode, split over the context.

    The kernel reads lengths and pages from the state's device buffers; the host plan only splits the work, and in graph
    mode its `plan_info` depends on the bucket alone. With one query token a row, a plan for more pages than a row has
    is right too: chunks beyond its length come out empty (prefill.cuh clamps them to the length it reads). So rows are
    planned for by `planned_pages`, and again only when that changes.

    Args:
        csr: the pages of each row, at fixed addresses; what the first plan writes there must be overwritten.
        max_pages: pages that one row may have.
    """

    def __init__(
        self,
        group: int,
        spec: AttentionSpec,
        cache: CacheSpec,
        csr: CSR,
        max_pages: int,
        workspace: Workspace,
    ):
        bucket = len(csr.last_page_len_B)
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
        self._max_pages = max_pages
        workspace.fit(wrapper, wrapper.workspace_size(*self._rows(self._full(bucket)), *self._shape, **self._options))
        with self._fence:
            # The one full plan, which picks the kernel; later ones reuse it and write no page table.
            wrapper.plan(*self._rows(self._full(bucket)), *self._shape, **self._options)
        self._planned_B = torch.zeros(bucket, dtype=torch.int32, device="cpu")

    @property
    def signature(self) -> tuple:
        return private.plan_info(self._wrapper)

    def plan(self, batch: Batch) -> None:
        self._read(batch)
        self.plan_lens(batch.kv_lens_B)

    def plan_lens(self, kv_lens_B: Tensor) -> None:
        """Splits the work for rows of so many tokens, int32 on the host."""
        planned_B = planned_pages(-(-kv_lens_B // self._shape[-1]), self._max_pages)
        if torch.equal(planned_B, self._planned_B):
            return
        rows = self._rows(planned_B)
        # If planning is interrupted, the work list on the device may be neither plan's.
        self._planned_B = torch.zeros_like(planned_B)
        with self._fence:
            fast_decode_plan(self._wrapper, *rows, *self._shape, **self._options, global_override_indptr_cpu=rows[0])
        self._planned_B = planned_B

    def state(self, q_BHD: Tensor, pages: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Attention over the pages planned for `[B, H, D]`, and its log-sum-exp to base 2, `[B, H]` float32."""
        return self._wrapper.run(q_BHD, pages, out=q_BHD.new_empty(q_BHD.shape), return_lse=True)

    def _full(self, bucket: int) -> Tensor:
        return torch.full((bucket,), self._max_pages, dtype=torch.int32, device="cpu")

    def _rows(self, pages_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the planner takes for rows of so many full pages: indptr, indices (only their number counts) and
        last_page_len."""
        indptr_B1 = pages_B.new_zeros(len(pages_B) + 1)
        torch.cumsum(pages_B, 0, out=indptr_B1[1:])
        indices_P = self._indices_P[: int(indptr_B1[-1])]
        return indptr_B1, indices_P, torch.full_like(pages_B, self._shape[-1])
