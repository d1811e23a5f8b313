"""The meters and the ledger, over a made-up device whose true figures the tests know, and the page arithmetic."""

from __future__ import annotations

import doctest
import json
import os
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, dataclass, field
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from graphattn import ledger as ledgers
from graphattn import memory, meters
from graphattn import watch as watches
from graphattn.errors import InvalidArgumentError
from graphattn.memory import Ledger, LedgerLine, Meters, Pool, ledger, pages_that_fit, read_meters, tensor_bytes

ROOT = Path(__file__).resolve().parents[1]
MIB = 1 << 20
UUID = "1f2e3d4c-0000-1111-2222-333344445555"
CPU_REST = "other resident memory of this process"
CUDA_LINES = [
    "activations and cache",
    "other torch",
    "CUDA context and libraries",
    "other processes",
    "reserved by the driver",
]
CALLS = {
    "nvmlInit": {"nvml_process", "nvml_used", "nvml_reserved", "nvml_total"},
    "nvmlDeviceGetHandleByUUID": {"nvml_process", "nvml_used", "nvml_reserved", "nvml_total"},
    "nvmlDeviceGetMemoryInfo": {"nvml_used", "nvml_reserved", "nvml_total"},
    "nvmlDeviceGetComputeRunningProcesses": {"nvml_process"},
}


class FakeError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(f"fake failure {value}")
        self.value = value


class FakeMismatch(Exception):
    pass


class FakeNotFound(FakeError):
    pass


class FakeInvalidArgument(FakeError):
    pass


@dataclass(eq=False)
class FakeNVML:
    """What memory.py uses of pynvml, over figures the test chooses."""

    total: int = 1000 * MIB
    reserved: int = 20 * MIB
    used: int = 700 * MIB
    processes: list[tuple[int, int | None]] = field(default_factory=lambda: [(os.getpid(), 600 * MIB)])
    known_uuid: str = f"GPU-{UUID}"
    fail: dict[str, Exception] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)

    NVMLError = FakeError
    NVMLLibraryMismatchError = FakeMismatch
    NVMLError_NotFound = FakeNotFound
    NVMLError_InvalidArgument = FakeInvalidArgument
    nvmlMemory_v2 = 0x02000028

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if name in self.fail:
            raise self.fail[name]

    def nvmlInit(self) -> None:
        self._called("nvmlInit")

    def nvmlShutdown(self) -> None:
        self._called("nvmlShutdown")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self._called("nvmlDeviceGetHandleByUUID")
        if uuid != self.known_uuid:
            raise FakeNotFound(6)
        return uuid

    def nvmlDeviceGetMemoryInfo(self, handle: str, version: int) -> SimpleNamespace:
        self._called("nvmlDeviceGetMemoryInfo")
        assert (handle, version) == (self.known_uuid, self.nvmlMemory_v2)
        free = self.total - self.used - self.reserved
        # `used` is a trap: drivers disagree on whether it has `reserved` in it.
        return SimpleNamespace(total=self.total, reserved=self.reserved, free=free, used=-1)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[SimpleNamespace]:
        self._called("nvmlDeviceGetComputeRunningProcesses")
        assert handle == self.known_uuid
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in self.processes]


