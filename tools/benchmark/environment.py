"""What was measured on: device, driver, clocks, versions, commit and command."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

PACKAGES = ("transformers", "triton")


def environment(device: str, commit: str | None) -> dict:
    """Device, driver, versions, commit and command."""
    found = {"command": " ".join(["python", *sys.argv]), "commit": commit or _git_commit()}
    found |= {"python": platform.python_version(), "torch": torch.__version__, "cpu": platform.processor()}
    found |= {package: package_version(package) for package in PACKAGES}
    if device == "cuda":
        import flashinfer

        found["flashinfer"] = flashinfer.__version__
        found["device"], found["driver"] = torch.cuda.get_device_name(), _driver()
    else:
        found["device"] = f"CPU, {torch.get_num_threads()} threads"
    return found


def package_version(package: str) -> str | None:
    """The installed version; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def clocks(device: str) -> dict | None:
    """SM and memory clock in MHz, power in W and temperature in C as NVML has them now.

    None on a CPU and without nvidia-ml-py; a reading that fails is None, with an `error` beside.
    """
    nvml = _nvml() if device == "cuda" else None
    if nvml is None:
        return None
    readings = {
        "sm_mhz": lambda handle: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
        "memory_mhz": lambda handle: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
        "power_w": lambda handle: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
        "temperature_c": lambda handle: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
    }
    found: dict = dict.fromkeys(readings)
    try:
        # By UUID: NVML's indices ignore CUDA_VISIBLE_DEVICES.
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
    except nvml.NVMLError as error:
        return found | {"error": f"{type(error).__name__}: {error}"}
    for name, read in readings.items():
        try:
            found[name] = read(handle)
        except nvml.NVMLError as error:
            found["error"] = f"{name}: {type(error).__name__}: {error}"
    return found


def _nvml():
    if find_spec("pynvml") is None:
        return None
    import pynvml

    pynvml.nvmlInit()
    return pynvml


def _driver() -> str | None:
    nvml = _nvml()
    return None if nvml is None else nvml.nvmlSystemGetDriverVersion()


def _git_commit() -> str | None:
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()
