"""Ragged prefill over pages: any number of query tokens a row, causal, over whatever the row has cached."""

from __future__ import annotations

from flashinfer import BatchPrefillWithPagedKVCacheWrapper

from ...batch import Batch
from ...spec import AttentionSpec, CacheSpec
from .paged import PagedPlan
from .workspace import Workspace


class PrefillPlan(PagedPlan):
    """FlashInfer's fa2 prefill, planned for each batch; it runs the same compiled module as decode."""

    signature = ()

    def __init__(self, group: int, spec: AttentionSpec, cache: CacheSpec, workspace: Workspace):
        wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace.placeholder(), cache.layout, backend="fa2")
        super().__init__(group, spec, cache, wrapper)
        self._workspace, self._sizes = workspace, (0, 0)

    def plan(self, batch: Batch) -> None:
        self._read(batch)
        host = batch.groups_host[self._group]
        rows = (batch.qo_indptr_B1, host.indptr_B1, self._csr.indices_P, host.last_page_len_B)
        options = {**self._options, "causal": True}
        sizes = self._wrapper.workspace_size(*rows, *self._shape, **options)
        with self._fence:
            if any(needed > held for needed, held in zip(sizes, self._sizes, strict=True)):
                sizes = tuple(max(pair) for pair in zip(sizes, self._sizes, strict=True))
                self._workspace.fit(self._wrapper, sizes)
                self._sizes = sizes
            self._wrapper.plan(*rows, *self._shape, **options)