class FakeCuda:
    """Two CUDA devices, put in the place of torch.cuda's figures; the second is the current one."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.allocated, self.reserved, self.free, self.total = 300 * MIB, 400 * MIB, 280 * MIB, 980 * MIB
        self.pools: dict[tuple[int, int], tuple[int, int]] = {}  # reserved and allocated
        patch.setattr(torch.cuda, "device_count", lambda: 2)
        patch.setattr(torch.cuda, "current_device", lambda: 1)
        patch.setattr(torch.cuda, "memory_allocated", lambda device: self._of(device, self.allocated))
        patch.setattr(torch.cuda, "memory_reserved", lambda device: self._of(device, self.reserved))
        patch.setattr(torch.cuda, "memory_snapshot", self._snapshot)
        patch.setattr(torch.cuda, "mem_get_info", lambda device: self._of(device, (self.free, self.total)))
        patch.setattr(torch.cuda, "get_device_properties", lambda device: self._of(device, SimpleNamespace(uuid=UUID)))

    def _snapshot(self) -> list[dict]:
        """Each pool in two segments, the default pool's, and another device's."""
        found = [segment(pool, 1, *sizes) for pool, sizes in self.pools.items()]
        found += [segment(pool, 1, 0, 0) for pool in self.pools]
        return [*found, segment((0, 0), 1, self.reserved, self.allocated), segment((0, 9), 0, 7 * MIB, MIB)]

    def _of(self, device, value):
        assert torch.device(device) == torch.device("cuda:1"), f"asked about {device}"
        return value


def segment(pool: tuple[int, int], device: int, total: int, allocated: int) -> dict:
    return {"segment_pool_id": pool, "device": device, "total_size": total, "allocated_size": allocated}


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def sizes(book: Ledger) -> dict[str, int]:
    return {line.name: line.bytes for line in book.lines}


# meters


def test_every_meter_is_read_on_its_own(cuda: FakeCuda):
    cuda.pools = {(0, 1): (60 * MIB, 50 * MIB), (3, 0): (MIB, 0)}
    read = read_meters("cuda:1", nvml=FakeNVML(processes=[(1, 5), (os.getpid(), 600 * MIB), (2, None)]))
    assert read.process_rss > MIB
    assert read == Meters(
        device="cuda:1",
        source="driver",
        torch_allocated=300 * MIB,
        torch_reserved=400 * MIB,
        private_pools={"0.1": Pool(reserved=60 * MIB, allocated=50 * MIB), "3.0": Pool(reserved=MIB, allocated=0)},
        free=280 * MIB,
        total=980 * MIB,
        nvml_process=600 * MIB,
        nvml_used=700 * MIB,
        nvml_reserved=20 * MIB,
        nvml_total=1000 * MIB,
        process_rss=read.process_rss,
    )


def test_cuda_without_an_index_is_the_current_device(cuda: FakeCuda):
    assert read_meters("cuda", nvml=FakeNVML()).device == "cuda:1"
    assert read_meters(torch.device("cuda"), nvml=FakeNVML()).device == "cuda:1"


@pytest.mark.parametrize("device", ["cuda:2", "meta", "mps", "xpu:0"])
def test_a_device_without_meters_is_refused(cuda: FakeCuda, device: str):
    with pytest.raises(InvalidArgumentError, match=f"meters of {device} asked for, there are cpu, cuda:0, cuda:1"):
        read_meters(device, nvml=FakeNVML())


def test_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for device in ("cuda", "cuda:0"):
        with pytest.raises(InvalidArgumentError, match=f"meters of {device} asked for, there are cpu:"):
            read_meters(device)


def test_a_mig_slice_is_found_by_its_own_uuid(cuda: FakeCuda):
    nvml = FakeNVML(known_uuid=f"MIG-{UUID}")
    read = read_meters("cuda:1", nvml=nvml)
    assert (read.nvml_process, read.nvml_used, read.notes) == (600 * MIB, 700 * MIB, ())


def test_a_uuid_nvml_does_not_know_is_a_note(cuda: FakeCuda):
    read = read_meters("cuda:1", nvml=FakeNVML(known_uuid="GPU-another"))
    assert read.nvml_total is None
    assert read.notes == ("NVML's figures are not known: FakeNotFound: fake failure 6",)


def test_a_transient_failure_of_the_handle_is_not_retried_as_mig(cuda: FakeCuda):
    nvml = FakeNVML(fail={"nvmlDeviceGetHandleByUUID": FakeError(10)})
    assert "fake failure 10" in read_meters("cuda:1", nvml=nvml).notes[0]
    assert nvml.calls.count("nvmlDeviceGetHandleByUUID") == 1


@pytest.mark.parametrize("call", CALLS)
def test_no_nvml_error_code_is_a_crash(cuda: FakeCuda, call: str):
    pynvml = pytest.importorskip("pynvml")
    codes = {name: code for name, code in vars(pynvml).items() if re.fullmatch("NVML_ERROR_[A-Z0-9_]+", name)}
    assert len(codes) >= 25 and pynvml.NVML_ERROR_UNKNOWN in codes.values()
    for name, code in codes.items():
        nvml = FakeNVML(fail={call: pynvml.NVMLError(code)})
        nvml.NVMLError, nvml.NVMLError_NotFound = pynvml.NVMLError, pynvml.NVMLError_NotFound
        nvml.NVMLError_InvalidArgument = pynvml.NVMLError_InvalidArgument
        nvml.NVMLLibraryMismatchError = pynvml.NVMLLibraryMismatchError
        read = read_meters("cuda:1", nvml=nvml)
        missing = {field for field in ("nvml_process", *sorted(CALLS["nvmlInit"])) if getattr(read, field) is None}
        assert missing == CALLS[call], name
        assert len(read.notes) == 1, name
        assert "not known: NVMLError" in read.notes[0] and str(pynvml.NVMLError(code)) in read.notes[0], name
        assert read.torch_reserved == 400 * MIB and read.free == 280 * MIB, name
        assert len(ledger("cuda:1", {"weights": MIB}, nvml=nvml).lines) >= 2, name


def test_an_error_that_is_not_nvmls_is_not_hidden(cuda: FakeCuda):
    with pytest.raises(ZeroDivisionError):
        read_meters("cuda:1", nvml=FakeNVML(fail={"nvmlDeviceGetMemoryInfo": ZeroDivisionError()}))


@pytest.mark.parametrize(
    ("processes", "text"),
    [
        ([], "nothing"),
        ([(1, 600 * MIB), (2, 600 * MIB)], "nothing"),
        ([("me", None)], "[None]"),
        ([("me", 0)], "[0]"),
        ([("me", 400 * MIB - 1)], f"[{400 * MIB - 1}]"),
    ],
    ids=["no process", "pids of the host", "no figure", "zero bytes", "somebody else under our pid"],
)
def test_a_figure_that_cannot_be_this_process_is_none(cuda: FakeCuda, processes: list, text: str):
    nvml = FakeNVML(processes=[(os.getpid() if pid == "me" else -pid, size) for pid, size in processes])
    read = read_meters("cuda:1", nvml=nvml)
    assert read.nvml_process is None and read.nvml_used == 700 * MIB
    assert len(read.notes) == 1
    assert f"for pid {os.getpid()} it lists {text} and torch holds {400 * MIB} bytes" in read.notes[0]


def test_zero_bytes_are_no_figure_even_before_torch_holds_any(cuda: FakeCuda):
    cuda.allocated = cuda.reserved = 0
    assert read_meters("cuda:1", nvml=FakeNVML(processes=[(os.getpid(), 0)])).nvml_process is None


def test_a_process_listed_twice_is_summed(cuda: FakeCuda):
    nvml = FakeNVML(processes=[(os.getpid(), 350 * MIB), (os.getpid(), 250 * MIB)])
    assert read_meters("cuda:1", nvml=nvml).nvml_process == 600 * MIB


def test_without_the_package_there_is_a_note(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    read = read_meters("cuda:1")
    assert read.nvml_process is None and read.nvml_total is None and read.free == 280 * MIB
    assert len(read.notes) == 1 and "without the package nvidia-ml-py NVML's figures are not known" in read.notes[0]


def test_the_real_package_without_a_driver_is_a_note(cuda: FakeCuda):
    pytest.importorskip("pynvml")
    read = read_meters("cuda:1")  # the uuid is made up, so even with a driver there is no such device
    assert read.nvml_total is None and len(read.notes) == 1 and "NVML's figures are not known" in read.notes[0]


def test_a_driver_that_fails_is_a_note(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch):
    def fails(device):
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(torch.cuda, "mem_get_info", fails)
    read = read_meters("cuda:1", nvml=FakeNVML())
    assert read.free is None and read.total is None and read.nvml_process == 600 * MIB
    assert read.notes == (
        "the driver's free and total are not known: RuntimeError: CUDA error: an illegal memory access",
    )


def test_nvml_is_initialised_once_and_again_after_a_failure(cuda: FakeCuda):
    nvml = FakeNVML(fail={"nvmlInit": FakeError(9)})
    assert read_meters("cuda:1", nvml=nvml).nvml_total is None
    nvml.fail.clear()
    for _ in range(3):
        assert read_meters("cuda:1", nvml=nvml).nvml_total == 1000 * MIB
    assert nvml.calls.count("nvmlInit") == 2 and "nvmlShutdown" not in nvml.calls


def test_nvml_is_shut_down_at_exit_and_quietly():
    code = """
