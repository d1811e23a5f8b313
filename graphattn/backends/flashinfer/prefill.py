"""Ragged prefill over pages: any number of query tokens a row, causal, over whatever the row has cached.

Shape letters: N tokens, B rows, H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from flashinfer import BatchPrefillWithPagedKVCacheWrapper
from torch import Tensor

from ...batch import Batch
from ...rope import Rotary
from ...spec import AttentionSpec, CacheSpec
from . import fa3, private
from .paged import PagedPlan
from .workspace import Workspace


class RaggedPlan:
    """Prefill by fa3 where it is served and a batch is large, and by fa2; or by one of them as asked.

    Both are made ready here, and compiled where they are not prebuilt: no request waits for that.

    Args:
        kernel: "auto", "fa2" or "fa3".
        max_tokens: query tokens of the largest batch; if fa3 is for larger ones only, "auto" leaves it out.

    Raises:
        BackendError: fa3 was asked for and is not served here, or a module could not be compiled; says why.
    """

    signature = ()

    def __init__(
        self, group: int, spec: AttentionSpec, cache: CacheSpec, workspace: Workspace, kernel: str, max_tokens: int
    ):
        device = workspace.device
        self.spec, self.page_shape = spec, cache.page_shape(spec)
        self._num_processors = torch.cuda.get_device_properties(device).multi_processor_count
        kernels, self._why_not = fa3.kernels_for(kernel, spec, cache, device, self._num_processors, max_tokens)
        self._seconds = {name: private.load(name, spec, cache) for name in kernels}
        self._plans = {name: KernelPlan(group, spec, cache, workspace, name) for name in kernels}
        self.counts: Counter[str] = Counter()

    @property
    def about(self) -> str:
        parts = [f"{name} ({self.counts[name]} batches)" for name in self._plans]
        if len(parts) == 1:
            return parts[0] + (f", not fa3: {self._why_not}" if self._why_not else "")
        least, tile = fa3.least_tokens(self.spec, self._num_processors), fa3.TILES[self.spec.head_dim]
        return (
            f"{parts[1]} from {least} tokens on that fill more than half of their tiles of {tile}, else {parts[0]}; "
            f"its module was ready in {self._seconds['fa3']:.1f} s"
        )

    def plan(self, batch: Batch) -> None:
        name = next(iter(self._plans))
        if len(self._plans) > 1 and fa3.suits(self.spec, self._num_processors, batch.qo_indptr_B1.diff()):
            name = "fa3"
        self._now = self._plans[name]
        self._now.plan(batch)
        self.counts[name] += 1

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
        return self._now.attend(q_NHD, k_NKD, v_NKD, k_cache, v_cache, rotary, values, scales_2K)


class KernelPlan(PagedPlan):
    """One of FlashInfer's prefill kernels, planned for each batch; fa2 runs the same compiled module as decode."""

    def __init__(self, group: int, spec: AttentionSpec, cache: CacheSpec, workspace: Workspace, kernel: str):
        wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace.placeholder(), cache.layout, backend=kernel)
        super().__init__(group, spec, cache, wrapper)
        self._kernel, self._workspace, self._sizes = kernel, workspace, (0, 0)
        self._num_processors = torch.cuda.get_device_properties(workspace.device).multi_processor_count

    def plan(self, batch: Batch) -> None:
        self._read(batch)
        host = batch.groups_host[self._group]
        rows = (batch.qo_indptr_B1, host.indptr_B1, self._csr.indices_P, host.last_page_len_B)
        options = {**self._options, "causal": True}
        if self._kernel == "fa3":
            sizes = (0, fa3.plan_bytes(self.spec, self._num_processors, batch.qo_indptr_B1.diff()))
        else:
            sizes = self._wrapper.workspace_size(*rows, *self._shape, **options)
        with self._fence:
            if any(needed > held for needed, held in zip(sizes, self._sizes, strict=True)):
                sizes = tuple(max(pair) for pair in zip(sizes, self._sizes, strict=True))
                self._workspace.fit(self._wrapper, sizes)
                self._sizes = sizes
            self._wrapper.plan(*rows, *self._shape, **options)
