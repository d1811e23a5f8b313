"""Importing nano-vLLM where flash-attn is not installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder
from importlib.util import find_spec
from types import ModuleType

ATTENTION = "nanovllm.layers.attention"  # the one module that imports it


def _not_installed(*arguments, **options):
    raise ImportError(
        "nano-vLLM called flash-attn, which is not installed: call graphattn.integrations.nanovllm.install() before an "
        "engine is made, or install flash-attn"
    )


class _Finder:
    """Finds `nanovllm.layers.attention`, to be executed while a `flash_attn` that computes nothing can be imported.

    No other module sees that one: some ask whether flash-attn is there, and remember the answer.
    """

    def find_spec(self, name, path=None, target=None):
        spec = PathFinder.find_spec(name, path) if name == ATTENTION else None
        if spec is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                stand_in = ModuleType("flash_attn")
                stand_in.flash_attn_varlen_func = stand_in.flash_attn_with_kvcache = _not_installed
                sys.modules["flash_attn"] = stand_in
                try:
                    execute(module)
                finally:
                    del sys.modules["flash_attn"]

            spec.loader.exec_module = exec_module
        return spec


@contextmanager
def without_flash_attn() -> Iterator[None]:
    """Lets nano-vLLM be imported with or without flash-attn."""
    if "flash_attn" in sys.modules or find_spec("flash_attn") is not None:
        yield
        return
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