import pytest, sys
sys.path.insert(0, "tests")
from test_memory import FakeCuda, FakeError, FakeNVML
from graphattn.memory import read_meters
class Told(FakeNVML):
    def nvmlShutdown(self):
        print("shut down", flush=True)
        raise FakeError(1)
FakeCuda(pytest.MonkeyPatch())
nvml = Told()
read_meters("cuda:1", nvml=nvml), read_meters("cuda:1", nvml=nvml)
print("done", flush=True)
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stdout) == (0, "done\nshut down\n"), ran.stderr
    assert "FakeError" not in ran.stderr


def test_cpu_reads_the_host():
    block = torch.ones(64 * MIB, dtype=torch.uint8)  # touched, so it is resident
    read = read_meters("cpu", nvml=FakeNVML(fail={"nvmlInit": AssertionError("asked NVML about a CPU")}))
    assert (read.device, read.source, read.torch_allocated, read.torch_reserved) == ("cpu", "host", 0, 0)
    assert (read.nvml_process, read.nvml_used, read.nvml_reserved, read.nvml_total) == (None,) * 4
    assert block.numel() < read.process_rss < read.total and 0 < read.free < read.total
    assert read.total == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert read.notes == ()


def test_the_resident_memory_agrees_with_the_kernels_other_figure():
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    assert abs(read_meters("cpu").process_rss - int(found[1]) * 1024) < 16 * MIB


