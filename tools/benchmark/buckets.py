"""What tools/capture.py found, as a part of the page of measurements."""

from __future__ import annotations

from .markdown import table

SHOWN = 12  # buckets in the table, the smallest and the largest among them
KINDS = {
    "pool_bytes": "torch's pool",
    "driver_bytes": "driver",
    "output_bytes": "outputs",
    "workspace_bytes": "workspaces",
}


def buckets(document: dict) -> str:
    """Buckets with each backend, what sharing saves, and the ledger of each engine before steps were timed."""
    rows = document["buckets"]
    some = len(rows) > SHOWN
    if some:
        rows = [rows[round(index * (len(rows) - 1) / (SHOWN - 1))] for index in range(SHOWN)]
    contexts = document["contexts"]
    head = ["bucket", "backend", "capture ms", "kernels", *(f"ms at {context}" for context in contexts)]
    head += [f"eager at {contexts[0]}", f"bytes / copy rate at {contexts[0]}"]
    body = []
    for row in rows:
        for each in row["backends"]:
            steps = [f"{step['step_ms']['p50']:.2f}" if "step_ms" in step else "does not fit" for step in each["steps"]]
            first = each["steps"][0]
            eager = "-" if first["eager_ms"] is None else f"{first['eager_ms']['p50']:.1f}"
            count = "-" if each["kernels"] is None else str(each["kernels"])
            captured = f"{each['capture_s'] * 1e3:.0f}"
            floor = f"{first['floor_ms']:.2f}"
            body.append([str(row["bucket"]), each["backend"], captured, count, *steps, eager, floor])
    parts = [f"{len(document['buckets'])} buckets were captured{'; these are some of them' if some else ''}.\n"]
    parts.append(table(head, body))
    backends = dict.fromkeys(each["backend"] for row in document["buckets"] for each in row["backends"])
    parts += [_shared(document, backend) for backend in backends]
    return "\n".join([*parts, *(_ledger(engine) for engine in document["engines"] if "ledger" in engine)])


def _shared(document: dict, backend: str) -> str:
    rows = [each for row in document["buckets"] for each in row["backends"] if each["backend"] == backend]
    *others, largest = rows
    seconds = sum(each["capture_s"] for each in others)
    text = (
        f"With {backend}, all buckets but the largest were captured in {seconds:.2f} s, the largest in "
        f"{largest['capture_s']:.2f} s. MiB of all buckets, with all to themselves and as they are:\n"
    )
    body = [
        [name, _mib(sum(each["alone"][kind] for each in rows)), _mib(sum(each[kind] for each in rows))]
        for kind, name in KINDS.items()
    ]
    return "\n".join([text, table(["", "alone", "shared"], body)])


def _ledger(engine: dict) -> str:
    book = engine["ledger"]
    body = [
        [line["name"], _mib(line["bytes"]), "" if line["predicted"] is None else _mib(line["predicted"]), line["meter"]]
        for line in book["lines"]
    ]
    body.append(["free", _mib(book["meters"]["free"]), _mib(book["predicted_free"]), book["meters"]["source"]])
    return "\n".join([f"Memory with {engine['backend']}, MiB:\n", table(["part", "is", "predicted", "meter"], body)])


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:,.1f}"
