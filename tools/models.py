"""Which models are served: families, quantised weights, and every causal language model of transformers.

python tools/models.py families --device cuda --dtype bfloat16 --compile --json docs/models/families-h100.json
python tools/models.py sweep --json docs/models/sweep.json
python tools/models.py page
"""

from __future__ import annotations

import json
import logging
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]  # for `tools.families`, whoever runs this

from tools.benchmark.environment import environment, package_version  # noqa: E402
from tools.benchmark.options import output  # noqa: E402
from tools.families.measure import KINDS, measure  # noqa: E402
from tools.families.page import write_page  # noqa: E402
from tools.families.quantised import QUANTISERS, try_quantiser  # noqa: E402
from tools.families.sweep import ALLOWED, WRONG, entries, sweep  # noqa: E402
from tools.families.table import FAMILIES  # noqa: E402

app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode="markdown")
Commit = Annotated[str | None, typer.Option(help="of the sources, where git does not know it")]
COLOURS = {"served": "green", "by attach alone": "green", "refused": "yellow", "wrong": "red", "not built": "blue"}


def _device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(f"torch {torch.__version__} sees no CUDA device")
    return name


def _made(path: Path | None) -> Path | None:
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise typer.BadParameter(f"{path}: {error}") from error
    return output(path)


Device = Annotated[Literal["cpu", "cuda"], typer.Option(callback=_device)]
Json = Annotated[Path | None, typer.Option("--json", callback=_made, help="where to write; its folder is made")]


def _named(asked: str, known: list[str]) -> list[str]:
    names = [name for name in asked.split(",") if name] or known
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"{name!r}: choose from {', '.join(known)}")
    return names


def _family(name: str, **options) -> dict:
    torch._dynamo.reset()
    return {"name": name, **measure(name, **options)}


def _finish(document: dict, path: Path | None, wrong: list[str]) -> None:
    if path is not None:
        path.write_text(json.dumps(document, indent=1) + "\n")
    if wrong:
        raise typer.Exit(1)


@app.command("families")
def families(
    only: Annotated[str, typer.Option(help="names, with commas between; all by default")] = "",
    device: Device = "cpu",
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option()] = "float32",
    compile: Annotated[bool, typer.Option("--compile", help="compile the step with Inductor")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="processes, each with a family at a time")] = 1,
    commit: Commit = None,
    path: Json = None,
) -> None:
    """Logits of every family against transformers' eager attention; fails if some are wrong."""
    console, rows = Console(), []
    one = partial(_family, dtype=getattr(torch, dtype), device=device, compile=compile)
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        for row in pool.map(one, _named(only, list(FAMILIES))):
            rows.append(row)
            said = row["refused"] and f"[yellow]refused[/]: {row['refused']}"
            if row["refused"] is None:
                right = {kind: errors["is_right"] for kind, errors in row["errors"].items()}
                said = ", ".join(f"{kind} {'[green]right[/]' if right[kind] else '[red]wrong[/]'}" for kind in KINDS)
            console.print(f"{row['name']}: {said}")
    of = {"workload": "families", "environment": environment(device, commit), "dtype": f"torch.{dtype}"}
    errors = {row["name"]: row.get("errors", {}).values() for row in rows}
    wrong = [name for name, each in errors.items() if not all(kind["is_right"] for kind in each)]
    _finish(of | {"compile": compile, "rows": rows}, path, wrong)


@app.command("sweep")
def sweep_all(
    only: Annotated[str, typer.Option(help="model types, with commas between; all by default")] = "",
    seconds: Annotated[float, typer.Option(min=1, help="for each")] = 120.0,
    commit: Commit = None,
    path: Json = None,
) -> None:
    """Every causal language model of the installed transformers: served, refused, wrong or not built."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    console, rows = Console(), []
    table = Table("model type", "verdict", "error", "reason")
    for found in sweep(_named(only, entries()), seconds):
        rows.append(vars(found))
        error = "" if found.error is None else f"{found.error:.1e}"
        table.add_row(found.kind, f"[{COLOURS[found.verdict]}]{found.verdict}[/]", error, found.reason or "")
    console.print(table)
    of = {"workload": "sweep", "environment": environment("cpu", commit), "allowed": ALLOWED}
    _finish(of | {"rows": rows}, path, [row["kind"] for row in rows if row["verdict"] == WRONG])


@app.command("quantised")
def quantised(
    only: Annotated[str, typer.Option(help="names, with commas between; all by default")] = "",
    device: Device = "cpu",
    compile: Annotated[bool, typer.Option("--compile", help="compile the step with Inductor")] = False,
    commit: Commit = None,
    path: Json = None,
) -> None:
    """Weights as transformers' quantisers load them."""
    console, rows = Console(), []
    for name in _named(only, list(QUANTISERS)):
        rows.append(try_quantiser(name, device, compile=compile))
        console.print(rows[-1])
    where = environment(device, commit)
    where |= {module: package_version(module) for module, _ in QUANTISERS.values()}
    _finish({"workload": "quantised", "environment": where, "rows": rows}, path, [])


@app.command("page")
def page(path: Annotated[Path, typer.Argument(callback=output, help="the page")] = ROOT / "docs" / "models.md") -> None:
    """Writes the page from the JSON files in the folder `models` beside it."""
    write_page(path)


if __name__ == "__main__":
    app()
