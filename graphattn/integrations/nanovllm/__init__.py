"""nano-vLLM, unmodified, on this layer: `install()` before its engines are made, or

    python -m graphattn.integrations.nanovllm your_script.py

Its scheduler, block manager, sampler and model stay; attention, cache, planning and CUDA graphs are graphattn's.
"""

from __future__ import annotations

from .layout import LayoutError
from .patch import install, uninstall

__all__ = ["LayoutError", "install", "uninstall"]
