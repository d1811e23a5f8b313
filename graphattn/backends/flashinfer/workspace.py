"""Workspaces of the size that a plan needs, and the planner's pinned buffer kept from being overwritten in flight."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

FLOAT_ALIGNMENT = 256


class Workspace:
    """The float workspace shared by all wrappers that run in turn on one stream, and each wrapper's int workspace.

    A wrapper allocates 8 MiB of ints on the device and 8 MiB pinned; what a decode plan needs is kilobytes
    (flashinfer-ai/flashinfer#2046), so both are replaced by what `workspace_size()` asks for.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._float = self._empty(FLOAT_ALIGNMENT)
        self._held: WeakKeyDictionary[object, tuple[Tensor, Tensor]] = WeakKeyDictionary()

    def _empty(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    @property
    def num_bytes(self) -> int:
        """Bytes of every buffer that some wrapper holds."""
        return sum({buffer.data_ptr(): buffer.nbytes for pair in self._held.values() for buffer in pair}.values())

    def placeholder(self) -> Tensor:
        """A buffer to construct a wrapper with, before it can say how much it needs."""
        return self._float

    def fit(self, wrapper, sizes: tuple[int, int]) -> None:
        """Gives `wrapper` the float and int bytes that `workspace_size()` returned.

        A larger float buffer replaces the shared one for wrappers to come; captured graphs keep the one they hold.
        """
        float_bytes, int_bytes = (-(-max(size, 1) // FLOAT_ALIGNMENT) * FLOAT_ALIGNMENT for size in sizes)
        ints = self._empty(int_bytes)
        if float_bytes > self._float.nbytes:
            self._float = self._empty(float_bytes)
        self._held[wrapper] = buffers = (self._float, ints)
        wrapper.reset_workspace_buffer(*buffers)


class PlanFence:
    """Keeps the host from planning into a wrapper's pinned buffer while the last plan's copy still reads it.

    FlashInfer's planner writes its work list to a pinned buffer and copies it asynchronously, without a fence of its
    own (sgl-project/mini-sglang#103, vllm-project/vllm#32799).
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._copied = device, torch.cuda.Event()

    def __enter__(self) -> None:
        self._copied.synchronize()

    def __exit__(self, *exc_info) -> None:
        self._copied.record(torch.cuda.current_stream(self._device))
