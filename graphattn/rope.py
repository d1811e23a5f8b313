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
            R is D, or less where only the first dims of a head are rotated (Phi, GPT-NeoX). Or `[F, R / 2]` where the
            frequencies depend on how long a row is (dynamic NTK, longrope): row `length - threshold` of it, the first
            for shorter rows and the last for longer ones.
        scaling: multiplies cosines and sines (YaRN's attention factor), 1.0 for most types.
        q_weight, k_weight: `[D]` weights of the norms; None for no norm.
        eps: of the norms.
        threshold: length from which frequencies change; counts only where they depend on it.
    """

    inv_freq: Tensor
    scaling: float = 1.0
    q_weight: Tensor | None = None
    k_weight: Tensor | None = None
    eps: float = 0.0
    threshold: int = 0

    @property
    def num_turned(self) -> int:
        """R / 2."""
        return self.inv_freq.shape[-1]

    @property
    def depends_on_length(self) -> bool:
        return self.inv_freq.dim() == 2

    def rotate(
        self, q_NHD: Tensor, k_NHD: Tensor, positions_N: Tensor, lengths_N: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Normed and rotated queries and keys, rounded where transformers rounds (Qwen 3's attention).

        Args:
            q_NHD, k_NHD: as they leave their projections.
            positions_N: of the tokens.
            lengths_N: how long a row each counts as part of; None for one that ends with it.
        """
        inv_freq = self.inv_freq.float()
        if self.depends_on_length:
            lengths_N = positions_N + 1 if lengths_N is None else lengths_N
            inv_freq = inv_freq[(lengths_N.long() - self.threshold).clamp(0, len(inv_freq) - 1)]
        angles_NR = positions_N[:, None].float() * inv_freq
        angles_NR = torch.cat((angles_NR, angles_NR), dim=-1)
        cos_N1R, sin_N1R = ((f(angles_NR) * self.scaling).to(q_NHD.dtype)[:, None] for f in (torch.cos, torch.sin))
        normed = (self._norm(q_NHD, self.q_weight), self._norm(k_NHD, self.k_weight))
        q, k = (self._turned(x_NHD, cos_N1R, sin_N1R) for x_NHD in normed)
        return q, k

    def _turned(self, x_NHD: Tensor, cos_N1R: Tensor, sin_N1R: Tensor) -> Tensor:
        x_NHR, rest = x_NHD.tensor_split((2 * self.num_turned,), dim=-1)
        first, second = x_NHR.chunk(2, dim=-1)
        return torch.cat((x_NHR * cos_N1R + torch.cat((-second, first), dim=-1) * sin_N1R, rest), dim=-1)

    def _norm(self, x_NHD: Tensor, weight_D: Tensor | None) -> Tensor:
        if weight_D is None:
            return x_NHD
        wide = x_NHD.float()
        return weight_D * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x_NHD.dtype)


@dataclass(frozen=True, kw_only=True)
class LengthRule:
    """What it means for requests that rotary frequencies depend on how long they are.

    Attributes:
        threshold: tokens up to which they do not.
        is_whole: all tokens of a request take the frequencies of its length, so one that grows past the threshold is
            computed anew (longrope). Otherwise tokens of a prompt take those of the prompt's length, and later ones
            those of the length that they end (dynamic NTK as transformers has it).
    """

    threshold: int
    is_whole: bool

    def counted(self, prompt_tokens: int, tokens: int) -> int:
        """How long a request counts as whose `tokens` are computed from the start, for `ragged_batch(lengths=)`."""
        return tokens if self.is_whole else prompt_tokens

    def prefix_key(self, prompt_tokens: int, tokens: int) -> int:
        """What requests must have in common to share the pages of a prefix; 0 below the threshold."""
        counted = self.counted(prompt_tokens, tokens)
        if counted <= self.threshold:
            return 0
        return 1 if self.is_whole else counted

    def outgrows(self, computed_as: int, tokens: int) -> bool:
        """Whether a request that was computed as one of a length is to be computed anew to be one of `tokens`."""
        return self.is_whole and computed_as <= self.threshold < tokens
