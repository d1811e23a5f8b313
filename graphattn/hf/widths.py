"""Heads of a width that kernels have not, made wider by zeros, which change neither q.k nor what is attended to."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..backends.flashinfer import HEAD_DIMS


def served_width(head_dim: int, v_dim: int, device: torch.device) -> int:
    """Width of a layer's heads for queries and keys `head_dim` wide and values `v_dim` wide.

    The next one of FlashInfer's kernels on CUDA; elsewhere, and where those are too narrow, just wide enough for both.
    """
    width = max(head_dim, v_dim)
    if device.type == "cuda":
        return next((each for each in HEAD_DIMS if each >= width), width)
    return width


def widened(x: Tensor, width: int) -> Tensor:
    """`[..., width]`, zeros behind; the tensor itself if it is so wide."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))
