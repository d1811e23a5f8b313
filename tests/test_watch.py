"""The leak check: what leaks is named with its meter, what comes back is not, on a CPU and over a made-up device."""

from __future__ import annotations

import os

import pytest
import torch
from test_memory import MIB, FakeCuda, FakeNVML
from tiny import tiny

from graphattn import LLM, InvalidArgumentError, MemoryLeakError, SamplingParams, memory

KEPT: list[torch.Tensor] = []


@pytest.fixture(autouse=True)
def nothing_kept():
    yield
    KEPT.clear()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda device=None: None)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    return FakeCuda(monkeypatch)


def test_what_comes_back_is_no_leak() -> None:
    with memory.watch("cpu"):
        for _ in range(3):
            torch.zeros(1000)


def test_a_kept_tensor_is_named_with_its_bytes() -> None:
    with pytest.raises(MemoryLeakError) as caught, memory.watch("cpu"):
        KEPT.extend(torch.zeros(3, MIB, dtype=torch.int8) for _ in range(2))
    said = str(caught.value)
    assert "memory of cpu has not come back: tensors: +6.000 MiB" in said and "tolerance 0.0" in said
    assert "New tensors: 2 x int8[3, 1048576]." in said
    assert "resident memory of the host" in said and "told only" in said


def test_one_byte_is_a_leak_of_tensors() -> None:
    with pytest.raises(MemoryLeakError, match=r"1 x bool\[1\]"), memory.watch("cpu"):
        KEPT.append(torch.zeros(1, dtype=torch.bool))


def test_a_cycle_of_objects_is_collected_first() -> None:
    with memory.watch("cpu"):
        ring: list = [torch.zeros(1000)]
        ring.append(ring)
        del ring


def test_a_view_of_what_was_there_is_no_leak() -> None:
    base = torch.zeros(1000)
    with memory.watch("cpu"):
        KEPT.append(base[:10])


def test_what_only_stands_for_a_tensor_holds_nothing() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with memory.watch("cpu"), FakeTensorMode():
        KEPT.append(torch.empty(1000))
        KEPT.append(torch.empty(1000, device="meta"))


def test_from_the_mark_on() -> None:
    with memory.watch("cpu") as watched:
        KEPT.append(torch.zeros(1000))
        watched.mark()
        assert not [growth for growth in watched.growth() if growth.is_leak]
    with pytest.raises(MemoryLeakError), memory.watch("cpu") as watched:
        watched.mark()
        KEPT.append(torch.zeros(1000))
        watched.mark()
        KEPT.append(torch.zeros(1000))


def test_an_error_inside_goes_first() -> None:
    with pytest.raises(ZeroDivisionError), memory.watch("cpu"):
        KEPT.append(torch.zeros(1000))
        raise ZeroDivisionError


@pytest.mark.parametrize("tolerance", [-1, 1.5, "1"])
def test_a_tolerance_is_a_count_of_bytes(tolerance) -> None:
    with pytest.raises(InvalidArgumentError, match="it is a count of bytes"), memory.watch("cpu", tolerance=tolerance):
        pass


@pytest.mark.parametrize("device", ["meta", "cuda:7"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"meters of {device} asked for"), memory.watch(device):
        pass


@pytest.mark.parametrize(
    ("grown", "said"),
    [
        ({"allocated": MIB}, None),
        ({"allocated": MIB + 1}, "come back: torch allocated: +1.000 MiB (300.0 -> 301.0, tolerance 1.0)"),
        ({"reserved": 8 * MIB}, None),
        ({"reserved": 9 * MIB}, "come back: torch reserved: +9.000 MiB (400.0 -> 409.0, tolerance 8.0)"),
        ({"process": 8 * MIB}, None),
        ({"process": 9 * MIB}, "come back: NVML, this process: +9.000 MiB (600.0 -> 609.0, tolerance 8.0)"),
        ({"free": -90 * MIB}, None),
    ],
    ids=str,
)
def test_every_meter_of_a_device_is_judged_by_its_tolerance(cuda: FakeCuda, grown: dict, said: str | None) -> None:
    nvml = FakeNVML()

    def grow() -> None:
        for name in ("allocated", "reserved", "free"):
            setattr(cuda, name, getattr(cuda, name) + grown.get(name, 0))
        nvml.processes = [(os.getpid(), 600 * MIB + grown.get("process", 0))]

    if said is None:
        with memory.watch("cuda:1", nvml=nvml):
            grow()
        return
    with pytest.raises(MemoryLeakError) as caught, memory.watch("cuda:1", nvml=nvml):
        grow()
    assert said in str(caught.value)
    assert "driver, all processes: +0.000 MiB (700.0 -> 700.0, told only)" in str(caught.value)


def test_where_nvml_hides_the_process_the_driver_is_judged_and_that_is_said(cuda: FakeCuda) -> None:
    with pytest.raises(MemoryLeakError) as caught, memory.watch("cuda:1", nvml=FakeNVML(processes=[]), tolerance=MIB):
        cuda.free -= 2 * MIB
    assert "come back: driver, all processes: +2.000 MiB (700.0 -> 702.0, tolerance 1.0)" in str(caught.value)
    assert "New tensors: none that Python sees" in str(caught.value) and "containers hide pids" in str(caught.value)


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.inductor)])
def test_an_engine_gives_everything_back(compile: bool) -> None:
    """Closed or left by `with`, run or not, and the model stays as it was."""
    model = tiny("llama", num_layers=1)
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    with memory.watch("cpu") as watched:
        for cycle in range(4):
            with LLM(model, max_batch=4, num_pages=40, compile=compile) as llm:
                assert len(llm.generate([[1, 2], [3]], params)) == 2
            held = llm  # a closed engine that somebody keeps holds nothing
            if cycle == 0:
                watched.mark()
        held.close()


def test_an_engine_that_is_not_closed_is_a_leak() -> None:
    model, engines = tiny("llama", num_layers=1), []
    with pytest.raises(MemoryLeakError, match=r"float64\[40, 16, 2, 16\]"), memory.watch("cpu"):
        engines.append(LLM(model, max_batch=4, num_pages=40))
    engines.pop().close()