@pytest.mark.parametrize(
    ("limit", "current", "free", "total"),
    [("max", 5, 700, 1000), ("800", "300", 500, 800), ("2000", "100", 700, 1000), ("800", "900", 0, 800)],
)
def test_a_containers_limit_is_what_is_free(tmp_path, limit, current, free, total):
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{current}\n")
    readings = {"free": 700, "total": 1000}
    meters._apply_container_limit(readings, tmp_path)
    assert readings == {"free": free, "total": total}


def test_without_proc_there_is_a_note(monkeypatch: pytest.MonkeyPatch):
    def missing(self, *arguments, **options):
        raise FileNotFoundError(2, "No such file or directory", str(self))

    monkeypatch.setattr(Path, "read_text", missing)
    book = ledger("cpu", {"weights": MIB}, predicted={CPU_REST: 3 * MIB})
    assert (book.meters.process_rss, book.meters.free, book.meters.total) == (None, None, None)
    assert sizes(book) == {"weights": MIB}
    assert "/proc/self/statm" in book.notes[0]
    assert book.notes[1] == f"'{CPU_REST}' cannot be told: host has ? MiB, lines in it 1.0, predicted 3.0"
    assert "memory of cpu: ? of ? MiB free (host)" in str(book)


def test_a_kernel_without_memavailable_is_a_note(monkeypatch: pytest.MonkeyPatch):
    real = Path.read_text
    text = "MemTotal:  2048 kB\nMemFree: 100 kB"
    monkeypatch.setattr(Path, "read_text", lambda self: text if self.name == "meminfo" else real(self))
    read = read_meters("cpu")
    assert read.free is None and read.total is None and read.process_rss > 0
    assert read.notes == ("the host's figures are not known: KeyError: 'MemAvailable'",)


# the ledger


def test_the_lines_on_cuda(cuda: FakeCuda):
    cuda.pools = {(0, 1): (40 * MIB, 35 * MIB), (0, 2): (5 * MIB, 5 * MIB)}
    book = ledger(
        "cuda:1",
        {"weights": 170 * MIB, "KV pages": 80 * MIB},
        pools={"graph pool": (0, 1)},
        driver_parts={"graphs": 30 * MIB},
        predicted={"KV pages": 81 * MIB, "graphs": 0, "other processes": 5 * MIB, "other torch": 0},
        nvml=FakeNVML(),
    )
    lines = [
        LedgerLine(name="weights", bytes=170 * MIB, meter="tensors"),
        LedgerLine(name="KV pages", bytes=80 * MIB, meter="tensors", predicted=81 * MIB),
        LedgerLine(name="graph pool", bytes=40 * MIB, meter="torch"),
        LedgerLine(name="other graph pools", bytes=5 * MIB, meter="torch"),
        LedgerLine(name="graphs", bytes=30 * MIB, meter="driver", predicted=0),
        LedgerLine(name="activations and cache", bytes=95 * MIB, meter="torch"),
        LedgerLine(name="other torch", bytes=(300 - 35 - 5 - 250) * MIB, meter="torch", predicted=0),
        LedgerLine(name="CUDA context and libraries", bytes=170 * MIB, meter="nvml"),
        LedgerLine(name="other processes", bytes=100 * MIB, meter="nvml", predicted=5 * MIB),
        LedgerLine(name="reserved by the driver", bytes=20 * MIB, meter="nvml"),
    ]
    assert book == Ledger(device="cuda:1", lines=tuple(lines), meters=book.meters)
    assert (book.meters.nvml_process, book.meters.torch_reserved) == (600 * MIB, 400 * MIB)
    assert [line.name for line in book.lines if line.is_off] == ["graphs", "other torch", "other processes"]


BYTES = st.integers(0, 1 << 42)
NAMES = st.sampled_from(["weights", "KV pages", "workspaces", "static buffers", "tables"])


POOLS = st.tuples(BYTES, BYTES).map(sorted)


@given(
    parts=st.dictionaries(NAMES, BYTES),
    graphs=st.dictionaries(st.just("graphs"), BYTES),
    other_torch=BYTES,
    cached=BYTES,
    pools=st.dictionaries(
        st.tuples(st.integers(0, 9), st.integers(1, 9)), st.tuples(BYTES, BYTES).map(sorted), max_size=3
    ),
    context=st.integers(1, 1 << 40),
    others=BYTES,
    driver=BYTES,
    free=BYTES,
)
def test_the_lines_add_up_and_recover_the_truth(
    parts, graphs, other_torch, cached, pools, context, others, driver, free
):
    with pytest.MonkeyPatch.context() as patch:
        cuda = FakeCuda(patch)
        cuda.pools = {pool: (reserved, allocated) for pool, (allocated, reserved) in pools.items()}
        cuda.allocated = sum(parts.values()) + other_torch + sum(allocated for allocated, _ in pools.values())
        private = {pool: reserved for pool, (_, reserved) in pools.items()}
        ours = next(iter(pools), (8, 8))
        cuda.reserved = sum(parts.values()) + other_torch + cached + sum(private.values())
        process = cuda.reserved + sum(graphs.values()) + context
        used = process + others
        nvml = FakeNVML(
            total=used + driver + free, used=used, reserved=driver, processes=[(7, others), (os.getpid(), process)]
        )
        book = ledger("cuda:1", parts, pools={"ours": ours}, driver_parts=graphs, nvml=nvml)
    truth = dict(zip(CUDA_LINES, (cached, other_torch, context, others, driver), strict=True))
    truth["ours"] = private.pop(ours, 0)
    truth["other graph pools"] = sum(private.values())
    assert sizes(book) == {**parts, **graphs, **truth}
    assert sum(sizes(book).values()) == used + driver
    assert book.notes == ()


