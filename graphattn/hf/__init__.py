"""transformers models on graphattn's layer."""

from __future__ import annotations

from .attach import Attachment, attach
from .load import load_model

__all__ = ["Attachment", "attach", "load_model"]
