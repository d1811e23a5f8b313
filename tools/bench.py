"""Measures graphattn as a user gets it, and peers beside it: the ceiling first, then correctness, then speed.

    python tools/bench.py --shape tools/shapes/qwen3-0.6b.json --batches 1,8,32 --context 1024 --against all
    python tools/bench.py --shape tools/shapes/qwen3-0.6b.json --workload nano

Prints a table, and one JSON document as the last line (and into `--json PATH`).
"""

from __future__ import annotations

import gc
import json
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from benchmark import attention, decode, nano, prefill, report, step
from benchmark.accuracy import accuracy, is_wrong
from benchmark.against import run_peers
from benchmark.environment import clocks, environment
from benchmark.page import write_page
from benchmark.peers import PEERS
from benchmark.plot import WORKLOADS as PLOTTED
from benchmark.plot import plot
from benchmark.published import decode_figures, nano_figures
from benchmark.rows import PREFILL_TOKENS, WARM_TOKENS, lengths, tokens_each
from benchmark.shape import config_of, random_model
from benchmark.timing import copy_rate
from rich.console import Console

from graphattn import LLM

SCHEMA_VERSION = 2
WORKLOADS = ("decode", "nano", "attention", "step", "prefill")
WITH_PEERS = ("decode", "nano")
CASES = "1x1024,1x8192,8x1024,32x1024,64x1024,256x1024,1x32768+63x100"
console = Console(highlight=False, stderr=True)


def chosen_peers(asked: str) -> list[str]:
    """Names of `--against`, "all" for every one.

    Raises:
        typer.BadParameter: there is no peer of that name.
    """
    names = list(PEERS) if asked == "all" else [name for name in asked.split(",") if name]
    for name in names:
        if name not in PEERS:
            raise typer.BadParameter(f"peer {name!r}: choose from {', '.join(PEERS)}, or all")
    return names


def read_cases(text: str) -> dict[str, list[int]]:
    """Cases as they are written, with the tokens of each row.

    Raises:
        typer.BadParameter: one is written wrong.
    """
    try:
        return {case: lengths(case) for case in text.split(",")}
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


class Run:
    """One run of the bench: what is asked, and the document that it grows.

    Args:
        document: what is known before anything is measured.
        json_path: where it is written whenever something is added; None for nowhere.
    """

    def __init__(self, document: dict, json_path: Path | None):
        self.document, self._json_path = document, json_path

    def add(self, **parts) -> None:
        """Adds to the document and writes it, so that what comes later can fail without loss."""
        self.document |= parts
        if self._json_path is not None:
            self._json_path.write_text(json.dumps(self.document, indent=1) + "\n")

    def finish(self, device: str, plot_path: Path | None) -> None:
        """Clocks at the end, the picture, and the last line."""
        self.document["environment"]["clocks"]["after"] = clocks(device)
        for row in self.document["rows"] if isinstance(self.document["rows"], list) else []:
            row.pop("token_ids", None)
        self.add()
        if plot_path is not None:
            plot(self.document, plot_path)
        print(json.dumps(self.document))


def engine_rows(run: Run, model, options: dict, measure) -> list[dict]:
    """What `measure(llm)` finds on an engine of these options; the engine's own account goes into the document."""
    started = time.perf_counter()
    with LLM(model, max_prefill_tokens=PREFILL_TOKENS, prefix_cache=False, **options) as llm:
        start_seconds = time.perf_counter() - started
        rows = measure(llm)
        run.add(start_s=start_seconds, explain=llm.explain().splitlines(), ledger=llm.ledger().to_json())
    return rows


