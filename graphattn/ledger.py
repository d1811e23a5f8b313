"""Where the bytes are: named parts beside what each meter counts beyond them, what was predicted beside what came."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from .errors import InvalidArgumentError
from .meters import Meters, Pool, pool_name, read_meters

SCHEMA_VERSION = 2
CACHE = "activations and cache"
FRACTION, FLOOR = 0.02, 8 << 20  # a prediction holds within the larger of that share and so many bytes


@dataclass(frozen=True, kw_only=True)
class LedgerLine:
    """One part: `bytes` as `meter` counts them, beside what was predicted, if anything was."""

    name: str
    bytes: int
    meter: Literal["tensors", "torch", "driver", "nvml", "host"]
    predicted: int | None = None

    @property
    def is_off(self) -> bool:
        """Whether it was predicted and missed by more than the larger of 2 % and 8 MiB."""
        return self.predicted is not None and is_off(self.bytes, self.predicted)


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """Lines that do not overlap, the meters they were made from, and notes on what could not be known.

    `predicted_free` is what was to be left free, in bytes; None where nothing was planned.
    """

    device: str
    lines: tuple[LedgerLine, ...]
    meters: Meters
    notes: tuple[str, ...] = ()
    predicted_free: int | None = None

    def size_of(self, name: str) -> int:
        """Bytes of a line; 0 for one that is not there."""
        return sum(line.bytes for line in self.lines if line.name == name)

    def rows(self) -> list[dict[str, Any]]:
        """One dict per line: name, bytes, meter, predicted."""
        return [asdict(line) for line in self.lines]

    def to_json(self) -> dict[str, Any]:
        """The whole ledger as dicts, lists, strings, ints and None."""
        return json.loads(json.dumps({"schema_version": SCHEMA_VERSION, **asdict(self)}))

    def __str__(self) -> str:
        guessed = "predicted" if any(line.predicted is not None for line in self.lines) else ""
        body = [("part", "MiB", guessed, "meter")]
        for line in self.lines:
            guess = "" if line.predicted is None else mib(line.predicted)
            body.append((line.name, mib(line.bytes), guess, line.meter + (", off" if line.is_off else "")))
        body.append(("sum", mib(sum(line.bytes for line in self.lines)), "", ""))
        a, b, c = (max(len(row[column]) for row in body) for column in range(3))
        table = [f"{name:<{a}}  {size:>{b}}  {guess:>{c}}  {meter}".rstrip() for name, size, guess, meter in body]
        free = f"{mib(self.meters.free)} of {mib(self.meters.total)} MiB free ({self.meters.source})"
        free += "" if self.predicted_free is None else f", {mib(self.predicted_free)} predicted"
        return "\n".join([f"memory of {self.device}: {free}", *table, *(f"note: {note}" for note in self.notes)])


def ledger(
    device: torch.device | str | None = None,
    parts: Mapping[str, int] = {},
    *,
    pools: Mapping[str, tuple[int, int]] = {},
    driver_parts: Mapping[str, int] = {},
    predicted: Mapping[str, int] = {},
    predicted_free: int | None = None,
    nvml: Any = None,
) -> Ledger:
    """Lists the parts the caller knows and, beside them, what each meter counts beyond those.

    Where all is known the lines add up to NVML's used + reserved, on CPU to the resident memory. Where NVML does not
    say what this process holds, the driver's free memory stands in for it, which counts all processes together; a note
    says so.

    Args:
        device: "cpu", "cuda" (the current one) or "cuda:N"; None for CUDA where there is one.
        parts: bytes by name in tensors, outside private pools.
        pools: names for torch's private pools, by `torch.cuda.graph_pool_handle()`; others are one line.
        driver_parts: bytes by name of this process outside torch's allocator (a captured graph's, say).
        predicted: bytes of any line, by name.
        predicted_free: bytes that were to be left free.
        nvml: a module to use instead of pynvml.

    Raises:
        InvalidArgumentError: a size below 0, or a name used twice or unknown.

    >>> [line.name for line in ledger("cpu", {"weights": 4096}).lines]
    ['weights', 'other resident memory of this process']
    """
    check_bytes([*parts.items(), *driver_parts.items(), *predicted.items()])
    m = read_meters(device, nvml=nvml)
    notes, inside, outside = list(m.notes), sum(parts.values()), sum(driver_parts.values())
    found: list[Any] = [(name, size, "tensors") for name, size in parts.items()]
    rests: dict[str, Any] = {"other resident memory of this process": ("host", m.process_rss, inside + outside)}
    if m.source == "driver":
        none = Pool(reserved=0, allocated=0)
        named = {name: m.private_pools.get(pool_name(pool), none).reserved for name, pool in pools.items()}
        private = sum(pool.reserved for pool in m.private_pools.values())
        named["other graph pools"] = private - sum(named.values())
        found += [(name, size, "torch") for name, size in named.items()]
        held = m.torch_allocated - sum(pool.allocated for pool in m.private_pools.values())
        rests = {
            CACHE: ("torch", m.torch_reserved - private, held),
            "other torch": ("torch", held, inside),
            **_beyond_torch(m, m.torch_reserved + outside if inside <= held else None, notes),
            "reserved by the driver": ("nvml", m.nvml_reserved, 0),
        }
    found += [(name, size, m.source) for name, size in driver_parts.items()]
    names = [*(name for name, _, _ in found), *rests]
    if len(set(names)) < len(names) or not set(predicted) <= set(names):
        raise InvalidArgumentError(f"lines {names}, predicted {list(predicted)}: name each once, predict no others")
    for name, (meter, whole, counted) in rests.items():
        if whole is None or counted is None or whole < counted:
            why = f"{meter} has {mib(whole)} MiB, lines in it {mib(counted)}, predicted {mib(predicted.get(name))}"
            notes.append(f"{name!r} cannot be told: {why}")
        if whole is not None and counted is not None and (whole >= counted or meter == "host"):
            found.append((name, max(whole - counted, 0), meter))
    lines = tuple(LedgerLine(name=n, bytes=size, meter=by, predicted=predicted.get(n)) for n, size, by in found)
    return Ledger(device=m.device, lines=lines, meters=m, notes=tuple(notes), predicted_free=predicted_free)


def _beyond_torch(m: Meters, counted: int | None, notes: list[str]) -> dict[str, tuple[str, int | None, int | None]]:
    """Lines for what torch does not count: this process's and others' by NVML, or else all of it by the driver."""
    if m.nvml_process is None and m.free is not None and m.total is not None:
        notes.append(
            "the driver's free memory is used in place of NVML's figure for this process: what others hold is not told "
            "apart from this process's CUDA context and libraries"
        )
        return {"CUDA context and other processes": ("driver", m.total - m.free, counted)}
    return {
        "CUDA context and libraries": ("nvml", m.nvml_process, counted),
        "other processes": ("nvml", m.nvml_used, m.nvml_process),
    }


def is_off(actual: int, predicted: int) -> bool:
    """Whether a prediction, in bytes, missed by more than the larger of 2 % and 8 MiB."""
    return abs(actual - predicted) > max(FRACTION * actual, FLOOR)


def wraps_others(tensor: torch.Tensor) -> bool:
    """Whether a tensor has no memory of its own but that of tensors in it, as quantised weights do."""
    return hasattr(tensor, "__tensor_flatten__")


def plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensor itself, or all in it that have memory if it wraps others."""
    if not wraps_others(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from plain_tensors(getattr(tensor, name))


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages of the tensors: tied weights count once, a view counts as its whole storage.

    >>> weight = torch.zeros(8, 4); tensor_bytes([weight, weight.T, weight[:2]])
    128
    """
    held = [plain for tensor in tensors for plain in plain_tensors(tensor)]
    seen = set()  # of tensors that are held, since a freed temporary's address would be the next one's
    for tensor in held:
        if tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            seen.add((tensor.device, storage.data_ptr(), storage.nbytes()))
    return sum(size for _, _, size in seen)


def check_bytes(sizes: Iterable[tuple[str, Any]]) -> None:
    """Raises InvalidArgumentError for the first that is no count of bytes."""
    for name, size in sizes:
        if not isinstance(size, int) or size < 0:
            raise InvalidArgumentError(f"{name} is a count of bytes (an int, 0 or more), got {size!r}")


def mib(size: int | None) -> str:
    """Bytes as MiB, "?" where not known."""
    return "?" if size is None else f"{size / 2**20:,.1f}"
