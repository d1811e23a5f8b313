"""Measures graphattn as a user gets it, and peers beside it: the ceiling first, then correctness, then speed.

    python tools/bench.py --shape tools/shapes/qwen3-0.6b.json --batches 1,8,32 --context 1024 --against all
    python tools/bench.py --shape tools/shapes/qwen3-0.6b.json --workload nano

Prints a table, and one JSON document as the last line (and into `--json PATH`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from benchmark import attention, decode, nano, prefill, report, start, step
from benchmark.options import complaining, drawing, output, read_counts
from benchmark.page import write_page
from benchmark.paths import COMPARISONS
from benchmark.peers import PEERS
from benchmark.plot import WORKLOADS as PLOTTED
from benchmark.plot import plot
from benchmark.rows import PREFILL_TOKENS, lengths, sharing_rows
from benchmark.run import Run
from benchmark.shape import config_of

WORKLOADS = ("decode", "nano", "attention", "step", "prefill", "start")
WITH_PEERS = ("decode", "nano")
CASES = "1x1024,1x8192,8x1024,32x1024,64x1024,256x1024,1x32768+63x100"
MOST_PROFILED = 10  # steps


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


def read_cases(text: str, read: Callable[[str], list] = lengths) -> dict[str, list]:
    """Cases as they are written, with the rows that `read` makes of each: by default the tokens of each.

    Raises:
        typer.BadParameter: one is written wrong.
    """
    try:
        return {case: read(case) for case in text.split(",") if case}
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def main(
    workload: Annotated[
        str,
        typer.Option(
            help="decode: time per step. nano: tokens/s of mixed requests. attention: us that attention adds to a "
            "layer. step: kernels, idle device, host. prefill: prompts alone, and beside rows that decode. start: "
            "seconds until an engine is ready, with compile caches empty, kernels built, and all filled."
        ),
    ] = "decode",
    shape: Annotated[Path, typer.Option(help="Model config as JSON; weights are random.")] = Path(
        "tools/shapes/tiny.json"
    ),
    batches: Annotated[str, typer.Option(help="decode, step: batch sizes, with commas; start: the largest.")] = "1,4",
    context: Annotated[
        int, typer.Option(min=1, help="decode, step, prefill, start: prompt tokens of each request.")
    ] = 64,
    tokens: Annotated[int, typer.Option(min=1, help="decode: timed steps. step: profiled ones, 10 at most.")] = 128,
    skew: Annotated[str, typer.Option(help="decode: one more batch, of uneven rows, like 1x32768+63x100.")] = "",
    requests: Annotated[int, typer.Option(min=1, help="nano: how many.")] = 256,
    longest: Annotated[int, typer.Option(min=1, help="nano: tokens of a prompt, and of an answer, at most.")] = 1024,
    cases: Annotated[str, typer.Option(help="attention: rows x tokens, or x shared/own, with commas.")] = CASES,
    compare: Annotated[str, typer.Option(help=f"attention: what to compare: {', '.join(COMPARISONS)}.")] = "backends",
    repeats: Annotated[int, typer.Option(min=1, help="attention: timed steps a figure.")] = 50,
    prompt: Annotated[int, typer.Option(min=1, help="prefill: tokens of the long prompt.")] = 16384,
    budgets: Annotated[str, typer.Option(help="prefill: values of max_prefill_tokens, with commas.")] = "8192,2048,512",
    decoding: Annotated[int, typer.Option(min=1, help="prefill: requests that decode meanwhile.")] = 32,
    against: Annotated[
        str, typer.Option(help=f"decode, nano: peers to run too, with commas, or all: {', '.join(PEERS)}.")
    ] = "",
    peer_timeout: Annotated[int, typer.Option(min=1, help="Seconds that a peer may take.")] = 900,
    backend: Annotated[str, typer.Option(help="As LLM takes it.")] = "auto",
    kernel: Annotated[str, typer.Option("--prefill", help="As LLM takes it.")] = "auto",
    cascade: Annotated[str, typer.Option(help="As LLM takes it.")] = "off",
    kv_cache_dtype: Annotated[str, typer.Option(help="As LLM takes it: auto or fp8.")] = "auto",
    compile: Annotated[bool | None, typer.Option(help="Compile the step; on CUDA by default.")] = None,
    enforce_eager: Annotated[bool, typer.Option(help="No CUDA graphs.")] = False,
    commit: Annotated[str | None, typer.Option(help="The commit, where there is no git to ask.")] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", callback=output, help="Write the document there too.")
    ] = None,
    plot_path: Annotated[
        Path | None, typer.Option("--plot", callback=drawing, help="decode, step: draw it there.")
    ] = None,
    draw: Annotated[Path | None, typer.Option(help="Only draw this JSON document, into --plot.")] = None,
    page: Annotated[
        Path | None, typer.Option(callback=output, help="Only write this page, from the JSON files beside it.")
    ] = None,
) -> None:
    """Measures graphattn, after its results were found right."""
    if page is not None:
        return write_page(page)
    if draw is not None:
        if plot_path is None:
            raise typer.BadParameter("--draw needs --plot, where to draw")
        try:
            document = json.loads(draw.read_text())
            kind = document["workload"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise typer.BadParameter(
                f"{draw} is no document of a measurement: {type(error).__name__}: {error}"
            ) from error
        if kind not in PLOTTED:
            raise typer.BadParameter(f"{draw} is of {kind}: there are plots of {' and '.join(PLOTTED)}")
        return plot(document, plot_path)
    if workload not in WORKLOADS:
        raise typer.BadParameter(f"workload {workload!r}: choose {', '.join(WORKLOADS)}")
    if compare not in COMPARISONS:
        raise typer.BadParameter(f"compare {compare!r}: choose {', '.join(COMPARISONS)}")
    if kv_cache_dtype not in ("auto", "fp8"):
        raise typer.BadParameter(f"--kv-cache-dtype {kv_cache_dtype}: choose auto or fp8")
    if workload == "attention" and kv_cache_dtype != "auto":
        raise typer.BadParameter("--kv-cache-dtype is for engines: of attention, --compare cache shows both")
    peers = chosen_peers(against)
    for option, asked, served in (("--against", peers, WITH_PEERS), ("--plot", plot_path, PLOTTED)):
        if asked and workload not in served:
            raise typer.BadParameter(f"{option} goes with {' and '.join(served)}, not with {workload}")
    even = {f"{size}x{context}": [context] * size for size in read_counts("batches", batches)}
    uneven, chains, prefill_tokens = read_cases(skew), read_cases(cases, sharing_rows), read_counts("budgets", budgets)
    compiled = "auto" if compile is None else compile
    engine = {
        "backend": backend,
        "prefill": kernel,
        "compile": compiled,
        "enforce_eager": enforce_eager,
        "cascade": cascade,
        "kv_cache_dtype": kv_cache_dtype,
    }

    run = Run(workload, shape, engine, commit, json_path)
    if workload != "attention" and not run.check():  # that one checks each backend at each case
        raise typer.Exit(1)
    tables = []
    if workload == "decode":
        # Uneven rows in an engine of their own, so that a long one changes no size of the others'.
        rows = [
            run.on_engine(decode.sizes(of, tokens), lambda llm, of=of: decode.measure(llm, of, tokens, run.rate))
            for of in (uneven, even)
            if of
        ]
        run.add(rows=[row for part in reversed(rows) for row in part])
        tables = [report.decode_table(run.document["rows"])]
    elif workload == "nano":
        drawn = nano.Requests(num_requests=requests, longest=longest, vocab_size=config_of(shape).vocab_size)
        run.add(rows=run.on_engine(nano.sizes(drawn), lambda llm: nano.measure(llm, drawn)))
        tables = [report.nano_table(run.document["rows"])]
    elif workload == "attention":
        shaped = config_of(shape)
        measured = attention.measure(shaped, run.dtype, run.device, list(chains), repeats, run.rate, compare)
        tables = [report.attention_table(run.collect(measured, compared=compare))]
    elif workload == "step":
        steps = min(MOST_PROFILED, tokens)
        sizes = decode.sizes(even, step.steps_needed(steps))
        run.add(rows=run.on_engine(sizes, lambda llm: step.measure(llm, even, steps, run.device)))
        tables = report.step_tables(run.document["rows"])
    elif workload == "start":
        options = engine | {"max_batch": max(map(len, even.values())), "max_seq_len": context + tokens}
        tables = [report.start_table(run.collect(start.measure(shape, options), options=options))]
    else:
        load = prefill.Load(decoding=decoding, context=context, prompt=prompt)
        alone = min(PREFILL_TOKENS, prefill_tokens[0])
        run.add(rows=prefill.measure(run.model(), load, alone, prefill_tokens, engine))
        tables = report.prefill_tables(run.document["rows"])
    for table in tables:
        run.console.print(table)

    if workload == "decode":
        setting = decode.peer_sizes(even | uneven, tokens) | {"compile": compile}
        run.against(peers, peer_timeout, setting, [*even, *uneven], tokens=tokens)
    elif workload == "nano":
        setting = {"max_batch": min(nano.MAX_BATCH, requests), "max_len": 2 * longest, "compile": compile}
        run.against(peers, peer_timeout, setting, [nano.CASE], requests=requests, longest=longest)
    run.finish()
    if plot_path is not None:
        plot(run.document, plot_path)


if __name__ == "__main__":
    typer.run(complaining(main))
