"""What lets a kernel start while the one before it still runs (programmatic dependent launch).

A kernel launched with `launch_pdl=True` may start once every program of the kernel before it has called `follow` or
ended. It fetches what that kernel does not write, weights and page tables, and then calls `follow` before it reads or
writes anything else.

Hazard: what the kernel right before it wrote may be read only after `follow`. What earlier ones wrote may be read at
any time, since `follow` lets the next kernel start only once the one before has ended. That chain holds as long as
every kernel launched so calls it, which Inductor's do not, so its option `enable_pdl` must stay off. (Letting the next
start any earlier was tried and is slower: waiting programs crowd on some multiprocessors, docs/design-notes.md.)
"""

from __future__ import annotations

from functools import cache

import torch
import triton
from triton.language.extra import cuda


@cache
def is_chained(device: torch.device) -> bool:
    """Whether kernels on this device may be launched so: on CUDA from compute capability 9.0."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def follow():
    """Waits until the kernel before has ended and its writes are there, then lets the next one start."""
    cuda.gdc_wait()
    cuda.gdc_launch_dependents()
