"""transformers models on graphattn's layer."""

from __future__ import annotations

from .attach import Attachment, attach, detach
from .load import load_model

__all__ = ["Attachment", "attach", "detach", "load_model"]