@given(parts=st.dictionaries(NAMES, BYTES), reserved=BYTES, allocated=BYTES, process=BYTES, used=BYTES, graphs=BYTES)
def test_whatever_the_meters_say_no_line_is_negative_and_none_is_lost_silently(
    parts, reserved, allocated, process, used, graphs
):
    with pytest.MonkeyPatch.context() as patch:
        cuda = FakeCuda(patch)
        cuda.reserved, cuda.allocated = reserved, allocated
        nvml = FakeNVML(total=used + 3, used=used, reserved=3, processes=[(os.getpid(), process)])
        book = ledger("cuda:1", parts, driver_parts={"graphs": graphs}, nvml=nvml)
    found = sizes(book)
    assert min(found.values()) >= 0
    stand_in = {"CUDA context and libraries", "other processes"} - set(found)
    known = [name for name in CUDA_LINES if name not in stand_in or book.meters.nvml_process is not None]
    for name in known:
        assert (name in found) != any(note.startswith(f"'{name}' cannot be told") for note in book.notes), name
    inside = sum(parts.values()) + found.get("other torch", 0)
    if "other torch" in found:
        assert inside == allocated
    inside += found.get("activations and cache", 0)
    if {"other torch", "activations and cache"} <= set(found):
        assert inside == reserved
    if {"other torch", "activations and cache", "CUDA context and libraries"} <= set(found):
        assert inside + graphs + found["CUDA context and libraries"] == process
    if set(CUDA_LINES) <= set(found):
        assert sum(found.values()) == used + 3


STAND_IN = (
    "the driver's free memory is used in place of NVML's figure for this process: what others hold is not told apart "
    "from this process's CUDA context and libraries"
)


def test_without_a_figure_for_the_process_the_driver_stands_in_and_is_named(cuda: FakeCuda):
    book = ledger("cuda:1", {"weights": 300 * MIB}, driver_parts={"graphs": 30 * MIB}, nvml=FakeNVML(processes=[]))
    assert sizes(book) == {
        "weights": 300 * MIB,
        "other graph pools": 0,
        "graphs": 30 * MIB,
        "activations and cache": 100 * MIB,
        "other torch": 0,
        "CUDA context and other processes": (980 - 280 - 400 - 30) * MIB,
        "reserved by the driver": 20 * MIB,
    }
    assert {line.name: line.meter for line in book.lines}["CUDA context and other processes"] == "driver"
    assert len(book.notes) == 2 and "for pid" in book.notes[0] and book.notes[1] == STAND_IN
    assert sum(sizes(book).values()) == cuda.total - cuda.free + 20 * MIB


