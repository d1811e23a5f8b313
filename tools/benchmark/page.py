"""The page of all measurements, docs/benchmarks.md, written from the JSON files beside it; no number is typed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .against import case_of, comparison
from .buckets import buckets
from .markdown import documents_of, table
from .published import published
from .report import attention_figure, started

FOLDER = "benchmarks"
INTRO = """# Benchmarks

Written by `python tools/bench.py --page docs/benchmarks.md` from the JSON files in [benchmarks](benchmarks), which hold
more than is shown here. Weights are random, in the shape that is named; prompts are random tokens. Times are medians
unless it says otherwise. A ratio in brackets is how many times as long the other takes. *Published* figures were
measured elsewhere on the same kind of device, and are no part of the run beside which they stand.
"""
TITLES = {
    "decode": "Time of a decode step",
    "nano": "Requests of mixed lengths",
    "attention": "What attention adds to a layer",
    "step": "What a decode step is made of",
    "prefill": "Prefill",
    "start": "Starting",
    "capture": "Buckets and memory",
}
SHOWN_KERNELS = 12


def write_page(path: Path) -> None:
    """Writes the page from the documents in the folder `benchmarks` beside it."""
    path.write_text(render(path.parent / FOLDER))


def render(folder: Path) -> str:
    """The page's text; a workload that nothing was measured of is left out."""
    parts = [INTRO]
    for workload, title, documents in documents_of(folder, TITLES):
        parts.append(f"## {title}\n")
        for stem, document in documents.items():
            model = document["model"]
            parts.append(f"### {model['name'] if workload == 'capture' else model['shape']}: {stem}\n")
            parts.append(_origin(stem, document))
            if (folder / f"{stem}.png").exists():
                parts.append(f"![{title}, {stem}]({FOLDER}/{stem}.png)\n")
            parts.append(BODIES[workload](document))
    parts.append(_published())
    return "\n".join(parts)


def _origin(stem: str, document: dict) -> str:
    environment = document["environment"]
    versions = [
        f"{name} {environment[key]}"
        for name, key in (
            ("torch", "torch"),
            ("FlashInfer", "flashinfer"),
            ("Triton", "triton"),
            ("transformers", "transformers"),
            ("driver", "driver"),
        )
        if environment.get(key)
    ]
    lines = [
        f"{environment['device']}, {', '.join(versions)}, {document['model']['dtype'].removeprefix('torch.')}; commit "
        f"{str(environment['commit'])[:7]}; [JSON]({FOLDER}/{stem}.json). A copy within the device ran at "
        f"{document['copy_rate_gb_s']:,.0f} GB/s."
    ]
    if "accuracy" in document:
        checked = document["accuracy"]
        lines.append(
            f"Before: {checked['what']}, root mean square error {checked['ours_rms']:.2g}, plain torch's "
            f"{checked['plain_rms']:.2g}."
        )
    clocks = environment.get("clocks") or {}
    for when in ("before", "after"):
        if clocks.get(when):
            read = clocks[when]
            lines.append(
                f"Clocks {when}: SM {read['sm_mhz']} MHz, memory {read['memory_mhz']} MHz, {read['power_w']} W."
            )
    return "\n".join([*lines, "", "```", environment["command"], "```", ""])


def _decode(document: dict) -> str:
    rows = document["rows"]
    head = ["rows x context", "ms p20", "p50", "p80", "tokens/s", "bytes / copy rate, ms", "share of that rate"]
    body = [
        [
            case_of(row),
            *(f"{row['step_ms'][name]:.2f}" for name in ("p20", "p50", "p80")),
            f"{row['tokens_per_s']:,.0f}",
            f"{row['floor_ms']:.2f}",
            f"{row['floor_ms'] / row['step_ms']['p50']:.0%}",
        ]
        for row in rows
    ]
    return "\n".join([table(head, body), _beside(document, "ms per step")])


def _nano(document: dict) -> str:
    (row,) = document["rows"]
    text = (
        f"{row['requests']} requests at once, {row['prompt_tokens']:,} prompt and {row['output_tokens']:,} output "
        "tokens, temperature 0.6.\n"
    )
    return "\n".join([text, _beside(document, "engine", "output tokens/s")])


def _beside(document: dict, *head: str) -> str:
    """Our figures beside the peers' and the published ones."""
    first, *lines = comparison(document)
    if len(lines) == 1 and len(head) == 1:
        return ""
    return "\n".join([table([*head, *first[len(head) :]], lines), _paths(document)])


