"""Runs peers beside ours: same prompts, same weights, same machine, each in a process of its own under this one."""

from __future__ import annotations

from collections.abc import Iterator

from .apart import run_apart
from .nano import CASE
from .peers import PEERS
from .peers.peer import Setting
from .published import decode_figures, nano_figures

LONGEST = 1024  # tokens of nano's longest prompt, where an old document does not say


def run_peer(name: str, job: dict, timeout_s: int) -> dict:
    """One peer's results.

    Args:
        name: of the peer.
        job: `setting`, `workload`, `cases` and what the workload takes, as `benchmark.peers` reads it.
        timeout_s: seconds until it is ended; what it found before is kept.

    Returns:
        `name`, and `reason` (why it cannot run here), `error` (how it failed) or `rows` of what was measured, each row
        again with a `reason` or an `error` or figures.
    """
    kind = PEERS[name]
    reason = kind.reason(Setting(**job["setting"]))
    if reason is None and job["workload"] == "nano" and not kind.serves:
        reason = "it serves no queue of requests, only batches that begin together"
    if reason is not None:
        return {"name": name, "attention_path": None, "reason": reason, "rows": []}
    result, failure = run_apart("peers", job | {"peer": name}, timeout_s)
    result = {"name": name, "attention_path": None, "rows": []} | result
    if failure is not None:
        result["error"] = failure
    return result


def run_peers(names: list[str], job: dict, timeout_s: int, ours: list[dict]) -> Iterator[dict]:
    """Every peer's results, as they come, each figure with how many times as long it takes as ours.

    Args:
        names: of the peers.
        job, timeout_s: as `run_peer` takes them.
        ours: our rows, with `case`.
    """
    mine, figure = {row["case"]: row for row in ours}, FIGURES[job["workload"]]
    for name in names:
        result = run_peer(name, job, timeout_s)
        for row in result["rows"]:
            if figure not in row:
                continue
            our_row = mine[row["case"]]
            row["ratio"] = _ratio(_value(our_row, figure), _value(row, figure), figure)
            if "token_ids" in row:
                row["same_tokens"] = same_start(row.pop("token_ids"), our_row["token_ids"])
        yield result


def same_start(theirs: list[int], ours: list[int]) -> int:
    """How many tokens two answers begin with alike."""
    pairs = zip(theirs, ours, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(theirs), len(ours)))


FIGURES = {"decode": "step_ms", "nano": "tokens_per_s"}


def comparison(document: dict) -> list[list[str]]:
    """A table of text: the cases, then ours, each peer's and each published figure, with the ratios in brackets."""
    rows, figure = document["rows"], FIGURES[document["workload"]]
    ours = [_value(row, figure) for row in rows]
    lines = [["", *map(case_of, rows)], ["graphattn", *(_written(value, figure) for value in ours)]]
    for peer in document.get("peers", []):
        lines.append([peer["name"], *(_cell(peer, case_of(row), figure) for row in rows)])
    for name, values in _published(document).items():
        ratios = [_ratio(mine, theirs, figure) for mine, theirs in zip(ours, values, strict=True)]
        cells = [
            "-" if theirs is None else f"{theirs:g} ({ratio:.2f}x)"
            for theirs, ratio in zip(values, ratios, strict=True)
        ]
        lines.append([f"{name}, published", *cells])
    return lines


def case_of(row: dict) -> str:
    """What a row of a document is a measurement of."""
    if "case" in row:
        return row["case"]
    return f"{row['batch']}x{row['context']}" if "batch" in row else CASE


def _published(document: dict) -> dict[str, list[float | None]]:
    shape, rows = document["model"]["shape"], document["rows"]
    if document["workload"] == "nano":
        figures = nano_figures(shape, rows[0]["requests"], rows[0].get("longest", LONGEST))
        return {name: [figure] for name, figure in figures.items()}
    found: dict[str, list[float | None]] = {}
    for at, row in enumerate(rows):
        for name, figures in decode_figures(shape, row["context"]).items():
            found.setdefault(name, [None] * len(rows))[at] = figures.get(row["batch"])
    return found


def _value(row: dict, figure: str) -> float:
    return row["step_ms"]["p50"] if figure == "step_ms" else row["tokens_per_s"]


def _written(value: float, figure: str) -> str:
    return f"{value:.3f}" if figure == "step_ms" else f"{value:,.0f}"


def _ratio(ours: float, theirs: float | None, figure: str) -> float | None:
    """How many times as long theirs takes."""
    if theirs is None:
        return None
    return theirs / ours if figure == "step_ms" else ours / theirs


def _cell(peer: dict, case: str, figure: str) -> str:
    """One peer at one case: its figure and ratio, or why there is none."""
    if "reason" in peer:
        return peer["reason"]
    for row in peer["rows"]:
        if row["case"] == case:
            if figure not in row:
                return row.get("reason") or f"error: {_line(row['error'])}"
            return f"{_written(_value(row, figure), figure)} ({row['ratio']:.2f}x)"
    return f"error: {_line(peer.get('error', 'nothing came back'))}"


def _line(error: str) -> str:
    """The line that tells most: the last of a traceback, the first of a message."""
    lines = error.strip().splitlines()
    return lines[-1 if "Traceback" in error else 0][:80]
