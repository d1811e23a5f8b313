"""Whether memory comes back: every meter before and after, and what grew."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .errors import InvalidArgumentError, MemoryLeakError
from .ledger import mib, tensor_bytes
from .meters import Meters, find_device, read_meters

TENSOR_TOLERANCE = 0  # bytes: what Python holds is counted exactly
TORCH_TOLERANCE = 1 << 20  # bytes: small blocks are shared and rounded
TOLERANCE = 8 << 20  # bytes: the driver and NVML count in steps of 2 MiB, a few of them for itself
SHOWN = 5  # kinds of tensors that a report names


@dataclass(frozen=True, kw_only=True)
class Growth:
    """By how much one meter grew, in bytes, and from how much on that is a leak; None where it is only told."""

    meter: str
    before: int
    after: int
    tolerance: int | None

    @property
    def is_leak(self) -> bool:
        return self.tolerance is not None and self.after - self.before > self.tolerance

    def __str__(self) -> str:
        said = "told only" if self.tolerance is None else f"tolerance {mib(self.tolerance)}"
        grown = f"{(self.after - self.before) / 2**20:+,.3f} MiB"
        return f"{self.meter}: {grown} ({mib(self.before)} -> {mib(self.after)}, {said})"


class Watch:
    """What `watch()` yields: the meters as they were, to compare with.

    Args:
        device: what is metered.
        tolerance: bytes that the driver's and NVML's figures may grow by.
        nvml: a module to use instead of pynvml.
    """

    def __init__(self, device: torch.device, tolerance: int, nvml: Any):
        self.device, self.tolerance, self._nvml = device, tolerance, nvml
        self.mark()

    def mark(self) -> None:
        """Compares with now from here on: after a first cycle, which loads kernels and fills caches for good."""
        self._meters, self._kinds, self._tensor_bytes = self._read()

    def growth(self) -> list[Growth]:
        """How every meter has grown since the mark.

        On CUDA: tensors that Python holds there, torch's allocated and reserved bytes, and what the process holds by
        NVML or, where that is not known, what all hold by the driver. Unused memory of torch is given back first.
        On CPU the tensors; resident memory is told and not judged, since the C allocator keeps what is freed.
        """
        meters, _, held = self._read()
        return self._compare(meters, held)

    def check(self) -> None:
        """Raises MemoryLeakError if a meter has grown by more than its tolerance; names meter, bytes and tensors."""
        meters, kinds, held = self._read()
        found = self._compare(meters, held)
        leaks = [growth for growth in found if growth.is_leak]
        if not leaks:
            return
        new = sorted((kinds - self._kinds).items(), key=lambda item: -item[1] * item[0][1])[:SHOWN]
        tensors = ", ".join(f"{count} x {kind}" for (kind, _), count in new) or "none that Python sees"
        others = "; ".join(str(growth) for growth in found if not growth.is_leak)
        notes = "".join(f"; {note}" for note in meters.notes)
        raise MemoryLeakError(
            f"memory of {self.device} has not come back: {'; '.join(map(str, leaks))}. New tensors: {tensors}. "
            f"Other meters: {others or 'none'}{notes}"
        )

    def _compare(self, meters: Meters, held: int) -> list[Growth]:
        before, found = self._meters, []

        def add(meter: str, was: int | None, now: int | None, tolerance: int | None) -> None:
            if was is not None and now is not None:
                found.append(Growth(meter=meter, before=was, after=now, tolerance=tolerance))

        add("tensors", self._tensor_bytes, held, TENSOR_TOLERANCE)
        if self.device.type == "cuda":
            add("torch allocated", before.torch_allocated, meters.torch_allocated, TORCH_TOLERANCE)
            add("torch reserved", before.torch_reserved, meters.torch_reserved, self.tolerance)
            by_nvml = before.nvml_process is not None and meters.nvml_process is not None
            add("NVML, this process", before.nvml_process, meters.nvml_process, self.tolerance)
            # Other processes are in it, so it is judged only where NVML has nothing better.
            add("driver, all processes", _used(before), _used(meters), None if by_nvml else self.tolerance)
        add("resident memory of the host", before.process_rss, meters.process_rss, None)
        return found

    def _read(self) -> tuple[Meters, Counter[tuple[str, int]], int]:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch._C._cuda_clearCublasWorkspaces()  # one per stream that was ever used, made anew when needed
            torch.cuda.empty_cache()
        # By exact type: looking into stand-ins for tensors (fake ones of the compiler) can fail, and they hold nothing.
        plain = (found for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter))
        mine = [tensor for tensor in plain if tensor.device == self.device and tensor.layout == torch.strided]
        kinds = Counter((f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}", x.nbytes) for x in mine)
        return read_meters(self.device, nvml=self._nvml), kinds, tensor_bytes(mine)


@contextmanager
def watch(device: torch.device | str | None = None, *, tolerance: int = TOLERANCE, nvml: Any = None) -> Iterator[Watch]:
    """Raises if memory that was taken inside is not given back by the end; an error inside goes first.

    Args:
        device: "cpu", "cuda" (the current one) or "cuda:N"; None for CUDA where there is one.
        tolerance: bytes that the driver's and NVML's figures may grow by. Tensors may not grow at all, torch's
            allocated bytes by 1 MiB.
        nvml: a module to use instead of pynvml.

    Raises:
        MemoryLeakError: it was not; says by which meter, how much, and which tensors are new.
        InvalidArgumentError: no such device, or a tolerance below 0.

    Example:
        >>> with watch("cpu") as watched:
        ...     kept = torch.zeros(4)  # a first cycle, whose caches stay
        ...     watched.mark()
        ...     for _ in range(3):
        ...         total = torch.zeros(1000).sum().item()
    """
    if not isinstance(tolerance, int) or tolerance < 0:
        raise InvalidArgumentError(f"tolerance={tolerance!r}: it is a count of bytes, an int, 0 or more")
    watched = Watch(find_device(device), tolerance, nvml)
    yield watched
    watched.check()


def _used(meters: Meters) -> int | None:
    return None if meters.free is None or meters.total is None else meters.total - meters.free
