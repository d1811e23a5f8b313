"""Attention states in plain torch: attention over a part of the keys with its log-sum-exp, and how two become one.

What `flashinfer.cascade` computes by kernels, from the same numbers on the device; the CPU's, and its oracle.

Shape letters: B rows, S slots, S1 = S + 1, L keys, H query heads, K kv heads, G = H / K, D head dim, P pages.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..batch import CSR
from ..rope import Rotary
from ..scales import dequantised, pair, quantised
from ..spec import AttentionSpec, CacheSpec
from .segments import Segments


class TorchStates:
    """The parts of a cascade by gathers, in float32 (float64 stays float64); plans nothing.

    Args:
        spec, cache: the layer group and its pages.
        tail: each row's own pages, at fixed addresses.
        levels: the shared ones: `qo_indptr_S1`, and where the pages of each slot are.
    """

    signature = ()

    def __init__(self, spec: AttentionSpec, cache: CacheSpec, tail: CSR, levels: list[tuple[Tensor, CSR]]):
        self._spec, self._cache, self._tail, self._levels = spec, cache, tail, levels

    def plan(self, tail_lens_B: Tensor, segments: tuple[Segments, ...]) -> None:
        pass

    def rotate(self, rotary: Rotary, q_BHD: Tensor, k_BKD: Tensor, positions_B: Tensor) -> tuple[Tensor, Tensor]:
        return rotary.rotate(q_BHD, k_BKD, positions_B)

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
        size = self._cache.page_size
        page_B = csr.indices_P[csr.indptr_B1[rows_B] + positions_B // size].long()
        for tensor_PSKD, new_BKD, scale_K in zip(
            self._slots_first(pages), (k_BKD, v_BKD), pair(scales_2K), strict=True
        ):
            tensor_PSKD[page_B, (positions_B % size).long()] = quantised(new_BKD, scale_K)

    def attend(self, q_BHD: Tensor, pages: tuple[Tensor, Tensor], scales_2K: Tensor | None) -> Tensor:
        """Attention over all levels and the tail, `[B, H, D]`, queries and result in the cascade's order."""
        one_each_B1 = torch.arange(len(q_BHD) + 1)
        out, lse = self._attend_slots(q_BHD, one_each_B1, self._tail, pages, scales_2K)
        for qo_indptr_S1, csr in self._levels:
            merge_state_in_place(out, lse, *self._attend_slots(q_BHD, qo_indptr_S1, csr, pages, scales_2K))
        return out.to(q_BHD.dtype)

    def _slots_first(self, pages: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return tuple(tensor.transpose(1, 2) for tensor in pages) if self._cache.layout == "HND" else pages

    def _attend_slots(
        self,
        q_BHD: Tensor,
        qo_indptr_S1: Tensor,
        csr: CSR,
        pages: tuple[Tensor, Tensor],
        scales_2K: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Attention of each slot's queries over all its tokens; 0 with a log-sum-exp of -inf over none."""
        size, wide = self._cache.page_size, torch.promote_types(q_BHD.dtype, torch.float32)
        out_BHD = torch.zeros(q_BHD.shape, dtype=wide)
        lse_BH = torch.full(q_BHD.shape[:2], -math.inf, dtype=wide)
        qo_indptr, kv_indptr = qo_indptr_S1.tolist(), csr.indptr_B1.tolist()
        for slot, last_page_len in enumerate(csr.last_page_len_B.tolist()):
            first, end = qo_indptr[slot : slot + 2]
            start, following = kv_indptr[slot : slot + 2]
            length = 0 if start == following else (following - start - 1) * size + last_page_len
            if first == end or not length:
                continue
            held = csr.indices_P[start : start - (-length // size)].long()
            k_LKD, v_LKD = (
                dequantised(tensor[held].flatten(0, 1)[:length], scale_K, wide).to(wide)
                for tensor, scale_K in zip(self._slots_first(pages), pair(scales_2K), strict=True)
            )
            out_BHD[first:end], lse_BH[first:end] = self._attend(q_BHD[first:end].to(wide), k_LKD, v_LKD)
        return out_BHD, lse_BH

    def _attend(self, q_BHD: Tensor, k_LKD: Tensor, v_LKD: Tensor) -> tuple[Tensor, Tensor]:
        spec = self._spec
        scores_BKGL = torch.einsum("bkgd,lkd->bkgl", q_BHD.unflatten(1, (spec.num_kv_heads, -1)), k_LKD) * spec.scale
        if spec.softcap is not None:
            scores_BKGL = spec.softcap * torch.tanh(scores_BKGL / spec.softcap)
        out_BKGD = torch.einsum("bkgl,lkd->bkgd", scores_BKGL.softmax(-1), v_LKD)
        return out_BKGD.flatten(1, 2), scores_BKGL.logsumexp(-1).flatten(1, 2) / math.log(2)


def merge_state_in_place(v_BHD: Tensor, s_BH: Tensor, v_other_BHD: Tensor, s_other_BH: Tensor) -> None:
    """Makes (v, s) the state over the keys of both (FlashInfer's `merge_state_in_place`; Ye et al., 2024).

    Args:
        v_BHD, v_other_BHD: attention over either part.
        s_BH, s_other_BH: its log-sum-exp to base 2, finite in `s_BH`; -inf over no key.
    """
    total_BH = torch.logaddexp2(s_BH, s_other_BH)
    v_BHD *= torch.exp2(s_BH - total_BH)[..., None]
    v_BHD += v_other_BHD * torch.exp2(s_other_BH - total_BH)[..., None]
    s_BH.copy_(total_BH)