def test_without_nvml_the_driver_stands_in_for_all_of_it(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    book = ledger("cuda:1", {"weights": 300 * MIB})
    assert sizes(book)["CUDA context and other processes"] == 300 * MIB
    assert "without the package nvidia-ml-py" in book.notes[0] and book.notes[1] == STAND_IN
    assert book.notes[2] == "'reserved by the driver' cannot be told: nvml has ? MiB, lines in it 0.0, predicted ?"


def test_parts_beyond_what_torch_holds_are_said_not_clipped(cuda: FakeCuda):
    book = ledger("cuda:1", {"weights": 301 * MIB}, nvml=FakeNVML())
    assert sizes(book) == {
        "weights": 301 * MIB,
        "other graph pools": 0,
        "activations and cache": 100 * MIB,
        "other processes": 100 * MIB,
        "reserved by the driver": 20 * MIB,
    }
    assert book.notes[0] == "'other torch' cannot be told: torch has 300.0 MiB, lines in it 301.0, predicted ?"
    assert book.notes[1].startswith("'CUDA context and libraries' cannot be told")


@pytest.mark.parametrize(
    ("actual", "predicted", "off"),
    [(0, 8 * MIB, False), (0, 8 * MIB + 1, True), (1000 * MIB, 980 * MIB, False), (1000 * MIB, 1021 * MIB, True)],
)
def test_a_prediction_holds_within_the_larger_of_two_percent_and_8_mib(actual: int, predicted: int, off: bool):
    line = LedgerLine(name="graphs", bytes=actual, meter="driver", predicted=predicted)
    assert line.is_off == off
    book = Ledger(device="cpu", lines=(line,), meters=read_meters("cpu"))
    assert str(book).splitlines()[2].endswith("driver, off" if off else "driver")


def test_what_was_to_be_left_free_is_told_beside_what_is():
    assert f"MiB free (host), {5:.1f} predicted" in str(ledger("cpu", predicted_free=5 * MIB))


def test_without_a_device_it_is_the_current_one_or_the_cpu(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch):
    assert ledger(nvml=FakeNVML()).device == "cuda:1"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert ledger().device == "cpu"


def test_a_function_that_the_driver_lacks_is_a_note(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch):
    """pynvml's own wrapper turns that code into an exception that is no NVMLError."""
    pynvml = pytest.importorskip("pynvml")

    def lacks(name: str):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)

    nvml = FakeNVML()
    nvml.NVMLError, nvml.NVMLLibraryMismatchError = pynvml.NVMLError, pynvml.NVMLLibraryMismatchError
    nvml.nvmlDeviceGetComputeRunningProcesses = pynvml.nvmlDeviceGetComputeRunningProcesses
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer", lacks)
    read = read_meters("cuda:1", nvml=nvml)
    assert (read.nvml_process, read.nvml_used) == (None, 700 * MIB)
    assert "NVML's figure for this process is not known: NVMLLibraryMismatchError" in read.notes[0]


def test_on_cpu_the_lines_add_up_to_the_resident_memory():
    block = torch.ones(32 * MIB, dtype=torch.uint8)
    book = ledger("cpu", {"block": block.nbytes}, predicted={CPU_REST: 0})
    rest = book.meters.process_rss - block.nbytes
    assert book.rows() == [
        {"name": "block", "bytes": 32 * MIB, "meter": "tensors", "predicted": None},
        {"name": CPU_REST, "bytes": rest, "meter": "host", "predicted": 0},
    ]
    assert book.notes == ()


def test_on_cpu_parts_that_are_not_resident_leave_nothing_and_a_note():
    book = ledger("cpu", {"never touched": 1 << 50})
    assert sizes(book) == {"never touched": 1 << 50, CPU_REST: 0}
    assert len(book.notes) == 1 and f"'{CPU_REST}' cannot be told: host has" in book.notes[0]


@pytest.mark.parametrize(
    ("parts", "more", "complaint"),
    [
        ({"weights": -1}, {}, "weights is a count of bytes"),
        ({"weights": 1.5}, {}, "got 1.5"),
        ({"weights": "1"}, {}, "got '1'"),
        ({"weights": 1}, {"predicted": {"weights": -2}}, "got -2"),
        ({"weights": 1}, {"driver_parts": {"graphs": -3}}, "got -3"),
        ({"weights": 1}, {"predicted": {"wieghts": 1}}, "wieghts"),
        ({"weights": 1}, {"predicted": {"other torch": 1}}, "other torch"),
        ({"weights": 1}, {"driver_parts": {"weights": 1}}, "name each once"),
        ({CPU_REST: 1}, {}, "name each once"),
    ],
)
def test_parts_that_cannot_be_are_refused(parts, more, complaint: str):
    with pytest.raises(InvalidArgumentError, match=complaint):
        ledger("cpu", parts, **more)


