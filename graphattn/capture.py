"""One step captured in a CUDA graph, and what that took by every meter."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from .errors import CaptureError
from .meters import Meters, Pool, pool_name, read_meters

# torch.cuda.graph empties the allocator's cache, which another thread's capture forbids.
_CAPTURING = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Capture:
    """What one bucket's capture with one backend took.

    Attributes:
        bucket: rows.
        backend: who attends in it.
        seconds: planning, warm-up (with compilation, if the step compiles) and capture.
        workspace_bytes: by how much the backend's workspaces grew.
        pool_bytes: what the graph added to torch's private pool; 0 without CUDA graphs.
        driver_bytes: by how much the driver's free memory shrank beyond that.
        nvml_bytes: by how much this process grew by NVML, the pool's growth included; None where NVML hides it.

    A bucket that was captured anew with the same backend counts all of its captures.
    """

    bucket: int
    backend: str
    seconds: float
    workspace_bytes: int = 0
    pool_bytes: int = 0
    driver_bytes: int = 0
    nvml_bytes: int | None = None

    def after(self, earlier: Capture) -> Capture:
        """Both captures of a bucket with a backend together."""
        known = None not in (self.nvml_bytes, earlier.nvml_bytes)
        return Capture(
            bucket=self.bucket,
            backend=self.backend,
            seconds=self.seconds + earlier.seconds,
            workspace_bytes=self.workspace_bytes + earlier.workspace_bytes,
            pool_bytes=self.pool_bytes + earlier.pool_bytes,
            driver_bytes=self.driver_bytes + earlier.driver_bytes,
            nvml_bytes=self.nvml_bytes + earlier.nvml_bytes if known else None,
        )


@contextmanager
def on_stream(stream: torch.cuda.Stream, device: torch.device) -> Iterator[None]:
    """Has what its body launches run on `stream`, behind what was launched on the current one, which then waits for it:
    both read and write a step's buffers."""
    current = torch.cuda.current_stream(device)
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        current.wait_stream(stream)


def piece_for(call: Callable[[], object], device: torch.device) -> int:
    """Makes a call, and returns the bytes of one piece from which torch can cut all that it allocates at a time.

    How many pieces torch takes otherwise depends on where they happen to lie, so that what one start took would not
    tell what the next will take. A quarter is for the gaps between what is cut.
    """
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return (torch.cuda.max_memory_allocated(device) - held) * 5 // 4


def reserve_for(call: Callable[[], object], device: torch.device) -> None:
    """Makes a call twice, and has torch keep one such piece, on the current stream, for the calls to come.

    Where none as large can be had, torch keeps what a third call takes by itself.
    """
    call()  # what libraries allocate once, and keep, is no part of the piece
    if not holds(piece_for(call, device), device):
        call()


def holds(num_bytes: int, device: torch.device) -> bool:
    """Whether so many bytes can be had in one piece; torch then keeps it, and nothing else unused."""
    give_back(device)
    try:
        torch.empty(num_bytes, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        return False
    return True


def give_back(device: torch.device) -> None:
    """Has torch give the device what nothing holds any more, nor the frames of a step that failed."""
    gc.collect()
    if device.type == "cuda":
        with _CAPTURING:
            torch.cuda.empty_cache()


def capture_graph(
    step: Callable[[], None],
    name: str,
    *,
    instead: str = "pass enforce_eager=True",
    pool: tuple[int, int],
    stream: torch.cuda.Stream,
    device: torch.device,
) -> tuple[torch.cuda.CUDAGraph, dict[str, int | None]]:
    """Captures one call of `step`, which has run on the stream before; returns the graph and the bytes it took.

    Args:
        step: called once.
        name, instead: what it is and what to do without, for the error.
        pool, stream, device: where.

    Raises:
        CaptureError: it waits for the device, or memory does not hold the graph.
    """
    torch.cuda.synchronize(device)
    with _CAPTURING:
        # cuBLAS's workspace must come from the graph's pool: one from outside may be freed, and not by us
        # (torch/_inductor/cudagraph_trees.py clears them too, for every stream).
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        before = read_meters(device)
        graph, reason = torch.cuda.CUDAGraph(), ""
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                try:
                    step()
                except Exception as error:
                    reason = f"{type(error).__name__}: {error}"  # leaving the capture then fails too, and hides it
                    raise
        except Exception as error:
            reason = reason or f"{type(error).__name__}: {error}"
            raise CaptureError(
                f"{name} runs but cannot be captured ({reason}): it must not wait for the device (.item(), .cpu(), "
                f"printing a tensor), or {instead}"
            ) from error
        finally:
            torch._C._cuda_clearCublasWorkspaces()
        return graph, taken(before, read_meters(device), pool)


def taken(before: Meters, after: Meters, pool: tuple[int, int]) -> dict[str, int | None]:
    """Bytes of a capture between two readings, as `Capture` has them; what shrank meanwhile counts as 0."""
    none, name = Pool(reserved=0, allocated=0), pool_name(pool)
    was, now = (meters.private_pools.get(name, none).reserved for meters in (before, after))
    free = None if None in (before.free, after.free) else before.free - after.free
    grown = None if None in (before.nvml_process, after.nvml_process) else after.nvml_process - before.nvml_process
    return {
        "pool_bytes": max(now - was, 0),
        "driver_bytes": 0 if free is None else max(free - (after.torch_reserved - before.torch_reserved), 0),
        "nvml_bytes": None if grown is None else max(grown, 0),
    }
