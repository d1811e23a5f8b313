"""Measures what each bucket takes on this machine with each backend, and chooses what suits recorded traffic.

    python tools/capture.py --shape tools/shapes/tiny.json --trace batches.json --profile tiny.profile.json
    python tools/capture.py --model path/to/model --trace batches.json --max-buckets 12 --profile model.profile.json

Prints tables, and one JSON document as the last line (and into `--json PATH`). docs/capture.md says how to use it.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from benchmark.environment import environment
from benchmark.options import complaining, drawing, output, read_counts
from benchmark.run import WIDTH
from benchmark.shape import random_model
from benchmark.timing import copy_rate
from capturing import backends, ladders, measure, report
from capturing.plot import plot
from rich.console import Console

from graphattn import BucketLadder, Traffic

SCHEMA_VERSION = 3
MAX_BATCH = 64  # without a trace or buckets that say


def asked_ladder(buckets: str, traffic: Traffic | None, max_batch: int | None) -> BucketLadder:
    """The buckets to measure.

    Raises:
        typer.BadParameter: `--max-batch` is not the trace's, or a bucket is larger.
    """
    if traffic is not None and max_batch not in (None, traffic.max_batch):
        raise typer.BadParameter(f"--max-batch {max_batch}: the trace was recorded with max_batch={traffic.max_batch}")
    max_batch = traffic.max_batch if traffic is not None else max_batch
    if buckets == "auto":
        return ladders.candidates(max_batch or MAX_BATCH, traffic)
    return BucketLadder(read_counts("--buckets", buckets), max_batch)


def main(
    model: Annotated[str | None, typer.Option(help="As LLM takes it: a folder, a .gguf file or a name.")] = None,
    shape: Annotated[Path | None, typer.Option(help="Instead: a config as JSON; weights are random.")] = None,
    buckets: Annotated[
        str, typer.Option(help="Sizes to measure, with commas; auto: those of common ladders and of the trace.")
    ] = "auto",
    trace: Annotated[Path | None, typer.Option(help="What LLM(record_batches=PATH) wrote.")] = None,
    max_batch: Annotated[int | None, typer.Option(min=1, help="Without a trace: the largest batch.")] = None,
    max_buckets: Annotated[int | None, typer.Option(min=1, help="Buckets to choose at most.")] = None,
    budget_mib: Annotated[int | None, typer.Option(min=1, help="MiB that the chosen graphs may take.")] = None,
    contexts: Annotated[str, typer.Option(help="Tokens of each row, with commas.")] = "512,2048",
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of each bucket and context.")] = 20,
    backend: Annotated[
        str, typer.Option(help="Backends to measure, with commas; auto: all that can serve the model.")
    ] = "auto",
    compile: Annotated[bool | None, typer.Option(help="Compile the step; on CUDA by default.")] = None,
    enforce_eager: Annotated[bool, typer.Option(help="No CUDA graphs.")] = False,
    page_size: Annotated[int, typer.Option(min=1, help="As LLM takes it.")] = 16,
    max_seq_len: Annotated[
        int | None, typer.Option(min=1, help="Of the engine that will use the profile; what the contexts need if less.")
    ] = None,
    layout: Annotated[str, typer.Option(help="As LLM takes it.")] = "auto",
    kv_cache_dtype: Annotated[str, typer.Option(help="As LLM takes it: auto or fp8.")] = "auto",
    memory_fraction: Annotated[float, typer.Option(help="As LLM takes it.")] = 0.9,
    commit: Annotated[str | None, typer.Option(help="The commit, where there is no git to ask.")] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", callback=output, help="Write the document there too.")
    ] = None,
    plot_path: Annotated[Path | None, typer.Option("--plot", callback=drawing, help="Draw it there.")] = None,
    profile_path: Annotated[
        Path | None,
        typer.Option("--profile", callback=output, help="Write a profile for LLM(capture_profile=PATH) there."),
    ] = None,
) -> None:
    """Measures buckets, and chooses among them."""
    if (model is None) == (shape is None):
        raise typer.BadParameter("give one of --model and --shape")
    for option, value in (("--max-buckets", max_buckets), ("--budget-mib", budget_mib)):
        if value is not None and trace is None:
            raise typer.BadParameter(f"{option} limits what is chosen for a trace: give --trace")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    uses_graphs = device == "cuda" and not enforce_eager
    if budget_mib is not None and not uses_graphs:
        raise typer.BadParameter("--budget-mib is for CUDA graphs, and none are captured here")
    lengths = sorted(set(read_counts("--contexts", contexts)))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    options = {
        "max_seq_len": max(measure.longest(lengths, steps), max_seq_len or 1),
        "compile": "auto" if compile is None else compile,
        "enforce_eager": enforce_eager,
        "page_size": page_size,
        "layout": layout,
        "kv_cache_dtype": kv_cache_dtype,
        "memory_fraction": memory_fraction,
    }
    console = Console(highlight=False, stderr=True)
    if not console.is_terminal:
        console = Console(highlight=False, stderr=True, width=WIDTH)
    traffic = None if trace is None else Traffic.load(trace)
    ladder = asked_ladder(buckets, traffic, max_batch)
    rate = copy_rate(device)
    console.print(f"a copy within the device runs at {rate / 1e9:.0f} GB/s; measuring {list(ladder)}")
    with measure.progress(console) as bars:
        engines, rows, profile = backends.measure_each(
            backends.candidates(backend, device),
            (lambda: model) if shape is None else (lambda: random_model(shape, dtype, device)),
            ladder,
            options,
            skips=backend == "auto",
            bars=bars,
            contexts=lengths,
            num_steps=steps,
            rate=rate,
            compares=uses_graphs,
        )
    choice = None
    if traffic is not None:
        saved = ladders.waste_saved(ladder, traffic)
        rows = [row | {"waste_saved": saved[row["bucket"]]} for row in rows]
        found = ladders.choose(
            traffic,
            {row["bucket"]: backends.serving(row)[0]["step_ms"]["p50"] / 1e3 for row in rows},
            {row["bucket"]: backends.graph_bytes(row) for row in rows},
            max_buckets=max_buckets,
            max_bytes=None if budget_mib is None else budget_mib * 2**20,
        )
        choice = {"context": lengths[0], **found}
        profile = replace(profile, ladder=tuple(found["table"][-1]["sizes"]))
    document = {
        "schema_version": SCHEMA_VERSION,
        "environment": environment(device, commit),
        "model": {"name": model if shape is None else shape.stem, **profile.model},
        "options": options | {"backend": backend, "max_batch": ladder.max},
        "contexts": lengths,
        "copy_rate_gb_s": rate / 1e9,
        "engines": engines,
        "buckets": rows,
        "trace": None if traffic is None else {"max_batch": traffic.max_batch, "steps": traffic.steps},
        "choice": choice,
    }
    console.print(report.bucket_table(document))
    console.print(report.sharing_table(document))
    if len(engines) > 1:
        console.print(report.backend_table(document))
    if choice is not None:
        console.print(report.further_table(document))
        console.print(report.ladder_table(document))
    if json_path is not None:
        json_path.write_text(json.dumps(document, indent=1) + "\n")
    if profile_path is not None:
        profile.save(profile_path)
        console.print(f"{profile_path}: max_batch={profile.max_batch}, buckets {list(profile.ladder)}")
    if plot_path is not None:
        plot(document, plot_path)
    print(json.dumps(document), flush=True)


if __name__ == "__main__":
    typer.run(complaining(main))
