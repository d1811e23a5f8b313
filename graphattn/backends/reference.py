"""Paged attention in plain torch: the CPU's backend, and the oracle for the others.

Shape letters: N tokens, B rows, T query tokens of a row, L keys of a row, H query heads, K kv heads, G = H / K,
D head dim, P pages, S slots in a page.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..batch import Batch
from ..errors import BackendError
from ..padded import PaddedBatch
from ..rope import Rotary
from ..scales import dequantised, pair, quantised
from ..spec import AttentionSpec, CacheSpec
from ..state import StepState
from .base import check_step

QUERY_BLOCK = 512  # query tokens whose scores are held at once


class ReferenceBackend:
    """Gathers each row's pages and computes in float32 (float64 stays float64), on any device, without CUDA graphs."""

    name = "reference"
    capturable = False
    num_bytes = 0

    def __init__(self, group: int, spec: AttentionSpec, cache: CacheSpec, device: torch.device):
        self._group, self._spec, self._cache = group, spec, cache

    @staticmethod
    def rejections(spec: AttentionSpec, cache: CacheSpec, device: torch.device) -> list[str]:
        return []

    def decode_plan(self, state: StepState, bucket: int) -> ReferencePlan:
        return self.prefill_plan()

    def prefill_plan(self, kernel: str = "auto", max_tokens: int = 0) -> ReferencePlan:
        if kernel != "auto":
            raise BackendError(
                f"prefill={kernel!r}: backend reference computes prefill in plain torch; leave prefill out, or choose "
                "another backend"
            )
        return ReferencePlan(self._group, self._spec, self._cache)

    def padded_plan(self, padded: PaddedBatch, kernel: str = "auto") -> ReferencePlan:
        return self.prefill_plan(kernel)


