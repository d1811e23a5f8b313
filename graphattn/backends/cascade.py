"""Decode in levels: pages that rows share are read once for all of them, each row's own pages by itself.

Shape letters: B rows, S slots, S1 = S + 1, H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..batch import CSR, Batch
from ..mirror import Mirror
from ..padded import PaddedBatch
from ..prefixes import Cascade, pays, shared_prefixes
from ..rope import Rotary
from ..spec import AttentionSpec, CacheSpec
from ..state import StepState
from .base import Plan, PrefillPlan, check_step
from .flashinfer import FlashInferBackend
from .reference import ReferenceBackend
from .segments import level_segments, max_slots, stretches

if TYPE_CHECKING:
    from .flashinfer.workspace import Workspace

MAX_LEVELS = 2  # shared levels: a system prompt and what conversations add to it
MAX_RUNS = 16  # of a level; more take larger workspaces and launches in every step, used or not
ORDER, INVERSE, TAIL_INDPTR, TAIL_LAST_PAGE_LEN, LEVELS = range(5)  # fields; three for each level from there on


class CascadeBackend:
    """Shared levels by FlashInfer's fa2 prefill, each row's tail by its tensor-core decode, and what both give merged;
    on a CPU the same levels in plain torch.

    Attributes:
        counts: steps planned, as "shared" and "alone", by whether their rows shared any pages.
    """

    name = "cascade"
    capturable = True

    def __init__(self, group: int, spec: AttentionSpec, cache: CacheSpec, device: torch.device):
        self._group, self._spec, self._cache = group, spec, cache
        self._workspaces = None
        self.counts: Counter[str] = Counter()
        if device.type == "cuda":
            from .flashinfer.workspace import Workspace

            self._workspaces = (Workspace(device), Workspace(device))
        prefill = ReferenceBackend if self._workspaces is None else FlashInferBackend
        self._prefill = prefill(group, spec, cache, device)

    @staticmethod
    def rejections(spec: AttentionSpec, cache: CacheSpec, device: torch.device) -> list[str]:
        reasons = [] if device.type == "cpu" else FlashInferBackend.rejections(spec, cache, device)
        if spec.variant is not None:
            reasons.append(f"variant {spec.variant.name}: it is computed over whole rows")
        if spec.pos_encoding != "none":
            reasons.append(f"pos_encoding {spec.pos_encoding}: a part of a row begins at position 0")
        if spec.window is not None:
            reasons.append(f"window {spec.window}: where a row's window begins inside shared pages, it shares none")
        return reasons

    def decode_plan(self, state: StepState, bucket: int) -> Plan:
        return CascadePlan(self._group, self._spec, self._cache, state, bucket, self._workspaces, self.counts)

    def prefill_plan(self, kernel: str = "auto", max_tokens: int = 0) -> PrefillPlan:
        return self._prefill.prefill_plan(kernel, max_tokens)

    def padded_plan(self, padded: PaddedBatch, kernel: str = "auto") -> PrefillPlan:
        return self._prefill.padded_plan(padded, kernel)

    @property
    def num_bytes(self) -> int:
        return self._prefill.num_bytes + sum(workspace.num_bytes for workspace in self._workspaces or ())


class CascadePlan:
    """A bucket's cascade, whatever its rows share: the grid is the bucket's, and what a level lacks it leaves empty.

    All levels and the tail point into the state's page tables. What they point at changes with the rows and is sent
    where it does; the kernels' work lists are planned anew where the levels change.

    Args:
        workspaces: the kernels', for tails and for levels; None on a CPU.
        counts: where steps are counted.

    Attributes:
        cascade: what the rows of the last plan share.
    """

    def __init__(
        self,
        group: int,
        spec: AttentionSpec,
        cache: CacheSpec,
        state: StepState,
        bucket: int,
        workspaces: tuple[Workspace, Workspace] | None,
        counts: Counter[str],
    ):
        self._group, self._cache, self.page_shape, self.spec = group, cache, cache.page_shape(spec), spec
        self._bucket, self._num_slots = bucket, max_slots(bucket, MAX_RUNS)
        self._mirror = Mirror(LEVELS + 3 * MAX_LEVELS, bucket + 1, dtype=torch.int32, device=state.device)
        self.cascade: Cascade | None = None
        self._found: tuple[Batch, Cascade] | None = None
        self._counts = counts
        self._token_bytes = cache.page_bytes(spec) // cache.page_size
        indices_P = state.csr(bucket, group).indices_P
        tail = CSR(self._field(TAIL_INDPTR, bucket + 1), indices_P, self._field(TAIL_LAST_PAGE_LEN, bucket))
        levels = []
        for at in range(LEVELS, LEVELS + 3 * MAX_LEVELS, 3):
            qo_indptr_S1, kv_indptr_S1 = (self._field(each, self._num_slots + 1) for each in (at, at + 1))
            levels.append((qo_indptr_S1, CSR(kv_indptr_S1, indices_P, self._field(at + 2, self._num_slots))))
        if workspaces is None:
            from .states import TorchStates

            self._states = TorchStates(spec, cache, tail, levels)
        else:
            from .flashinfer.cascade import FlashInferStates

            self._states = FlashInferStates(spec, cache, tail, levels, state.max_pages_per_row, workspaces)
            self._mirror.numbers.zero_()  # of what the first plans wrote there, and the mirror does not know

    @property
    def signature(self) -> tuple:
        return self._states.signature

    def plan(self, batch: Batch) -> None:
        """Finds what the rows share and says where it is.

        Raises:
            InvalidArgumentError: they share the null page, or one that the cache has not.
        """
        size, bucket = self._cache.page_size, self._bucket
        self._rows_B, self._positions_B, self._csr = batch.rows_N, batch.positions_N, batch.groups[self._group]
        kv_lens_B = batch.kv_lens_B.numpy().astype(np.int64)
        self.cascade = cascade = self._find(batch)
        self._counts["shared" if any(cascade.levels) else "alone"] += 1
        indptr_B1, order_B = np.zeros(bucket + 1, np.int64), cascade.order_B
        np.cumsum(-(-kv_lens_B // size), out=indptr_B1[1:])
        tail_lens_B = (kv_lens_B - cascade.depths_B * size)[order_B]
        segments = tuple(
            level_segments(cascade, level, indptr_B1, num_slots=self._num_slots, page_size=size)
            for level in range(MAX_LEVELS)
        )
        starts_B, total = (indptr_B1[:-1] + cascade.depths_B)[order_B], int(indptr_B1[-1])
        wanted = [order_B, order_B.argsort(), *stretches(starts_B, tail_lens_B, total, size)]
        for each in segments:
            wanted += [each.qo_indptr_S1, each.kv_indptr_S1, each.last_page_len_S]
        self._states.plan(torch.from_numpy(tail_lens_B), segments)
        wanted_FB = self._mirror.known.copy()
        for field, numbers in enumerate(wanted):
            wanted_FB[field, : len(numbers)] = numbers
        self._mirror.send(wanted_FB)

    def pays(self, batch: Batch) -> bool:
        """Whether this is taken to be faster for these rows than a decode without levels; `prefixes.pays` says why.

        Raises:
            InvalidArgumentError: as `plan` does.
        """
        cascade, size = self._find(batch), self._cache.page_size
        tail_lens_B = batch.kv_lens_B.numpy() - cascade.depths_B * size
        return pays(chain(*cascade.levels), tail_lens_B, page_size=size, token_bytes=self._token_bytes)

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
        check_step(self._cache, len(self._rows_B), q_NHD, k_cache, scales_2K)
        states, pages = self._states, (k_cache, v_cache)
        if rotary is not None:
            q_NHD, k_NKD = states.rotate(rotary, q_NHD, k_NKD, self._positions_B)
        states.append(k_NKD, v_NKD, self._rows_B, self._positions_B, pages, self._csr, scales_2K)
        ordered_BHD = q_NHD.index_select(0, self._field(ORDER, self._bucket))
        return states.attend(ordered_BHD, pages, scales_2K).index_select(0, self._field(INVERSE, self._bucket))

    def _find(self, batch: Batch) -> Cascade:
        if self._found is None or self._found[0] is not batch:
            cascade = shared_prefixes(
                batch.tables_host[self._group],
                (batch.kv_lens_B.numpy() - 1) // self._cache.page_size,
                num_pages=self._cache.num_pages,
                max_levels=MAX_LEVELS,
                max_runs=MAX_RUNS,
            )
            self._found = (batch, cascade)
        return self._found[1]

    def _field(self, index: int, count: int) -> Tensor:
        return self._mirror.field(index)[:count]
