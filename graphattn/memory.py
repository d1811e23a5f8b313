"""Where the bytes are: torch's allocator, the driver and NVML, each read on its own, and a ledger that adds up."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from .errors import InvalidArgumentError


@dataclass(frozen=True, kw_only=True)
class Meters:
    """One reading of every meter, in bytes; None means not known, and `notes` says why.

    `free` and `total` are cudaMemGetInfo's (source "driver") or, on CPU, the host's MemAvailable and MemTotal (source
    "host"; in a container what its memory limit leaves, if that is less). `nvml_used` is what all processes, and to a
    few MiB the driver, hold on the device beside the driver's `nvml_reserved`. `process_rss` is host memory.
    """

    device: str
    torch_allocated: int = 0
    torch_reserved: int = 0
    free: int | None = None
    total: int | None = None
    source: Literal["driver", "host"]
    nvml_process: int | None = None
    nvml_used: int | None = None
    nvml_reserved: int | None = None
    nvml_total: int | None = None
    process_rss: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LedgerLine:
    """One part: `bytes` as `meter` counts them, beside what was predicted, if anything was."""

    name: str
    bytes: int
    meter: Literal["tensors", "torch", "driver", "nvml", "host"]
    predicted: int | None = None


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """Lines that do not overlap, the meters they were made from, and notes on what could not be known."""

    device: str
    lines: tuple[LedgerLine, ...]
    meters: Meters
    notes: tuple[str, ...] = ()

    def rows(self) -> list[dict[str, Any]]:
        """One dict per line: name, bytes, meter, predicted."""
        return [asdict(line) for line in self.lines]

    def to_json(self) -> dict[str, Any]:
        """The whole ledger as dicts, lists, strings, ints and None."""
        return json.loads(json.dumps({"schema_version": 1, **asdict(self)}))

    def __str__(self) -> str:
        guessed = "predicted" if any(line.predicted is not None for line in self.lines) else ""
        body = [(x.name, _mib(x.bytes), "" if x.predicted is None else _mib(x.predicted), x.meter) for x in self.lines]
        body = [("part", "MiB", guessed, "meter"), *body, ("sum", _mib(sum(x.bytes for x in self.lines)), "", "")]
        a, b, c = (max(len(row[column]) for row in body) for column in range(3))
        table = [f"{name:<{a}}  {mib:>{b}}  {guess:>{c}}  {meter}".rstrip() for name, mib, guess, meter in body]
        free = f"{_mib(self.meters.free)} of {_mib(self.meters.total)} MiB free ({self.meters.source})"
        return "\n".join([f"memory of {self.device}: {free}", *table, *(f"note: {note}" for note in self.notes)])


def read_meters(device: torch.device | str, *, nvml: Any = None) -> Meters:
    """Reads every meter of "cpu", "cuda" (the current one) or "cuda:N"; on CUDA this creates the CUDA context.

    `nvml` is a module to use instead of pynvml. Raises InvalidArgumentError for any other device, or one not there.

    >>> read_meters("cpu").torch_reserved
    0
    """
    device, notes = torch.device(device), []
    there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if str(device) == "cuda" and len(there) > 1:
        device = torch.device("cuda", torch.cuda.current_device())
    if str(device) not in there:
        raise InvalidArgumentError(f"meters of {device} asked for, there are {', '.join(there)}: pass one of these")
    readings: dict[str, Any] = {"device": str(device), "source": "host" if device.type == "cpu" else "driver"}
    with _noting(notes, "the host's figures are", OSError, KeyError):
        readings["process_rss"] = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        if device.type == "cpu":
            kib = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
            readings |= {k: int(kib[n].split()[0]) * 1024 for k, n in (("free", "MemAvailable"), ("total", "MemTotal"))}
            _apply_container_limit(readings)
    if device.type == "cuda":
        readings["torch_allocated"] = torch.cuda.memory_allocated(device)
        readings["torch_reserved"] = torch.cuda.memory_reserved(device)
        with _noting(notes, "the driver's free and total are", RuntimeError):
            readings["free"], readings["total"] = torch.cuda.mem_get_info(device)
        _read_nvml(device, readings, notes, nvml)
    return Meters(**readings, notes=tuple(notes))


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
    with _noting(notes, "NVML's figures are", nvml.NVMLError):
        _initialise(nvml)
        # By UUID: NVML's indices ignore CUDA_VISIBLE_DEVICES. torch's has no prefix, and on MIG it is the slice's.
        uuid = torch.cuda.get_device_properties(device).uuid
        try:
            handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except (nvml.NVMLError_NotFound, nvml.NVMLError_InvalidArgument):
            handle = nvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")
        with _noting(notes, "NVML's figures for the device are", nvml.NVMLError):
            now = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
            readings |= {"nvml_total": now.total, "nvml_reserved": now.reserved}
            readings["nvml_used"] = now.total - now.free - now.reserved  # manuals disagree on what now.used includes
        with _noting(notes, "NVML's figure for this process is", nvml.NVMLError):
            pid, held = os.getpid(), readings["torch_reserved"]
            sizes = [p.usedGpuMemory for p in nvml.nvmlDeviceGetComputeRunningProcesses(handle) if p.pid == pid]
            # In a container our pid may be another process's on the host, and some drivers list it with 0 bytes.
            if sizes and None not in sizes and sum(sizes) >= max(held, 1):
                readings["nvml_process"] = sum(sizes)
            else:
                why = f"for pid {pid} it lists {sizes or 'nothing'} and torch holds {held} bytes; containers hide pids"
                notes.append(f"NVML's figure for this process is not known: {why}")


def ledger(
    device: torch.device | str,
    parts: Mapping[str, int],
    *,
    driver_parts: Mapping[str, int] = {},
    predicted: Mapping[str, int] = {},
    nvml: Any = None,
) -> Ledger:
    """Lists the parts the caller knows and, beside them, what each meter counts beyond those.

    `parts` are bytes by name in tensors, `driver_parts` bytes of this process outside torch's allocator (a captured
    graph's, say); `predicted` may name any line. Where all is known the lines add up to NVML's used + reserved, on CPU
    to the resident memory. Raises InvalidArgumentError for a size below 0 and for a name used twice or unknown.

    >>> [line.name for line in ledger("cpu", {"weights": 4096}).lines]
    ['weights', 'other resident memory of this process']
    """
    _check_bytes([*parts.items(), *driver_parts.items(), *predicted.items()])
    m = read_meters(device, nvml=nvml)
    notes, inside, outside, held = list(m.notes), sum(parts.values()), sum(driver_parts.values()), m.torch_reserved
    rests: dict[str, Any] = {"other resident memory of this process": ("host", m.process_rss, inside + outside)}
    if m.source == "driver":
        rests = {
            "other torch": ("torch", held, inside),
            "CUDA context and libraries": ("nvml", m.nvml_process, held + outside if inside <= held else None),
            "other processes": ("nvml", m.nvml_used, m.nvml_process),
            "reserved by the driver": ("nvml", m.nvml_reserved, 0),
        }
        if m.nvml_process is None and m.free is not None and m.total is not None:
            beyond = _mib(m.total - m.free - held)
            notes.append(f"the driver counts {beyond} MiB beyond torch's, of this and other processes, not told apart")
    names = [*parts, *driver_parts, *rests]
    if len(set(names)) < len(names) or not set(predicted) <= set(names):
        raise InvalidArgumentError(f"lines {names}, predicted {list(predicted)}: name each once, predict no others")
    found: list[Any] = [(name, size, "tensors") for name, size in parts.items()]
    found += [(name, size, m.source) for name, size in driver_parts.items()]
    for name, (meter, whole, counted) in rests.items():
        if whole is None or counted is None or whole < counted:
            why = f"{meter} has {_mib(whole)} MiB, lines in it {_mib(counted)}, predicted {_mib(predicted.get(name))}"
            notes.append(f"{name!r} cannot be told: {why}")
        if whole is not None and counted is not None and (whole >= counted or meter == "host"):
            found.append((name, max(whole - counted, 0), meter))
    lines = tuple(LedgerLine(name=n, bytes=size, meter=by, predicted=predicted.get(n)) for n, size, by in found)
    return Ledger(device=m.device, lines=lines, meters=m, notes=tuple(notes))


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages of the tensors: tied weights count once, a view counts as its whole storage.

    >>> weight = torch.zeros(8, 4); tensor_bytes([weight, weight.T, weight[:2]])
    128
    """
    held, seen = list(tensors), set()  # held, since a freed temporary's address would be the next one's
    for tensor in held:
        if hasattr(tensor, "__tensor_flatten__"):
            held.extend(getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        elif tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            seen.add((tensor.device, storage.data_ptr(), storage.nbytes()))
    return sum(size for _, _, size in seen)


def pages_that_fit(
    *,
    page_bytes: int,
    kv_bytes: int | None = None,
    free: int | None = None,
    memory_fraction: float = 0.9,
    reserve: int = 0,
) -> int:
    """How many pages fit in `kv_bytes`, taken whole, or in `memory_fraction` of the `free` bytes less `reserve`.

    Raises InvalidArgumentError when that is fewer than 2 (the null page and one more) or an argument is out of range.

    >>> pages_that_fit(page_bytes=1000, free=10_000, memory_fraction=0.5, reserve=2_000)
    3
    """
    given = {"page_bytes": page_bytes, "kv_bytes": kv_bytes, "free": free, "reserve": reserve}
    asked = f"{given}, memory_fraction={memory_fraction}"
    if (kv_bytes is None) == (free is None) or not 0 < memory_fraction <= 1:
        raise InvalidArgumentError(f"{asked}: pass one of kv_bytes and free, and a memory_fraction in (0, 1]")
    _check_bytes((name, size) for name, size in given.items() if size is not None)
    part, whole = memory_fraction.as_integer_ratio()
    budget = free * part // whole - reserve if kv_bytes is None else kv_bytes
    if not 0 < 2 * page_bytes <= budget:
        few = f"{budget} bytes hold fewer than 2 pages (the null page and one more)"
        raise InvalidArgumentError(f"{asked}: {few}; raise the budget, free memory or make the pages smaller")
    return budget // page_bytes


def _check_bytes(sizes: Iterable[tuple[str, Any]]) -> None:
    for name, size in sizes:
        if not isinstance(size, int) or size < 0:
            raise InvalidArgumentError(f"{name} is a count of bytes (an int, 0 or more), got {size!r}")


def _mib(size: int | None) -> str:
    return "?" if size is None else f"{size / 2**20:,.1f}"