def main(
    workload: Annotated[
        str,
        typer.Option(
            help="decode: time per step. nano: tokens/s of mixed requests. attention: us that attention adds to a "
            "layer. step: kernels, idle device, host. prefill: prompts alone, and beside rows that decode."
        ),
    ] = "decode",
    shape: Annotated[Path, typer.Option(help="Model config as JSON; weights are random.")] = Path(
        "tools/shapes/tiny.json"
    ),
    batches: Annotated[str, typer.Option(help="decode, step: batch sizes, with commas.")] = "1,4",
    context: Annotated[int, typer.Option(min=1, help="decode, step, prefill: prompt tokens of each request.")] = 64,
    tokens: Annotated[int, typer.Option(min=1, help="decode: timed steps. step: profiled ones, 10 at most.")] = 128,
    skew: Annotated[str, typer.Option(help="decode: one more batch of uneven rows, like 1x32768+63x100.")] = "",
    requests: Annotated[int, typer.Option(min=1, help="nano: how many.")] = 256,
    longest: Annotated[int, typer.Option(min=1, help="nano: tokens of a prompt, and of an answer, at most.")] = 1024,
    cases: Annotated[str, typer.Option(help="attention: rows x tokens, with commas.")] = CASES,
    repeats: Annotated[int, typer.Option(min=1, help="attention: timed steps a figure.")] = 50,
    prompt: Annotated[int, typer.Option(min=1, help="prefill: tokens of the long prompt.")] = 16384,
    budgets: Annotated[str, typer.Option(help="prefill: values of max_prefill_tokens, with commas.")] = "8192,2048,512",
    decoding: Annotated[int, typer.Option(min=1, help="prefill: requests that decode meanwhile.")] = 32,
    against: Annotated[
        str, typer.Option(help=f"decode, nano: peers to run too, with commas, or all: {', '.join(PEERS)}.")
    ] = "",
    peer_timeout: Annotated[int, typer.Option(min=1, help="Seconds that a peer may take.")] = 900,
    backend: Annotated[str, typer.Option(help="As LLM takes it.")] = "auto",
    compile: Annotated[bool | None, typer.Option(help="Compile the step; on CUDA by default.")] = None,
    enforce_eager: Annotated[bool, typer.Option(help="No CUDA graphs.")] = False,
    commit: Annotated[str | None, typer.Option(help="The commit, where there is no git to ask.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the document there too.")] = None,
    plot_path: Annotated[Path | None, typer.Option("--plot", help="decode, step: draw it there.")] = None,
    page: Annotated[Path | None, typer.Option(help="Only write this page from the JSON files beside it.")] = None,
) -> None:
    """Measures graphattn, after its results were found right."""
    if page is not None:
        write_page(page)
        return
    if workload not in WORKLOADS:
        raise typer.BadParameter(f"workload {workload!r}: choose {', '.join(WORKLOADS)}")
    peers = chosen_peers(against)
    if peers and workload not in WITH_PEERS:
        raise typer.BadParameter(f"--against goes with {' and '.join(WITH_PEERS)}, not with {workload}")
    if plot_path is not None and workload not in PLOTTED:
        raise typer.BadParameter(f"--plot goes with {' and '.join(PLOTTED)}, not with {workload}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    sizes = [int(size) for size in batches.split(",")]
    even = {f"{size}x{context}": [context] * size for size in sizes}
    uneven = read_cases(skew) if skew else {}
    engine = {"backend": backend, "compile": "auto" if compile is None else compile, "enforce_eager": enforce_eager}
    before = clocks(device)
    rate = copy_rate(device)
    console.print(f"a copy within the device runs at {rate / 1e9:.0f} GB/s")
    run = Run(
        {
            "schema_version": SCHEMA_VERSION,
            "workload": workload,
            "environment": environment(device, commit) | {"clocks": {"before": before}},
            "model": {"shape": shape.stem, "dtype": str(dtype), "weights": "random"},
            "options": engine,
            "copy_rate_gb_s": rate / 1e9,
        },
        json_path,
    )
    if workload == "attention":  # which checks each backend at each case
        run.add(rows=attention.measure(config_of(shape), dtype, device, list(read_cases(cases)), repeats, rate))
        console.print(report.attention_table(run.document["rows"]))
        return run.finish(device, plot_path)
    checked = accuracy(shape, dtype, device, engine)
    run.add(accuracy=checked)
    console.print(checked)
    if is_wrong(checked):
        console.print("our error is more than twice plain torch's: not measuring a step that is wrong")
        raise typer.Exit(1)
    model = random_model(shape, dtype, device)

    def sized(of: dict[str, list[int]], steps: int) -> dict:
        max_batch, max_seq_len = decode.limits(list(of.values()), steps)
        buckets = sorted({len(lens) for lens in of.values()})
        return engine | {"max_batch": max_batch, "max_seq_len": max_seq_len, "buckets": buckets}

    job: dict = {"workload": workload, "cases": [*even, *uneven], "tokens": tokens}
    if workload == "decode":
        rows = []
        # In an engine of its own, so that a long row changes no size of the others'.
        for of in (uneven, even):
            if of:
                options = sized(of, tokens)
                rows = engine_rows(run, model, options, lambda llm, of=of: decode.measure(llm, of, tokens, rate)) + rows
        run.add(options=options, rows=rows)
        published, draw, figure = decode_figures(shape.stem, context), report.decode_table, "step_ms"
        lens = [*even.values(), *uneven.values()]
        limit = max(max(each) + 2 * tokens_each(each, tokens, 1024) for each in lens)
        setting = {"max_batch": max(map(len, lens)), "max_len": limit}
    elif workload == "nano":
        drawn = nano.Requests(num_requests=requests, longest=longest, vocab_size=config_of(shape).vocab_size)
        options = engine | {"max_batch": min(256, requests), "max_seq_len": 2 * longest}
        run.add(options=options, rows=engine_rows(run, model, options, lambda llm: nano.measure(llm, drawn)))
        published, draw, figure = nano_figures(shape.stem, requests, longest), report.nano_table, "tokens_per_s"
        job |= {"cases": [run.document["rows"][0]["case"]], "requests": requests, "longest": longest}
        setting = {"max_batch": options["max_batch"], "max_len": options["max_seq_len"]}
    elif workload == "step":
        count = min(10, tokens)
        options = sized(even, 4 * count + 8)
        run.add(
            options=options, rows=engine_rows(run, model, options, lambda llm: step.measure(llm, even, count, device))
        )
        for table in report.step_tables(run.document["rows"]):
            console.print(table)
        return run.finish(device, plot_path)
    else:
        load = prefill.Load(decoding=decoding, context=context, prompt=prompt)
        budget_list = [int(budget) for budget in budgets.split(",")]
        run.add(rows=prefill.measure(model, load, min(PREFILL_TOKENS, budget_list[0]), budget_list, engine))
        for table in report.prefill_tables(run.document["rows"]):
            console.print(table)
        return run.finish(device, plot_path)

    console.print(draw(run.document["rows"], [], published))
    del model
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    job["setting"] = setting | {"shape": str(shape), "device": device, "compile": compile}
    results: list[dict] = []
    for result in run_peers(peers, job, peer_timeout, run.document["rows"], figure):
        results.append(result)
        console.print(f"{result['name']}: {result.get('reason') or result.get('error') or result['attention_path']}")
        run.add(peers=results)
    run.add(peers=results, published=published, warm_tokens=WARM_TOKENS)
    if peers:
        console.print(draw(run.document["rows"], results, published))
    run.finish(device, plot_path)


if __name__ == "__main__":
    typer.run(main)