def made_up(*, predicted: int | None, notes: tuple[str, ...] = ()) -> Ledger:
    lines = (
        LedgerLine(name="weights", bytes=1234 * MIB, meter="tensors", predicted=predicted),
        LedgerLine(name="other torch", bytes=MIB // 2, meter="torch"),
    )
    meters = Meters(device="cuda:0", source="driver", free=70 * MIB, total=80 * MIB, process_rss=MIB, notes=notes[:1])
    return Ledger(device="cuda:0", lines=lines, meters=meters, notes=notes)


def test_the_table():
    assert str(made_up(predicted=1200 * MIB, notes=("one thing", "another"))) == (
        "memory of cuda:0: 70.0 of 80.0 MiB free (driver)\n"
        "part             MiB  predicted  meter\n"
        "weights      1,234.0    1,200.0  tensors, off\n"
        "other torch      0.5             torch\n"
        "sum          1,234.5\n"
        "note: one thing\n"
        "note: another"
    )


def test_the_table_has_no_predictions_where_there_are_none():
    text = str(made_up(predicted=None))
    assert "predicted" not in text and "note" not in text
    assert str(made_up(predicted=0)).splitlines()[2].split() == ["weights", "1,234.0", "0.0", "tensors,", "off"]


def test_json_comes_back_as_it_went():
    book = made_up(predicted=7, notes=("one thing", "another"))
    there = book.to_json()
    back = json.loads(json.dumps(there))
    assert back == there and back["schema_version"] == 2
    assert back["lines"] == book.rows()
    meters = Meters(**{**back["meters"], "notes": tuple(back["meters"]["notes"])})
    lines = tuple(LedgerLine(**row) for row in back["lines"])
    assert Ledger(device=back["device"], lines=lines, meters=meters, notes=tuple(back["notes"])) == book


def test_json_of_a_real_ledger():
    book = ledger("cpu", {"weights": 5})
    assert json.loads(json.dumps(book.to_json())) == book.to_json()


def test_all_is_frozen_and_keyword_only():
    book = made_up(predicted=None)
    for thing, name in ((book, "lines"), (book.lines[0], "bytes"), (book.meters, "free")):
        with pytest.raises(FrozenInstanceError):
            setattr(thing, name, 0)
    with pytest.raises(TypeError):
        LedgerLine("weights", 1, "tensors")


# tensors


def test_tied_weights_count_once():
    embedding, head = torch.nn.Embedding(100, 16), torch.nn.Linear(16, 100, bias=False)
    apart = tensor_bytes([*embedding.parameters(), *head.parameters()])
    head.weight = embedding.weight
    tied = tensor_bytes([embedding.weight, head.weight])
    head.weight = torch.nn.Parameter(embedding.weight.detach())  # another tensor over the same storage
    assert (apart, tied, tensor_bytes([embedding.weight, head.weight])) == (12800, 6400, 6400)


def test_views_count_as_their_storage():
    qkv = torch.zeros(30, 8, dtype=torch.bfloat16)
    assert tensor_bytes(qkv.split(10)) == tensor_bytes([qkv[3:4]]) == tensor_bytes([qkv, qkv.T]) == 480


def test_temporaries_are_all_counted():
    assert tensor_bytes(torch.zeros(1000, dtype=torch.uint8) + i for i in range(50)) == 50_000


def test_two_storages_over_the_same_bytes_count_once():
    array = torch.zeros(100).numpy()
    assert tensor_bytes([torch.from_numpy(array), torch.from_numpy(array)]) == 400


def test_tensors_without_bytes():
    assert tensor_bytes([]) == 0
    assert tensor_bytes([torch.empty(0), torch.empty(0), torch.empty(5, device="meta")]) == 0


def test_a_wrapper_counts_as_what_it_wraps():
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor")
    a, b = torch.ones(4), torch.ones(4)
    assert tensor_bytes([two_tensor.TwoTensor(a, b), b]) == 32


# pages


@pytest.mark.parametrize(
    ("arguments", "pages"),
    [
        ({"page_bytes": 1000, "kv_bytes": 2000}, 2),
        ({"page_bytes": 1000, "kv_bytes": 2999}, 2),
        ({"page_bytes": 1000, "kv_bytes": 3000, "memory_fraction": 0.1, "reserve": 2999}, 3),
        ({"page_bytes": 1000, "free": 10_000}, 9),
        ({"page_bytes": 1000, "free": 10_000, "memory_fraction": 1}, 10),
        ({"page_bytes": 1000, "free": 10_000, "memory_fraction": 0.5, "reserve": 3000}, 2),
        ({"page_bytes": 1 << 20, "free": 80 << 30, "memory_fraction": 0.75, "reserve": 10 << 30}, 50 << 10),
        ({"page_bytes": 1, "free": (1 << 60) + 1, "memory_fraction": 1.0}, (1 << 60) + 1),
        ({"page_bytes": MIB, "free": 100 * MIB, "memory_fraction": 1.0, "num_tensors": 4}, 96),
        ({"page_bytes": MIB, "free": 47 * MIB, "memory_fraction": 1.0, "num_tensors": 4}, 40),
        ({"page_bytes": MIB, "free": 39 * MIB, "memory_fraction": 1.0, "num_tensors": 4}, 39),
        ({"page_bytes": 3 * MIB, "free": 100 * MIB, "memory_fraction": 1.0, "num_tensors": 2}, 33),
    ],
)
def test_pages_that_fit(arguments: dict, pages: int):
    assert pages_that_fit(**arguments) == pages


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"page_bytes": 1000, "kv_bytes": 1999}, "1999 bytes hold fewer than 2 pages"),
        ({"page_bytes": 1000, "kv_bytes": 0}, "0 bytes hold fewer"),
        ({"page_bytes": 1000, "free": 10_000, "memory_fraction": 0.5, "reserve": 3001}, "1999 bytes hold fewer"),
        ({"page_bytes": 1000, "free": 10_000, "reserve": 20_000}, "-11000 bytes hold fewer"),
        ({"page_bytes": 0, "free": 10_000}, "'page_bytes': 0"),
        ({"page_bytes": -1, "free": 10_000}, "page_bytes is a count of bytes .* got -1"),
        ({"page_bytes": 1000.0, "free": 10_000}, "got 1000.0"),
        ({"page_bytes": 1000, "free": -1}, "free is a count of bytes .* got -1"),
        ({"page_bytes": 1000, "kv_bytes": -1}, "kv_bytes is a count of bytes .* got -1"),
        ({"page_bytes": 1000, "free": 10_000, "reserve": -1}, "reserve is a count of bytes .* got -1"),
        ({"page_bytes": 1000}, "'kv_bytes': None, 'free': None.* pass one of kv_bytes and free"),
        ({"page_bytes": 1000, "free": 4000, "kv_bytes": 5000}, "'kv_bytes': 5000, 'free': 4000.* pass one of"),
        ({"page_bytes": 1000, "free": 10_000, "memory_fraction": 0.0}, "memory_fraction=0.0"),
        ({"page_bytes": 1000, "free": 10_000, "memory_fraction": 1.01}, "memory_fraction=1.01"),
        ({"page_bytes": 1000, "free": 10_000, "memory_fraction": float("nan")}, "memory_fraction=nan"),
        ({"page_bytes": 1000, "kv_bytes": 10_000, "memory_fraction": 2.0}, "memory_fraction=2.0"),
    ],
)
def test_pages_that_do_not_fit_are_refused_with_numbers(arguments: dict, complaint: str):
    with pytest.raises(InvalidArgumentError, match=complaint):
        pages_that_fit(**arguments)


