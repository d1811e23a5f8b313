"""Tables for the terminal: buckets, backends, ladders, and what each further bucket buys."""

from __future__ import annotations

from benchmark.buckets import KINDS
from rich.table import Table

from capturing.backends import captured, serving

SHARED = ("logits", "step buffers", "workspaces", "activations and cache")  # lines of the ledger that all buckets share


def bucket_table(document: dict) -> Table:
    """A line per bucket, backend and context, and one per engine for what all buckets share."""
    measured = [each for row in document["buckets"] for each in row["backends"]]
    has_eager = any(step.get("eager_ms") for each in measured for step in each["steps"])
    has_trace = document["trace"] is not None
    head = ["bucket", "backend", "capture s", "pool MiB", "driver MiB", "NVML MiB", "workspace MiB", "kernels"]
    head += [
        "context",
        "step ms p20",
        "p50",
        "p80",
        *(["eager p50"] if has_eager else []),
        "bytes / copy rate, ms",
        "serves",
    ]
    table = Table(*head, *(["padding it saves"] if has_trace else []), title="What each bucket takes")
    for row in document["buckets"]:
        bucket, saved = str(row["bucket"]), [_share(row["waste_saved"])] if has_trace else []
        for each in row["backends"]:
            sizes = [_mib(each[name]) for name in ("pool_bytes", "driver_bytes", "nvml_bytes", "workspace_bytes")]
            count = "-" if each["kernels"] is None else str(each["kernels"])
            capture = [each["backend"], f"{each['capture_s']:.2f}", *sizes, count]
            for step in each["steps"]:
                if "reason" in step:
                    figures = ["does not fit", "-", "-", *(["-"] if has_eager else []), "-", "-"]
                else:
                    figures = [f"{step['step_ms'][name]:.3f}" for name in ("p20", "p50", "p80")]
                    figures += [f"{step['eager_ms']['p50']:.3f}"] if has_eager else []
                    figures += [f"{step['floor_ms']:.3f}", "yes" if step["serves"] else ""]
                table.add_row(bucket, *capture, str(step["context"]), *figures, *saved)
                bucket, capture, saved = "", [""] * len(capture), [""] * len(saved)
        table.add_section()
    captions = []
    for engine in (each for each in document["engines"] if "ledger" in each):
        shared = {line["name"]: line["bytes"] for line in engine["ledger"]["lines"] if line["name"] in SHARED}
        table.add_row("shared", engine["backend"], "", _mib(sum(shared.values())))
        said = ", ".join(f"{name} {_mib(size)} MiB" for name, size in shared.items())
        captions.append(f"shared by all buckets with {engine['backend']}: {said}")
        *others, largest = (each for each in measured if each["backend"] == engine["backend"])
        beyond = sum(each["pool_bytes"] for each in others) + sum(each["driver_bytes"] for each in (*others, largest))
        seconds = sum(each["capture_s"] for each in others)
        captions.append(
            f"{len(others)} buckets were captured in {seconds:.2f} s after the largest, "
            f"and all graphs take {_mib(beyond)} MiB beyond its pool, whose activations all use"
        )
    table.caption = "\n".join(captions)
    return table


def sharing_table(document: dict) -> Table:
    """What each bucket would take with a pool, outputs and workspaces of its own, and what it adds as it is."""
    head = [column for kind in KINDS.values() for column in (f"{kind} alone", "shared")]
    table = Table("bucket", "backend", *head, title="What sharing saves, MiB")
    measured = [(row["bucket"], each) for row in document["buckets"] for each in row["backends"]]
    for bucket, each in measured:
        sizes = [_mib(size) for kind in KINDS for size in (each["alone"][kind], each[kind])]
        table.add_row(str(bucket), each["backend"], *sizes)
    table.add_section()
    for backend in dict.fromkeys(each["backend"] for _, each in measured):
        rows = [each for _, each in measured if each["backend"] == backend]
        sums = [sum(size) for kind in KINDS for size in ([row["alone"][kind] for row in rows], [r[kind] for r in rows])]
        table.add_row("sum", backend, *map(_mib, sums))
    return table


def backend_table(document: dict) -> Table:
    """Who serves each bucket, and what the second backend of one adds."""
    title = "Backends" + "".join(
        f"\n{each['backend']} was not measured: {each['reason'].splitlines()[0]}"
        for each in document["engines"]
        if "reason" in each
    )
    table = Table("bucket", "served by", "faster than the other by", "the second adds MiB", title=title)
    for row in document["buckets"]:
        spans = [f"{span['backend']} from {span['context']} tokens a row" for span in row["spans"]]
        second = captured(row)[1:]
        added = _mib(sum(each["pool_bytes"] + each["driver_bytes"] for each in second)) if second else "-"
        table.add_row(str(row["bucket"]), ", ".join(spans), ", ".join(_gains(row)), added)
    return table


def _gains(row: dict) -> list[str]:
    """At each context, the share of the median step that the backend in force saves of the best other one's."""
    gains = []
    for step in serving(row):
        others = [
            other["step_ms"]["p50"]
            for each in row["backends"]
            for other in each["steps"]
            if other["context"] == step["context"] and not other["serves"] and "step_ms" in other
        ]
        if others and "step_ms" in step:
            gains.append(f"{1 - step['step_ms']['p50'] / min(others):.1%} at {step['context']}")
    return gains


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
