"""Prefill of a fixed number of tokens and rows, one wrapper each, which a CUDA graph may hold."""

from __future__ import annotations

import torch
from flashinfer import BatchPrefillWithPagedKVCacheWrapper
from torch import Tensor

from ...batch import Batch
from ...padded import PaddedBatch
from ...spec import AttentionSpec, CacheSpec
from . import fa3, private
from .paged import PagedPlan
from .workspace import Workspace


class PaddedPlan(PagedPlan):
    """One of FlashInfer's prefill kernels over the buffers of a padded batch, planned for each batch.

    In graph mode its `plan_info` depends on the number of tokens and rows alone. fa2 then always splits the context,
    and tiles are as large as those of one row with all tokens.

    Args:
        padded: the buffers.
        kernel: "auto", "fa2" or "fa3"; "auto" is fa3 where that is served and one row of all tokens is large enough.

    Raises:
        BackendError: fa3 was asked for and is not served here, or a module could not be compiled; says why.
    """

    def __init__(
        self,
        group: int,
        spec: AttentionSpec,
        cache: CacheSpec,
        padded: PaddedBatch,
        workspace: Workspace,
        kernel: str,
    ):
        num_processors = torch.cuda.get_device_properties(workspace.device).multi_processor_count
        num_tokens, csr = padded.num_tokens, padded.groups[group]
        kernels, _ = fa3.kernels_for(kernel, spec, cache, workspace.device, num_processors, num_tokens)
        self.about = kernels[-1]
        private.load(self.about, spec, cache)
        wrapper = BatchPrefillWithPagedKVCacheWrapper(
            workspace.placeholder(),
            cache.layout,
            use_cuda_graph=True,
            qo_indptr_buf=padded.qo_indptr_B1,
            paged_kv_indptr_buf=csr.indptr_B1,
            paged_kv_indices_buf=csr.indices_P,
            paged_kv_last_page_len_buf=csr.last_page_len_B,
            backend=self.about,
        )
        super().__init__(group, spec, cache, wrapper)
        options, rows = {**self._options, "causal": True}, self._one_row(num_tokens, len(csr.last_page_len_B))
        if self.about == "fa3":
            sizes = (0, fa3.padded_plan_bytes(spec, num_processors, num_tokens, len(csr.last_page_len_B)))
        else:
            sizes = wrapper.workspace_size(*rows, *self._shape, **options)
        workspace.fit(wrapper, sizes)
        with self._fence:
            # The one full plan, which picks the kernel and how many tokens there are; later ones write no page table.
            wrapper.plan(*rows, *self._shape, **options)

    @property
    def signature(self) -> tuple:
        return private.plan_info(self._wrapper)

    def plan(self, batch: Batch) -> None:
        self._read(batch)
        host = batch.groups_host[self._group]
        with self._fence:
            private.replan_prefill(
                self._wrapper,
                batch.qo_indptr_B1,
                host.indptr_B1,
                batch.kv_lens_B,
                self.spec,
                self._cache.page_size,
                causal=True,
            )

    def _one_row(self, num_tokens: int, num_rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the planner takes for one row with all tokens, and others without any."""
        integers = {"dtype": torch.int32, "device": "cpu"}
        num_pages = -(-num_tokens // self._cache.page_size)
        qo_indptr = torch.full((num_rows + 1,), num_tokens, **integers)
        kv_indptr = torch.full((num_rows + 1,), num_pages, **integers)
        qo_indptr[0] = kv_indptr[0] = 0
        last_page_len = torch.full((num_rows,), self._cache.page_size, **integers)
        return qo_indptr, kv_indptr, torch.zeros(num_pages, **integers), last_page_len