@given(
    page_bytes=st.integers(1, 1 << 30),
    free=st.integers(0, 1 << 50),
    fraction=st.floats(0, 1, exclude_min=True),
    reserve=st.integers(0, 1 << 45),
)
def test_as_many_pages_as_fit_and_no_more(page_bytes: int, free: int, fraction: float, reserve: int):
    allowed = Fraction(fraction) * free - reserve
    if allowed < 2 * page_bytes:
        with pytest.raises(InvalidArgumentError):
            pages_that_fit(page_bytes=page_bytes, free=free, memory_fraction=fraction, reserve=reserve)
    else:
        pages = pages_that_fit(page_bytes=page_bytes, free=free, memory_fraction=fraction, reserve=reserve)
        assert pages * page_bytes <= allowed < (pages + 1) * page_bytes


@given(page_bytes=st.integers(1, 1 << 30), kv_bytes=st.integers(0, 1 << 50))
def test_bytes_asked_for_are_taken_whole(page_bytes: int, kv_bytes: int):
    assume(kv_bytes >= 2 * page_bytes)
    pages = pages_that_fit(page_bytes=page_bytes, kv_bytes=kv_bytes)
    assert pages * page_bytes <= kv_bytes < (pages + 1) * page_bytes


# the module


def test_the_import_is_lean():
    code = """
import sys, torch
def touched(*arguments, **options):
    raise AssertionError("CUDA was initialised")
torch.cuda._lazy_init = torch.cuda.current_device = torch.cuda.device_count = torch.cuda.is_available = touched
sys.modules.pop("pynvml", None)  # torch itself imports it where it is installed
before = set(sys.modules)
import graphattn.memory
new = set(sys.modules) - before
assert "pynvml" not in new, "imported pynvml"
assert not [m for m in new if m.split(".")[0] in ("flashinfer", "transformers", "triton")], new
assert not torch.cuda.is_initialized()
graphattn.memory.tensor_bytes([torch.zeros(3)])
assert "pynvml" not in sys.modules
print("lean")
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stdout) == (0, "lean\n"), ran.stderr


def test_the_examples_in_the_docstrings():
    for module, least in ((memory, 3), (meters, 1), (ledgers, 2), (watches, 1)):
        failed, tried = doctest.testmod(module)
        assert (failed, tried >= least) == (0, True), module


@pytest.mark.gpu
def test_on_a_real_device():
    before = torch.cuda.memory_allocated()
    block = torch.ones(256 * MIB, dtype=torch.uint8, device="cuda")
    book = ledger("cuda", {"block": tensor_bytes([block])})
    print(book)
    read = book.meters
    assert 256 * MIB <= read.torch_allocated <= read.torch_reserved <= read.total - read.free
    assert sizes(book)["other torch"] == before
    if read.nvml_total is not None:
        assert read.total <= read.nvml_total and read.torch_reserved <= read.nvml_used <= read.nvml_total
    if read.nvml_process is not None:
        assert read.torch_reserved < read.nvml_process <= read.nvml_used
        assert sum(sizes(book).values()) == read.nvml_used + read.nvml_reserved
    assert (read.nvml_process is None) == (len(book.notes) > 0)
