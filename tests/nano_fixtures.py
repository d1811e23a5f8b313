"""Fixtures of the tests of nano-vLLM: either of its engines, and everything as it was afterwards."""

from __future__ import annotations

import sys

import nano_cpu
import pytest
import torch
from nano_engines import Minimal, Package, forget, needs_package

from graphattn.integrations import nanovllm
from graphattn.integrations.nanovllm.serving import OPEN


@pytest.fixture
def restored():
    """nano-vLLM is as it was before, and after, and so is what it sets for the process."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    forget()
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for left in list(OPEN):  # by a test that failed
        left.close()
    nanovllm.uninstall()
    forget()
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.fixture
def cuda(monkeypatch, tmp_path):
    return nano_cpu.Cuda(monkeypatch, tmp_path)


@pytest.fixture
def package(cuda, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "flash_attn", nano_cpu.flash_attn())
    return Package(tmp_path)


@pytest.fixture(params=["minimal", pytest.param("package", marks=needs_package)])
def nano(request, monkeypatch):
    """Either engine, importable, with a flash-attn of its own."""
    if request.param == "package":
        return request.getfixturevalue("package")
    torch.set_default_dtype(torch.float64)
    return Minimal(monkeypatch)
