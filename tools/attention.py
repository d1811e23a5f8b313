"""Measures what attention adds to a step where it runs: between the GEMMs of many layers, in one CUDA graph.

    python tools/attention.py --shape tools/shapes/qwen3-0.6b.json --cases 1x1088,8x1088,64x1088,1x32768+63x100

Timed back to back with itself, a kernel overlaps its own next launch and finds small caches in L2; in this chain it
does neither. Needs CUDA. Prints a table, and one JSON document as the last line (and into `--json PATH`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from bench import SCHEMA_VERSION, copy_rate, environment, quantile
from rich.console import Console
from rich.table import Table
from torch import Tensor

import graphattn as ga

PAGE_SIZE = 16
console = Console(highlight=False, stderr=True)


def lengths(case: str) -> list[int]:
    """Rows of a case: "1x32768+63x100" is one of 32768 tokens among 63 of 100."""
    rows: list[int] = []
    for part in case.split("+"):
        count, length = map(int, part.split("x"))
        rows += [length] * count
    return rows


def chain(config, batch: int) -> Callable[[Callable[[int], None] | None], None]:
    """The GEMMs of a decoder's layers, as merged as they can be, with whatever is to run between the first two."""
    hidden, head_dim = config.hidden_size, getattr(config, "head_dim", None)
    head_dim = head_dim or hidden // config.num_attention_heads
    q_width, kv_width = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    sizes = (
        (hidden, q_width + 2 * kv_width),
        (q_width, hidden),
        (hidden, 2 * config.intermediate_size),
        (config.intermediate_size, hidden),
    )

    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.02

    weights = [[tensor(*size) for size in sizes] for _ in range(config.num_hidden_layers)]
    inputs = [tensor(batch, rows) for rows, _ in sizes]

    def run(attention: Callable[[int], None] | None = None) -> None:
        for layer, (qkv, *others) in enumerate(weights):
            torch.mm(inputs[0], qkv)
            if attention is not None:
                attention(layer)
            for x, weight in zip(inputs[1:], others, strict=True):
                torch.mm(x, weight)

    return run


def attention(config, rows: list[int], backend: str) -> Callable[[int], None]:
    """Append and attention of one layer of a decode step over these rows, keys and values at random."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    spec = ga.AttentionSpec(
        num_heads=config.num_attention_heads, num_kv_heads=config.num_key_value_heads, head_dim=head_dim
    )
    pool = ga.PagePool(1 + sum(-(-length // PAGE_SIZE) for length in rows), PAGE_SIZE)
    tables = [ga.BlockTable(pool) for _ in rows]
    for row in random.Random(0).sample(range(len(rows)), len(rows)):
        tables[row].grow(rows[row])
    cache = ga.CacheSpec(num_pages=pool.num_pages, page_size=PAGE_SIZE)
    layers = ga.KVCache(config.num_hidden_layers, spec, cache, "cuda").layers
    for pair in layers:
        for pages in pair:
            pages.normal_()
    batch = len(rows)
    state = ga.StepState(
        max_batch=batch, max_seq_len=max(rows), page_size=PAGE_SIZE, groups=[spec], device=torch.device("cuda")
    )
    plan = ga.Planner([spec], cache, "cuda", backend).decode(state, batch)
    plan.plan(state.stage(batch, [0] * batch, rows, [[table.pages for table in tables]]))
    options = {"device": "cuda", "dtype": torch.bfloat16}
    q = torch.randn(batch, spec.num_heads, head_dim, **options)
    k, v = (torch.randn(batch, spec.num_kv_heads, head_dim, **options) for _ in "kv")

    def run(layer: int) -> None:
        with ga.active_plans(plan.groups):
            torch.ops.graphattn.attend(q, k, v, *layers[layer], 0)

    return run


def graph_us(call: Callable[[], None], repeats: int) -> list[float]:
    """Microseconds of each of `repeats` replays of a captured call."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    times = []
    for _ in range(repeats + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return times[3:]


def main(
    shape: Annotated[Path, typer.Option(help="Model config as JSON.")] = Path("tools/shapes/qwen3-0.6b.json"),
    cases: Annotated[str, typer.Option(help="Rows x tokens, parts of a batch joined by +, cases by commas.")] = (
        "1x1088,1x8192,8x1088,32x1088,64x1088,256x1088,1x32768+63x100"
    ),
    repeats: Annotated[int, typer.Option(min=1, help="Replays per figure.")] = 30,
    commit: Annotated[str | None, typer.Option(help="The commit, where there is no git to ask.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the document there too.")] = None,
) -> None:
    """Microseconds per layer that each backend's append and attention add."""
    from transformers import AutoConfig

    settings = json.loads(shape.read_text())
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    rate, num_layers = copy_rate("cuda"), config.num_hidden_layers
    console.print(f"a copy within the device runs at {rate / 1e9:.0f} GB/s")
    rows, table = [], Table("rows x tokens", "GEMMs us", "bytes / copy rate, us", "fused us", "flashinfer us")
    for case in cases.split(","):
        lens = lengths(case)
        gemms = chain(config, len(lens))
        alone = quantile(graph_us(gemms, repeats), 0.5) / num_layers
        found = {}
        for backend in ("fused", "flashinfer"):
            layer = attention(config, lens, backend)
            times = [us / num_layers - alone for us in graph_us(partial(gemms, layer), repeats)]
            found[backend] = {f"p{round(100 * share)}": quantile(times, share) for share in (0.2, 0.5, 0.8)}
            del layer
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        floor = 4 * sum(lens) * config.num_key_value_heads * head_dim / rate * 1e6
        rows.append({"case": case, "gemms_us": alone, "floor_us": floor, "us_per_layer": found})
        figures = (alone, floor, found["fused"]["p50"], found["flashinfer"]["p50"])
        table.add_row(case, *(f"{figure:.1f}" for figure in figures))
    console.print(table)
    document = {
        "schema_version": SCHEMA_VERSION,
        "workload": "attention",
        "environment": environment("cuda", commit),
        "model": {"shape": shape.stem, "dtype": "torch.bfloat16"},
        "copy_rate_gb_s": rate / 1e9,
        "rows": rows,
    }
    if json_path is not None:
        json_path.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    typer.run(main)
