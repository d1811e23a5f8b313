"""Figures of other engines that were measured elsewhere, on the same kind of device: published.json."""

from __future__ import annotations

import json
from pathlib import Path

FILE = Path(__file__).parent / "published.json"


def published() -> dict:
    """The whole file."""
    return json.loads(FILE.read_text())


def decode_figures(shape: str, context: int | None) -> dict[str, dict[int, float]]:
    """Milliseconds per step by engine and batch size, for a shape and a context; empty where nobody published any."""
    for entry in published()["decode"]:
        if entry["shape"] == shape and entry["context"] == context:
            return {
                name: {int(batch): ms for batch, ms in figures.items()} for name, figures in entry["step_ms"].items()
            }
    return {}


def nano_figures(shape: str, requests: int, longest: int) -> dict[str, float]:
    """Output tokens per second by engine."""
    for entry in published()["nano"]:
        if (entry["shape"], entry["requests"], entry["longest"]) == (shape, requests, longest):
            return entry["tokens_per_s"]
    return {}