def _paths(document: dict) -> str:
    """What each peer really ran, or why it did not."""
    lines = []
    for peer in document.get("peers", []):
        said = peer.get("reason") or peer["attention_path"] or "failed"
        if "error" in peer:
            said += f"; failed: {peer['error'].strip().splitlines()[-1]}"
        lines.append(f"- {peer['name']}: {said}")
    return "\n".join([*lines, ""]) if lines else ""


def _attention(document: dict) -> str:
    rows = document["rows"]
    names = list(rows[0]["paths"])

    def figure(found: dict) -> str:
        if "error" in found:
            return found["error"].splitlines()[0]
        return attention_figure(found)

    text = "Microseconds per layer; in brackets p20 to p80.\n"
    head = ["rows x context", "bytes / copy rate", *names]
    body = [[row["case"], f"{row['floor_us']:.1f}", *map(figure, row["paths"].values())] for row in rows]
    return "\n".join([text, table(head, body)])


def _step(document: dict) -> str:
    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.0%}"

    head = ["rows x context", "step ms", "kernels", "device busy us", "idle", "idle while profiled", "host us"]
    body = [
        [
            row["case"],
            f"{row['step_ms']['p50']:.3f}",
            f"{row['kernels_per_step']:.0f}",
            "-" if row["busy_us"] is None else f"{row['busy_us']:.0f}",
            share(row.get("idle_share_unprofiled")),
            share(row["idle_share"]),
            f"{row['host_us']:.0f}",
        ]
        for row in document["rows"]
    ]
    parts = [table(head, body)]
    for row in document["rows"]:
        kernels = [
            [
                f"`{each['name'][:80]}`",
                f"{each['count_per_step']:.1f}",
                *(f"{each[name]:.1f}" for name in ("us_each", "us_per_step", "us_per_layer")),
            ]
            for each in row["top"][:SHOWN_KERNELS]
        ]
        parts += [f"{row['case']}:\n", table(["kernel", "a step", "us each", "us a step", "us a layer"], kernels)]
    return "\n".join(parts)


def _prefill(document: dict) -> str:
    found = document["rows"]
    alone = [
        [
            f"{row['prompt_tokens']:,}",
            f"{row['max_prefill_tokens']:,}",
            f"{row['seconds']['p50'] * 1e3:.1f}",
            f"{row['tokens_per_s']:,.0f}",
        ]
        for row in found["alone"]
    ]
    beside = [
        [
            f"{row['max_prefill_tokens']:,}",
            *(f"{row['gap_ms'][name]:.1f}" for name in ("p50", "p99", "max")),
            f"{row['calm_ms']['p50']:.1f}",
            f"{row['first_token_s'] * 1e3:.0f}",
        ]
        for row in found["beside"]
    ]
    first = found["beside"][0]
    text = (
        f"Time between tokens of {first['decoding']} rows that decode at {first['context']:,} tokens while a prompt of "
        f"{first['prompt_tokens']:,} comes in chunks:\n"
    )
    head = ["tokens a step", "ms p50", "p99", "max", "p50 before", "prompt's first token, ms"]
    return "\n".join([table(["prompt tokens", "tokens a step", "ms", "tokens/s"], alone), text, table(head, beside)])


def _published() -> str:
    figures = published()
    parts = [f"## Published figures\n\n{figures['what']} {figures['device']}.\n"]
    for entry in figures["decode"]:
        batches = list(dict.fromkeys(batch for engine in entry["step_ms"].values() for batch in engine))
        body = [
            [name, *(f"{engine[batch]:g}" if batch in engine else "-" for batch in batches)]
            for name, engine in entry["step_ms"].items()
        ]
        head = [f"{entry['shape']}, context {entry['context']}, ms per step", *(f"{batch} rows" for batch in batches)]
        parts.append(table(head, body))
    for entry in figures["nano"]:
        body = [[name, f"{rate:,}"] for name, rate in entry["tokens_per_s"].items()]
        head = [f"{entry['shape']}, {entry['requests']} requests of mixed lengths", "output tokens/s"]
        parts.append(table(head, body))
    return "\n".join(parts)


def _start(document: dict) -> str:
    head, *lines = started(document["rows"])
    return table(head, lines)


BODIES: dict[str, Callable[[dict], str]] = {
    "decode": _decode,
    "nano": _nano,
    "attention": _attention,
    "step": _step,
    "prefill": _prefill,
    "start": _start,
    "capture": buckets,
}