class ReferencePlan:
    """Slots to write and to read for the rows of one step; decode rows are computed together, longer ones in turn."""

    signature = ()
    about = "plain torch"

    def __init__(self, group: int, spec: AttentionSpec, cache: CacheSpec):
        self._group, self._cache = group, cache
        self.page_shape, self.spec = cache.page_shape(spec), spec

    def plan(self, batch: Batch) -> None:
        self._positions_N, self._lengths_N = batch.positions_N, batch.lengths_N
        csr, device, page_size = batch.groups_host[self._group], batch.token_ids_N.device, self._cache.page_size
        kv_lens, query_lens = csr.kv_lens(page_size).tolist(), batch.qo_indptr_B1.diff().tolist()
        in_page = torch.arange(page_size, device="cpu")
        slots_of_row = [
            (pages.long()[:, None] * page_size + in_page).flatten()[:length]
            for pages, length in zip(csr.indices_P.split(csr.indptr_B1.diff().tolist()), kv_lens, strict=True)
        ]
        new = [slots[length - count :] for slots, length, count in zip(slots_of_row, kv_lens, query_lens, strict=True)]
        self._new = self._where(torch.cat(new).to(device))
        if max(query_lens) == min(query_lens) == 1:
            parts = [torch.nn.utils.rnn.pad_sequence(slots_of_row, batch_first=True)]
            self._parts = [(slice(None), self._where(parts[0].to(device)), torch.tensor(kv_lens, device=device))]
        else:
            ends = batch.qo_indptr_B1.tolist()
            self._parts = [
                (slice(start, end), self._where(slots.to(device)[None]), torch.tensor([length], device=device))
                for start, end, slots, length in zip(ends[:-1], ends[1:], slots_of_row, kv_lens, strict=True)
                if end > start
            ]

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
        check_step(self._cache, len(self._positions_N), q_NHD, k_cache, scales_2K)
        if rotary is not None:
            q_NHD, k_NKD = rotary.rotate(q_NHD, k_NKD, self._positions_N, self._lengths_N)
        is_hnd = self._cache.layout == "HND"
        k_PSKD, v_PSKD = (cache.transpose(1, 2) if is_hnd else cache for cache in (k_cache, v_cache))
        for pages_PSKD, new_NKD, scale_K in zip((k_PSKD, v_PSKD), (k_NKD, v_NKD), pair(scales_2K), strict=True):
            pages_PSKD.index_put_(self._new, quantised(new_NKD, scale_K))
        out_NHD, wide = q_NHD.new_empty(q_NHD.shape), torch.promote_types(q_NHD.dtype, torch.float32)
        for rows, held_BL, kv_lens_B in self._parts:
            num_rows = len(kv_lens_B)
            q_BTHD = q_NHD[rows].unflatten(0, (num_rows, -1))
            k_BLKD, v_BLKD = (
                dequantised(pages_PSKD[held_BL], scale_K, wide)
                for pages_PSKD, scale_K in zip((k_PSKD, v_PSKD), pair(scales_2K), strict=True)
            )
            if self.spec.pos_encoding == "rope_llama":
                q_BTHD, k_BLKD = _turned(self.spec, q_BTHD, k_BLKD, kv_lens_B)
            out_BTHD = self._attend_rows(q_BTHD, k_BLKD, v_BLKD, kv_lens_B, values)
            out_NHD[rows] = out_BTHD.flatten(0, 1).to(q_NHD.dtype)
        return out_NHD

    def _where(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Page and place in the page of slots that are counted through all pages."""
        return slots // self._cache.page_size, slots % self._cache.page_size

    def _attend_rows(
        self, q_BTHD: Tensor, k_BLKD: Tensor, v_BLKD: Tensor, kv_lens_B: Tensor, values: Sequence[Tensor]
    ) -> Tensor:
        spec, dtype = self.spec, torch.promote_types(q_BTHD.dtype, torch.float32)
        named = None if spec.variant is None else spec.variant.namespace(values, dtype)
        num_queries, num_keys = q_BTHD.shape[1], k_BLKD.shape[1]
        key_L = torch.arange(num_keys, device=q_BTHD.device)
        # What no query of the row sees may hold anything, and NaN times zero is NaN: padding of the gather beyond the
        # row's length, and what lies behind every query's window, where pages may have been given back.
        unseen_BL = key_L >= kv_lens_B[:, None]
        if spec.window is not None:
            unseen_BL |= key_L <= kv_lens_B[:, None] - num_queries - spec.window
        k_BKDL = k_BLKD.to(dtype).permute(0, 2, 3, 1)
        v_BKLD = v_BLKD.to(dtype).masked_fill(unseen_BL[:, :, None, None], 0).transpose(1, 2)
        blocks = []
        for start in range(0, num_queries, QUERY_BLOCK):
            q_BTKGD = q_BTHD[:, start : start + QUERY_BLOCK].to(dtype).unflatten(2, (spec.num_kv_heads, -1))
            block = q_BTKGD.shape[1]
            q_BKMD = q_BTKGD.permute(0, 2, 3, 1, 4).flatten(2, 3)  # M = G x T
            scores_BKGTL = (q_BKMD @ k_BKDL * spec.scale).unflatten(2, (spec.group_size, block))
            if spec.softcap is not None:
                scores_BKGTL = spec.softcap * torch.tanh(scores_BKGTL / spec.softcap)
            query_T = torch.arange(start, start + block, device=q_BTHD.device)
            position_BT = kv_lens_B[:, None] - num_queries + query_T
            hidden_BTL = key_L > position_BT[..., None]
            if spec.window is not None:
                hidden_BTL |= key_L <= position_BT[..., None] - spec.window
            factor_BHT1: Tensor | float = 1.0
            if spec.variant is None:
                weights_BKGTL = scores_BKGTL.masked_fill(hidden_BTL[:, None, None], float("-inf")).softmax(-1)
            else:
                asked = (scores_BKGTL.flatten(1, 2), hidden_BTL, position_BT, named)
                weights_BHTL, factor_BHT1 = spec.variant.weights(*asked)
                weights_BKGTL = weights_BHTL.unflatten(1, (spec.num_kv_heads, -1))
            out_BKMD = weights_BKGTL.flatten(2, 3) @ v_BKLD
            out_BHTD = out_BKMD.unflatten(2, (spec.group_size, block)).flatten(1, 2) * factor_BHT1
            blocks.append(out_BHTD.transpose(1, 2))
        return torch.cat(blocks, dim=1)


def _turned(spec: AttentionSpec, q_BTHD: Tensor, k_BLKD: Tensor, kv_lens_B: Tensor) -> tuple[Tensor, Tensor]:
    """Queries at the end of their rows, and keys from their start, turned to their positions."""
    dtype, device = torch.promote_types(q_BTHD.dtype, torch.float32), q_BTHD.device
    pairs = torch.arange(0, spec.head_dim, 2, device=device, dtype=dtype)
    inv_freq = spec.rope_theta ** (-pairs / spec.head_dim) / spec.rope_scale
    query_BT = kv_lens_B[:, None] + torch.arange(-q_BTHD.shape[1], 0, device=device)
    key_1L = torch.arange(k_BLKD.shape[1], device=device)[None]

    def turned(x: Tensor, positions: Tensor) -> Tensor:
        first, second = x.to(dtype).chunk(2, dim=-1)
        angles = (positions[..., None] * inv_freq)[:, :, None]
        cos, sin = torch.cos(angles), torch.sin(angles)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    return turned(q_BTHD, query_BT), turned(k_BLKD, key_1L)
