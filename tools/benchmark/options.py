"""Options that more than one tool takes."""

from __future__ import annotations

import typer


def read_counts(option: str, text: str) -> list[int]:
    """Counts with commas between them.

    Raises:
        typer.BadParameter: one is no count.
    """
    if not all(part.isdecimal() and int(part) for part in text.split(",")):
        raise typer.BadParameter(f"{option} {text!r}: give counts from 1 up, with commas")
    return [int(part) for part in text.split(",")]
