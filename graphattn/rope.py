"""Rotary positions, and the norm of queries and keys before them, as one thing that attention can take over."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rotary:
    """What happens to queries and keys between projection and attention: an RMS norm per head, then rotation.

    Shape letters: N tokens, H heads, D head dim.

    Attributes:
        inv_freq: `[D / 2]` float32; pair i is (x[i], x[i + D / 2]) and turns by position * inv_freq[i] ("NeoX" order).
        scaling: multiplies cosines and sines (YaRN's attention factor), 1.0 for most types.
        q_weight, k_weight: `[D]` weights of the norms; None for no norm.
        eps: of the norms.
    """

    inv_freq: Tensor
    scaling: float = 1.0
    q_weight: Tensor | None = None
    k_weight: Tensor | None = None
    eps: float = 0.0

    def rotate(self, q_NHD: Tensor, k_NHD: Tensor, positions_N: Tensor) -> tuple[Tensor, Tensor]:
        """Normed and rotated queries and keys, rounded where transformers rounds (Qwen 3's attention)."""
        angles_ND = positions_N[:, None].float() * self.inv_freq.float()
        angles_ND = torch.cat((angles_ND, angles_ND), dim=-1)
        cos_N1D, sin_N1D = ((f(angles_ND) * self.scaling).to(q_NHD.dtype)[:, None] for f in (torch.cos, torch.sin))
        normed = (self._norm(q_NHD, self.q_weight), self._norm(k_NHD, self.k_weight))
        q, k = (x_NHD * cos_N1D + _turned(x_NHD) * sin_N1D for x_NHD in normed)
        return q, k

    def _norm(self, x_NHD: Tensor, weight_D: Tensor | None) -> Tensor:
        if weight_D is None:
            return x_NHD
        wide = x_NHD.float()
        return weight_D * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x_NHD.dtype)


def _turned(x_NHD: Tensor) -> Tensor:
    first, second = x_NHD.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
