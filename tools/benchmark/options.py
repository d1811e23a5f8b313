"""Options that more than one tool takes."""

from __future__ import annotations

import re

import typer

COUNT = r"[1-9][0-9]*k?"


def read_counts(option: str, text: str) -> list[int]:
    """Counts with commas between them; 8k is 8192.

    Raises:
        typer.BadParameter: one is no count.
    """
    if re.fullmatch(f"{COUNT}(,{COUNT})*", text) is None:
        raise typer.BadParameter(f"{option} {text!r}: give counts from 1 up, with commas; 8k is 8192")
    return [int(part.removesuffix("k")) * (1024 if part.endswith("k") else 1) for part in text.split(",")]
