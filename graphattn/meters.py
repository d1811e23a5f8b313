"""What the meters say now: torch's allocator with its private pools, the driver, NVML and the host, each on its own."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from .errors import InvalidArgumentError

DEFAULT_POOL = (0, 0)  # torch's id of the pool that is nobody's


@dataclass(frozen=True, kw_only=True)
class Pool:
    """One of torch's private pools, in bytes: what it took from the driver, and what tensors hold of that."""

    reserved: int
    allocated: int


@dataclass(frozen=True, kw_only=True)
class Meters:
    """One reading of every meter, in bytes; None means not known, and `notes` says why.

    `torch_allocated` and `torch_reserved` count torch's private pools in, `private_pools` has those by id ("0.1").
    `free` and `total` are cudaMemGetInfo's (source "driver") or, on CPU, the host's MemAvailable and MemTotal (source
    "host"; in a container what its memory limit leaves, if that is less). `nvml_used` is what all processes, and to a
    few MiB the driver, hold on the device beside the driver's `nvml_reserved`. `process_rss` is host memory.
    """

    device: str
    torch_allocated: int = 0
    torch_reserved: int = 0
    private_pools: Mapping[str, Pool] = field(default_factory=dict)
    free: int | None = None
    total: int | None = None
    source: Literal["driver", "host"]
    nvml_process: int | None = None
    nvml_used: int | None = None
    nvml_reserved: int | None = None
    nvml_total: int | None = None
    process_rss: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def outside_torch(self) -> int | None:
        """Bytes of the device that torch's allocator does not count: this process's by NVML, or else everybody's by
        the driver; None if neither is known."""
        if self.nvml_process is not None:
            return self.nvml_process - self.torch_reserved
        if self.free is None or self.total is None:
            return None
        return self.total - self.free - self.torch_reserved


def find_device(device: torch.device | str | None) -> torch.device:
    """The device that is metered: "cuda" is the current one, None is that or, without CUDA, the CPU.

    Raises:
        InvalidArgumentError: neither the CPU nor a CUDA device that is there.
    """
    there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    device = torch.device(("cuda" if len(there) > 1 else "cpu") if device is None else device)
    if str(device) == "cuda" and len(there) > 1:
        device = torch.device("cuda", torch.cuda.current_device())
    if str(device) not in there:
        raise InvalidArgumentError(f"meters of {device} asked for, there are {', '.join(there)}: pass one of these")
    return device


def read_meters(device: torch.device | str | None = None, *, nvml: Any = None) -> Meters:
    """Reads every meter of "cpu", "cuda" (the current one) or "cuda:N"; on CUDA this creates the CUDA context.

    `nvml` is a module to use instead of pynvml. Raises InvalidArgumentError for any other device, or one not there.

    >>> read_meters("cpu").torch_reserved
    0
    """
    device, notes = find_device(device), []
    readings: dict[str, Any] = {"device": str(device), "source": "host" if device.type == "cpu" else "driver"}
    with _noting(notes, "the host's figures are", OSError, KeyError):
        readings["process_rss"] = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        if device.type == "cpu":
            kib = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
            readings |= {k: int(kib[n].split()[0]) * 1024 for k, n in (("free", "MemAvailable"), ("total", "MemTotal"))}
            _apply_container_limit(readings)
    if device.type == "cuda":
        with _noting(notes, "the driver's free and total are", RuntimeError):
            readings["free"], readings["total"] = torch.cuda.mem_get_info(device)  # first: it creates the context
        readings["torch_allocated"] = torch.cuda.memory_allocated(device)
        readings["torch_reserved"] = torch.cuda.memory_reserved(device)
        readings["private_pools"] = _private_pools(device)
        _read_nvml(device, readings, notes, nvml)
    return Meters(**readings, notes=tuple(notes))


def pool_name(pool: tuple[int, int]) -> str:
    """A pool's id, `torch.cuda.graph_pool_handle()`, as `Meters.private_pools` has it."""
    return ".".join(map(str, pool))


def _private_pools(device: torch.device) -> dict[str, Pool]:
    found: dict[str, list[int]] = {}
    for segment in torch.cuda.memory_snapshot():
        pool = tuple(segment["segment_pool_id"])
        if segment["device"] == device.index and pool != DEFAULT_POOL:
            sizes = found.setdefault(pool_name(pool), [0, 0])
            sizes[0] += segment["total_size"]
            sizes[1] += segment["allocated_size"]
    return {name: Pool(reserved=reserved, allocated=allocated) for name, (reserved, allocated) in found.items()}


def _apply_container_limit(readings: dict[str, Any], folder: Path = Path("/sys/fs/cgroup")) -> None:
    limit = (folder / "memory.max").read_text().strip() if (folder / "memory.max").exists() else "max"
    if limit != "max":
        left = int(limit) - int((folder / "memory.current").read_text())
        readings |= {"free": max(0, min(readings["free"], left)), "total": min(readings["total"], int(limit))}


@contextlib.contextmanager
def _noting(notes: list[str], what: str, *errors: type[Exception]) -> Iterator[None]:
    try:
        yield
    except errors as error:
        notes.append(f"{what} not known: {type(error).__name__}: {error}")


@functools.cache
def _initialise(nvml: Any) -> None:
    nvml.nvmlInit()
    atexit.register(_noting([], "", nvml.NVMLError)(nvml.nvmlShutdown))  # too late for a note, and it may be down


def _read_nvml(device: torch.device, readings: dict[str, Any], notes: list[str], nvml: Any) -> None:
    with _noting(notes, "without the package nvidia-ml-py NVML's figures are", ImportError):
        if nvml is None:
            import pynvml as nvml
    if nvml is None:
        return
    # What pynvml raises for a function that an older driver lacks is no NVMLError of its own.
    errors = (nvml.NVMLError, nvml.NVMLLibraryMismatchError)
    with _noting(notes, "NVML's figures are", *errors):
        _initialise(nvml)
        # By UUID: NVML's indices ignore CUDA_VISIBLE_DEVICES. torch's has no prefix, and on MIG it is the slice's.
        uuid = torch.cuda.get_device_properties(device).uuid
        try:
            handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except (nvml.NVMLError_NotFound, nvml.NVMLError_InvalidArgument):
            handle = nvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")
        with _noting(notes, "NVML's figures for the device are", *errors):
            now = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
            readings |= {"nvml_total": now.total, "nvml_reserved": now.reserved}
            readings["nvml_used"] = now.total - now.free - now.reserved  # manuals disagree on what now.used includes
        with _noting(notes, "NVML's figure for this process is", *errors):
            pid, held = os.getpid(), readings["torch_reserved"]
            sizes = [p.usedGpuMemory for p in nvml.nvmlDeviceGetComputeRunningProcesses(handle) if p.pid == pid]
            # In a container our pid may be another process's on the host, and some drivers list it with 0 bytes.
            if sizes and None not in sizes and sum(sizes) >= max(held, 1):
                readings["nvml_process"] = sum(sizes)
            else:
                why = f"for pid {pid} it lists {sizes or 'nothing'} and torch holds {held} bytes; containers hide pids"
                notes.append(f"NVML's figure for this process is not known: {why}")
