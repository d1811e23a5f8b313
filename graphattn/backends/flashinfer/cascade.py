"""The parts of a cascade: fa2 prefill over each shared level, tensor-core decode over the rows' tails, merged.

fa3, which FlashInfer's own cascade takes on Hopper GPUs, neither splits a long context nor packs a row's heads, and its
plans are for one batch only.

Shape letters: B rows, S slots, S1 = S + 1, H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

import numpy as np
import torch
from flashinfer import BatchPrefillWithPagedKVCacheWrapper, merge_state_in_place
from torch import Tensor

from ...batch import CSR
from ...rope import Rotary
from ...spec import AttentionSpec, CacheSpec
from ..segments import Segments
from . import private
from .decode import DecodePlan
from .paged import PagedPlan, append, for_stored_keys, of_stored_values
from .workspace import Workspace


class FlashInferStates:
    """The wrappers of a bucket: the tail on the step's stream and the levels beside it, on a stream of their own.

    The tail waits for memory and a shared level computes, and none fills the device from its first moment to its last.
    In a captured step the fork is two branches of the graph.

    Their first plans write to `tail` and `levels`, which must be overwritten before anything runs.

    Args:
        spec, cache: the layer group and its pages.
        tail: each row's own pages, at fixed addresses.
        levels: the shared ones: `qo_indptr_S1`, and where the pages of each slot are.
        max_pages: pages that one row may have.
        workspaces: where tails compute, and where levels do: they may run at one time.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        cache: CacheSpec,
        tail: CSR,
        levels: list[tuple[Tensor, CSR]],
        max_pages: int,
        workspaces: tuple[Workspace, Workspace],
    ):
        self._layout, num_rows = cache.layout, len(tail.last_page_len_B)
        of_tails, of_levels = workspaces
        self._tail = DecodePlan(0, spec, cache, tail, max_pages, of_tails)
        self._levels = [LevelPlan(spec, cache, num_rows, *level, max_pages, of_levels) for level in levels]
        self._beside = torch.cuda.Stream(of_levels.device)

    @property
    def signature(self) -> tuple:
        return tuple(part.signature for part in (self._tail, *self._levels))

    def plan(self, tail_lens_B: Tensor, segments: tuple[Segments, ...]) -> None:
        """Splits the work, from host numbers only."""
        self._tail.plan_lens(tail_lens_B.int())
        for level, each in zip(self._levels, segments, strict=True):
            level.plan_slots(each)

    def rotate(self, rotary: Rotary, q_BHD: Tensor, k_BKD: Tensor, positions_B: Tensor) -> tuple[Tensor, Tensor]:
        from ...kernels.rotate import rotate

        return rotate(rotary, q_BHD, k_BKD, positions_B)

    def append(
        self,
        k_BKD: Tensor,
        v_BKD: Tensor,
        rows_B: Tensor,
        positions_B: Tensor,
        pages: tuple[Tensor, Tensor],
        csr: CSR,
        scales_2K: Tensor | None,
    ) -> None:
        append(k_BKD, v_BKD, rows_B, positions_B, pages, csr, self._layout, scales_2K)

    def attend(self, q_BHD: Tensor, pages: tuple[Tensor, Tensor], scales_2K: Tensor | None) -> Tensor:
        """Attention over all levels and the tail, `[B, H, D]`, queries and result in the cascade's order."""
        q_BHD = for_stored_keys(q_BHD, scales_2K)
        # Each of the two streams waits for the other before it goes on, so neither takes memory that is still read.
        stream = torch.cuda.current_stream(q_BHD.device)
        self._beside.wait_stream(stream)
        with torch.cuda.stream(self._beside):
            shared = [level.state(q_BHD, pages) for level in self._levels]
        out_BHD, lse_BH = self._tail.state(q_BHD, pages)
        stream.wait_stream(self._beside)
        for state in shared:
            merge_state_in_place(out_BHD, lse_BH, *state)
        return of_stored_values(out_BHD, scales_2K)


class LevelPlan(PagedPlan):
    """A shared level: every query belongs to a slot, and attends to all pages of it or to none.

    In graph mode its `plan_info` depends on the numbers of rows and slots alone. Unlike decode, it is planned for
    exactly the pages that there are.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        cache: CacheSpec,
        num_rows: int,
        qo_indptr_S1: Tensor,
        csr: CSR,
        max_pages: int,
        workspace: Workspace,
    ):
        wrapper = BatchPrefillWithPagedKVCacheWrapper(
            workspace.placeholder(),
            cache.layout,
            use_cuda_graph=True,
            qo_indptr_buf=qo_indptr_S1,
            paged_kv_indptr_buf=csr.indptr_B1,
            paged_kv_indices_buf=csr.indices_P,
            paged_kv_last_page_len_buf=csr.last_page_len_B,
            backend="fa2",
        )
        super().__init__(0, spec, cache, wrapper)
        self._spec, self._page_size = spec, cache.page_size
        num_slots = len(csr.last_page_len_B)
        self._planned = np.array([0, *[num_rows] * num_slots]), np.array([max_pages] + [0] * (num_slots - 1))
        qo_indptr, kv_indptr, _ = self._host(*self._planned)
        pages = csr.indices_P[: int(kv_indptr[-1])]
        rows = (qo_indptr, kv_indptr, pages, torch.full((num_slots,), cache.page_size, dtype=torch.int32, device="cpu"))
        workspace.fit(wrapper, wrapper.workspace_size(*rows, *self._shape, **self._options, causal=False))
        with self._fence:
            # The one full plan, which picks the kernel and fixes the rows; later ones write no page table.
            wrapper.plan(*rows, *self._shape, **self._options, causal=False)

    @property
    def signature(self) -> tuple:
        return private.plan_info(self._wrapper)

    def plan_slots(self, segments: Segments) -> None:
        """Splits the work of these slots, if it is not split so already."""
        wanted = segments.qo_indptr_S1, segments.num_pages_S
        if all(map(np.array_equal, wanted, self._planned)):
            return
        self._planned = (np.empty(0), np.empty(0))  # if planning is interrupted, the work list may be neither plan's
        with self._fence:
            private.replan_prefill(self._wrapper, *self._host(*wanted), self._spec, self._page_size, causal=False)
        self._planned = wanted

    def state(self, q_BHD: Tensor, pages: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Attention of each query over its slot's pages, and its log-sum-exp to base 2; 0 and -inf over none."""
        return self._wrapper.run(q_BHD, pages, out=q_BHD.new_empty(q_BHD.shape), return_lse=True)

    def _host(self, qo_indptr_S1: np.ndarray, num_pages_S: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """What the planner takes for slots of so many full pages: qo_indptr, kv_indptr and kv_lens."""
        kv_indptr_S1 = np.concatenate(([0], num_pages_S.cumsum()))
        arrays = (qo_indptr_S1, kv_indptr_S1, num_pages_S * self._page_size)
        return tuple(torch.from_numpy(array.astype(np.int32)) for array in arrays)
