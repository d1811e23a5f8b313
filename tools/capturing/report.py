"""Tables for the terminal: the buckets, the ladders, and what each further bucket buys."""

from __future__ import annotations

from rich.table import Table

SHARED = ("logits", "step buffers", "workspaces", "activations and cache")  # lines of the ledger that all buckets share


def bucket_table(document: dict) -> Table:
    """A line per bucket and context, and one for what all buckets share."""
    has_eager = any(step.get("eager_ms") for row in document["buckets"] for step in row["steps"])
    has_trace = document["trace"] is not None
    head = ["bucket", "capture s", "pool MiB", "driver MiB", "NVML MiB", "context", "step ms p20", "p50", "p80"]
    head += [*(["eager p50"] if has_eager else []), "bytes / copy rate, ms"]
    table = Table(*head, *(["padding it saves"] if has_trace else []), title="What each bucket takes")
    for row in document["buckets"]:
        sizes = [_mib(row[name]) for name in ("pool_bytes", "driver_bytes", "nvml_bytes")]
        capture = [str(row["bucket"]), f"{row['capture_s']:.2f}", *sizes]
        saved = [_share(row["waste_saved"])] if has_trace else []
        for step in row["steps"]:
            if "reason" in step:
                figures = ["does not fit", "-", "-", *(["-"] if has_eager else []), "-"]
            else:
                figures = [f"{step['step_ms'][name]:.3f}" for name in ("p20", "p50", "p80")]
                figures += [f"{step['eager_ms']['p50']:.3f}"] if has_eager else []
                figures += [f"{step['floor_ms']:.3f}"]
            table.add_row(*capture, str(step["context"]), *figures, *saved)
            capture, saved = [""] * len(capture), [""] * len(saved)
        table.add_section()
    shared = {line["name"]: line["bytes"] for line in document["ledger"]["lines"] if line["name"] in SHARED}
    table.add_row("shared", "", _mib(sum(shared.values())))
    table.caption = "shared by all buckets: " + ", ".join(f"{name} {_mib(size)} MiB" for name, size in shared.items())
    return table


def ladder_table(document: dict) -> Table:
    """The chosen ladder beside the others."""
    choice = document["choice"]
    title = f"Ladders on the trace, steps as measured at {choice['context']} tokens"
    table = Table("ladder", "buckets", "MiB", "ms per step", "padding", "sizes", title=title)
    for each in choice["ladders"]:
        time = "not measured" if each["step_ms"] is None else f"{each['step_ms']:.3f}"
        sizes = ", ".join(map(str, each["sizes"]))
        table.add_row(each["name"], str(len(each["sizes"])), _mib(each["bytes"]), time, _share(each["waste"]), sizes)
    return table


def further_table(document: dict) -> Table:
    """The best ladder of at most 1, 2, ... buckets."""
    table = Table(
        "buckets", "MiB", "ms per step", "less than before", "padding", "sizes", title="What each bucket buys"
    )
    before = None
    for each in document["choice"]["table"]:
        gain = "-" if not before else f"{1 - each['step_ms'] / before:.1%}"
        sizes = ", ".join(map(str, each["sizes"]))
        count = str(each["max_buckets"])
        table.add_row(count, _mib(each["bytes"]), f"{each['step_ms']:.3f}", gain, _share(each["waste"]), sizes)
        before = each["step_ms"]
    return table


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.1f}"


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
