"""What decode and prefill share: the append, the call and its options.

Shape letters: N tokens, H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

from flashinfer import append_paged_kv_cache
from torch import Tensor

from ...batch import CSR, Batch
from ...rope import Rotary
from ...spec import AttentionSpec, CacheSpec
from ..base import check_step
from . import private, variant
from .workspace import PlanFence


class PagedPlan:
    """A FlashInfer wrapper over paged keys and values of one layer group."""

    def __init__(self, group: int, spec: AttentionSpec, cache: CacheSpec, wrapper):
        self._group, self._wrapper, self._fence = group, wrapper, PlanFence(wrapper.device)
        self._cache, self.page_shape = cache, cache.page_shape(spec)
        self.spec, self._scalars = spec, ()
        if spec.variant is not None:
            private.use(
                wrapper, private.load_variant(spec, cache), variant.arguments(spec, cache.query_dtype, cache.dtype)
            )
            self._scalars = variant.scalars(spec)
        self._shape = (spec.num_heads, spec.num_kv_heads, spec.head_dim, cache.page_size)
        self._options = {
            "window_left": -1 if spec.window is None else spec.window - 1,
            "logits_soft_cap": spec.softcap,
            "sm_scale": spec.scale,
            "pos_encoding_mode": spec.pos_encoding.upper(),
            "rope_theta": spec.rope_theta,
            "rope_scale": spec.rope_scale,
            "q_data_type": cache.query_dtype,
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
        scales_2K: Tensor | None = None,
    ) -> Tensor:
        check_step(self._cache, len(self._rows_N), q_NHD, k_cache, scales_2K)
        if rotary is not None:
            from ...kernels.rotate import rotate

            q_NHD, k_NKD = rotate(rotary, q_NHD, k_NKD, self._positions_N, self._lengths_N)
        pages, where = (k_cache, v_cache), (self._rows_N, self._positions_N)
        append(k_NKD, v_NKD, *where, pages, self._csr, self._cache.layout, scales_2K)
        q_NHD = for_stored_keys(q_NHD, scales_2K)
        out_NHD = self._wrapper.run(q_NHD, pages, *values, *self._scalars, out=q_NHD.new_empty(q_NHD.shape))
        return of_stored_values(out_NHD, scales_2K)


def append(
    k_NKD: Tensor,
    v_NKD: Tensor,
    rows_N: Tensor,
    positions_N: Tensor,
    pages: tuple[Tensor, Tensor],
    csr: CSR,
    layout: str,
    scales_2K: Tensor | None,
) -> None:
    """Writes keys and values to their places; over scales by our kernel, since FlashInfer's takes what it is given for
    the cache's own dtype."""
    if scales_2K is not None:
        from ...kernels.append import append_fp8

        append_fp8(k_NKD, v_NKD, rows_N, positions_N, pages, csr.indptr_B1, csr.indices_P, scales_2K, layout=layout)
        return
    table = (csr.indices_P, csr.indptr_B1, csr.last_page_len_B)
    append_paged_kv_cache(k_NKD, v_NKD, rows_N, positions_N, pages, *table, kv_layout=layout)


def for_stored_keys(q_NHD: Tensor, scales_2K: Tensor | None) -> Tensor:
    """Queries whose products with stored keys are those with the keys: times the scale of their kv head.

    FlashInfer's own `k_scale` is one number, and part of what a captured launch holds.
    """
    if scales_2K is None:
        return q_NHD
    grouped = q_NHD.unflatten(1, (scales_2K.shape[1], -1))
    return (grouped * scales_2K[0, :, None, None]).to(q_NHD.dtype).flatten(1, 2)


def of_stored_values(out_NHD: Tensor, scales_2K: Tensor | None) -> Tensor:
    """What was attended over stored values times the scale of their kv head, in place."""
    if scales_2K is not None:
        out_NHD.unflatten(1, (scales_2K.shape[1], -1)).mul_(scales_2K[1, :, None, None])
    return out_NHD
