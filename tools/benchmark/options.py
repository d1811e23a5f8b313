"""Options that more than one tool takes."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import wraps
from pathlib import Path

import typer

from graphattn import GraphattnError
from graphattn.document import may_be_written

DRAWN = (".png", ".svg", ".pdf")
COUNT = r"[1-9][0-9]*k?"


def read_counts(option: str, text: str) -> list[int]:
    """Counts with commas between them; 8k is 8192.

    Raises:
        typer.BadParameter: one is no count.
    """
    if re.fullmatch(f"{COUNT}(,{COUNT})*", text) is None:
        raise typer.BadParameter(f"{option} {text!r}: give counts from 1 up, with commas; 8k is 8192")
    return [int(part.removesuffix("k")) * (1024 if part.endswith("k") else 1) for part in text.split(",")]


def output(path: Path | None) -> Path | None:
    """A file that can be written once all is measured.

    Raises:
        typer.BadParameter: its folder is not there.
    """
    if path is not None and not may_be_written(path):
        raise typer.BadParameter(f"{path}: no file can be written there, make its folder first")
    return path


def drawing(path: Path | None) -> Path | None:
    """Likewise, of a kind that can be drawn."""
    if path is not None and path.suffix not in DRAWN:
        raise typer.BadParameter(f"{path}: draw one of {', '.join(DRAWN)}")
    return output(path)


def complaining(main: Callable) -> Callable:
    """A command whose errors that a user caused are said as those of its options are, without a traceback."""

    @wraps(main)
    def run(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except GraphattnError as error:
            raise typer.BadParameter(str(error)) from error

    return run
