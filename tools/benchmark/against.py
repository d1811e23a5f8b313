"""Runs peers beside ours: same prompts, same weights, same machine, each in a process of its own under this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

TOOLS = Path(__file__).resolve().parent.parent
LAST_LINES = 12  # of what a peer that crashed wrote


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
    with TemporaryDirectory() as folder:
        job_path, result_path = Path(folder, "job"), Path(folder, "result")
        job_path.write_text(json.dumps(job | {"peer": name}))
        path = os.pathsep.join(filter(None, [str(TOOLS), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "benchmark.peers", str(job_path), str(result_path)]
        failure = None
        with Path(folder, "log").open("w+") as log:
            try:
                ran = subprocess.run(
                    command,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    timeout=timeout_s,
                    env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
                )
            except subprocess.TimeoutExpired:
                failure = f"ended after {timeout_s} s (--peer-timeout)"
            else:
                if ran.returncode:
                    log.seek(0)
                    last = "".join(log.readlines()[-LAST_LINES:])
                    failure = f"its process ended with {ran.returncode}: {last}"
        result = json.loads(result_path.read_text()) if result_path.exists() else {"name": name, "rows": []}
    if failure is not None:
        result["error"] = failure
    return result


def run_peers(names: list[str], job: dict, timeout_s: int, ours: list[dict], figure: str) -> Iterator[dict]:
    """Every peer's results, as they come, each figure with its ratio to ours.

    Args:
        names: of the peers.
        job, timeout_s: as `run_peer` takes them.
        ours: our rows, with `case`.
        figure: what is compared: "step_ms" (theirs over ours) or "tokens_per_s" (ours over theirs); more than 1 is
            slower than ours either way.
    """
    mine = {row["case"]: row for row in ours}
    for name in names:
        result = run_peer(name, job, timeout_s)
        for row in result["rows"]:
            if figure not in row:
                continue
            our_row = mine[row["case"]]
            if figure == "step_ms":
                row["ratio"] = row["step_ms"]["p50"] / our_row["step_ms"]["p50"]
                row["same_tokens"] = same_start(row.pop("token_ids"), our_row["token_ids"])
            else:
                row["ratio"] = our_row["tokens_per_s"] / row["tokens_per_s"]
        yield result


def same_start(theirs: list[int], ours: list[int]) -> int:
    """How many tokens two answers begin with alike."""
    pairs = zip(theirs, ours, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(theirs), len(ours)))


def cell(result: dict, case: str, figure: str) -> str:
    """What a table says of one peer at one case."""
    if "reason" in result:
        return result["reason"]
    for row in result["rows"]:
        if row["case"] == case:
            if figure not in row:
                return row.get("reason") or f"error: {row['error'].splitlines()[0][:60]}"
            value = f"{row['step_ms']['p50']:.3f}" if figure == "step_ms" else f"{row['tokens_per_s']:.0f}"
            return f"{value} ({row['ratio']:.2f}x)"
    return f"error: {result['error'].strip().splitlines()[-1][:60]}" if "error" in result else "-"
