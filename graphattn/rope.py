"""Rotary positions, and the norm of queries and keys before them, as one thing that attention can take over."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rotary:
    """What happens to queries and keys between projection and attention: an RMS norm per head, then rotation.

    Shape letters: N tokens, H heads, D head dim, R dims of a head that are rotated.

    Attributes:
        inv_freq: `[R / 2]` float32; pair i is (x[i], x[i + R / 2]) and turns by position * inv_freq[i] ("NeoX" order).
            R is D, or less where only the first dims of a head are rotated (Phi, GPT-NeoX).
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
        angles_NR = positions_N[:, None].float() * self.inv_freq.float()
        angles_NR = torch.cat((angles_NR, angles_NR), dim=-1)
        cos_N1R, sin_N1R = ((f(angles_NR) * self.scaling).to(q_NHD.dtype)[:, None] for f in (torch.cos, torch.sin))
        normed = (self._norm(q_NHD, self.q_weight), self._norm(k_NHD, self.k_weight))
        q, k = (self._turned(x_NHD, cos_N1R, sin_N1R) for x_NHD in normed)
        return q, k

    def _turned(self, x_NHD: Tensor, cos_N1R: Tensor, sin_N1R: Tensor) -> Tensor:
        x_NHR, rest = x_NHD.tensor_split((2 * self.inv_freq.numel(),), dim=-1)
        first, second = x_NHR.chunk(2, dim=-1)
        return torch.cat((x_NHR * cos_N1R + torch.cat((-second, first), dim=-1) * sin_N1R, rest), dim=-1)

    def _norm(self, x_NHD: Tensor, weight_D: Tensor | None) -> Tensor:
        if weight_D is None:
            return x_NHD
        wide = x_NHD.float()
        return weight_D * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x_NHD.dtype)
