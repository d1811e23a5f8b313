"""What decode and prefill share: the append, the call and its options.

Shape letters: N tokens, H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

from flashinfer import append_paged_kv_cache
from torch import Tensor

from ...batch import Batch
from ...rope import Rotary
from ...spec import AttentionSpec, CacheSpec
from . import private, variant
from .workspace import PlanFence


class PagedPlan:
    """A FlashInfer wrapper over paged keys and values of one layer group."""

    def __init__(self, group: int, spec: AttentionSpec, cache: CacheSpec, wrapper):
        self._group, self._wrapper, self._fence = group, wrapper, PlanFence(wrapper.device)
        self._layout, self.page_shape = cache.layout, cache.page_shape(spec)
        self.spec, self._scalars = spec, ()
        if spec.variant is not None:
            private.use(wrapper, private.load_variant(spec, cache), variant.arguments(spec, cache.dtype))
            self._scalars = variant.scalars(spec)
        self._shape = (spec.num_heads, spec.num_kv_heads, spec.head_dim, cache.page_size)
        self._options = {
            "window_left": -1 if spec.window is None else spec.window - 1,
            "logits_soft_cap": spec.softcap,
            "sm_scale": spec.scale,
            "pos_encoding_mode": spec.pos_encoding.upper(),
            "rope_theta": spec.rope_theta,
            "rope_scale": spec.rope_scale,
            "q_data_type": cache.dtype,
            "kv_data_type": cache.dtype,
        }

    def _read(self, batch: Batch) -> None:
        """Keeps where this batch's rows, positions and pages lie on the device."""
        self._rows_N, self._positions_N, self._csr = batch.rows_N, batch.positions_N, batch.groups[self._group]
        self._lengths_N = batch.lengths_N

    def attend(
        self,
        q_NHD: Tensor,
        k_NKD: Tensor,
        v_NKD: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        rotary: Rotary | None = None,
        values: Sequence[Tensor] = (),
    ) -> Tensor:
        if rotary is not None:
            from ...kernels.rotate import rotate

            q_NHD, k_NKD = rotate(rotary, q_NHD, k_NKD, self._positions_N, self._lengths_N)
        csr, pages = self._csr, (k_cache, v_cache)
        table = (csr.indices_P, csr.indptr_B1, csr.last_page_len_B)
        append_paged_kv_cache(k_NKD, v_NKD, self._rows_N, self._positions_N, pages, *table, kv_layout=self._layout)
        return self._wrapper.run(q_NHD, pages, *values, *self._scalars, out=q_NHD.new_empty(q_NHD.shape))
