"""Tables for the terminal, one per workload."""

from __future__ import annotations

from rich.table import Table

from .against import comparison


def decode_table(rows: list[dict]) -> Table:
    """Our steps beside the ceiling."""
    table = Table("rows", "step ms p20", "p50", "p80", "tokens/s", "bytes / copy rate, ms", "share of that rate")
    for row in rows:
        step = row["step_ms"]
        figures = [*(f"{step[name]:.3f}" for name in ("p20", "p50", "p80")), f"{row['tokens_per_s']:.0f}"]
        table.add_row(row["case"], *figures, f"{row['floor_ms']:.3f}", f"{row['floor_ms'] / step['p50']:.0%}")
    return table


def nano_table(rows: list[dict]) -> Table:
    """Our tokens per second."""
    table = Table("requests", "output tokens", "seconds", "tokens/s")
    for row in rows:
        figures = (f"{row['seconds']:.2f}", f"{row['tokens_per_s']:.0f}")
        table.add_row(str(row["requests"]), str(row["output_tokens"]), *figures)
    return table


def peers_table(document: dict) -> Table:
    """Every engine's figure at every case, ours first, and in brackets how many times as long it takes."""
    title = {"decode": "ms per step", "nano": "output tokens/s"}[document["workload"]]
    head, *lines = comparison(document)
    table = Table(title, *head[1:])
    for line in lines:
        table.add_row(*line)
    return table


def attention_figure(found: dict) -> str:
    """What one path adds to a layer."""
    us = found["us_per_layer"]
    said = f"{us['p50']:.1f} ({us['p20']:.1f} to {us['p80']:.1f})"
    return f"{said}, bound by the host" if found["is_host_bound"] else said


def attention_table(rows: list[dict]) -> Table:
    """Microseconds per layer that attention adds, by path."""
    names = list(rows[0]["paths"])
    table = Table("rows", "bytes / copy rate, us", *(f"{name}, us per layer" for name in names), "GEMMs, us per layer")
    for row in rows:
        figures = [
            found["error"].splitlines()[0][:60] if "error" in found else attention_figure(found)
            for found in row["paths"].values()
        ]
        table.add_row(row["case"], f"{row['floor_us']:.1f}", *figures, f"{row['gemms_us_per_layer']:.1f}")
    return table


def step_tables(rows: list[dict]) -> list[Table]:
    """What each step is made of, and its longest kernels."""
    summary = Table("rows", "step ms", "device busy us", "idle, profiled", "idle", "host us", "kernels")
    tables = [summary]
    for row in rows:
        shares = [row["idle_share"], row.get("idle_share_unprofiled")]
        summary.add_row(
            row["case"],
            f"{row['step_ms']['p50']:.3f}",
            "-" if row["busy_us"] is None else f"{row['busy_us']:.0f}",
            *("-" if share is None else f"{share:.0%}" for share in shares),
            f"{row['host_us']:.0f}",
            f"{row['kernels_per_step']:.0f}",
        )
        kernels = Table("kernel", "a step", "us each", "us a step", "us a layer", title=row["case"])
        for each in row["top"]:
            figures = (each[name] for name in ("us_each", "us_per_step", "us_per_layer"))
            kernels.add_row(each["name"][:70], f"{each['count_per_step']:.1f}", *(f"{us:.1f}" for us in figures))
        tables.append(kernels)
    return tables


def prefill_tables(found: dict) -> list[Table]:
    """Prompts alone, and the gaps between tokens of rows that decode beside one."""
    alone = Table("prompt tokens", "tokens a step", "seconds", "tokens/s")
    for row in found["alone"]:
        seconds = f"{row['seconds']['p50']:.4f}"
        alone.add_row(str(row["prompt_tokens"]), str(row["max_prefill_tokens"]), seconds, f"{row['tokens_per_s']:.0f}")
    beside = Table("tokens a step", "first token s", "gap ms p50", "p99", "max", "p50 before")
    for row in found["beside"]:
        gaps = [row["gap_ms"][name] for name in ("p50", "p99", "max")] + [row["calm_ms"]["p50"]]
        first = f"{row['first_token_s']:.3f}"
        beside.add_row(str(row["max_prefill_tokens"]), first, *(f"{gap:.2f}" for gap in gaps))
    return [alone, beside]


STARTED = {
    "import_s": "imports s",
    "weights_s": "weights s",
    "engine_s": "engine s",
    "first_capture_s": "to its first bucket",
    "other_captures_s": "its other buckets",
    "first_token_s": "first token s",
}


def started(rows: list[dict]) -> list[list[str]]:
    """Starts as lines of text, the heads first."""
    lines = [[row["case"], str(row["captures"]), *(f"{row[name]:.2f}" for name in STARTED)] for row in rows]
    return [["", "buckets", *STARTED.values()], *lines]


def start_table(rows: list[dict]) -> Table:
    """Seconds of each part of each start."""
    head, *lines = started(rows)
    table = Table(*head)
    for line in lines:
        table.add_row(*line)
    return table
