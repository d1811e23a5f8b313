"""The bench runs at small sizes: correctness first, a table, and one JSON document as the last line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WORKLOADS = {
    "decode": ["--batches", "1,3", "--context", "20", "--tokens", "4"],
    "nano": ["--workload", "nano", "--requests", "5", "--longest", "16"],
}


@pytest.mark.parametrize("workload", WORKLOADS)
def test_bench(workload: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "bench.py"), *WORKLOADS[workload], "--json", str(tmp_path / "out")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240, env={**os.environ}, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    document = json.loads(ran.stdout.splitlines()[-1])
    assert document == json.loads((tmp_path / "out").read_text())
    assert document["workload"] == workload and document["accuracy"]["ours_rms"] < 1e-3
    assert {"command", "commit", "torch", "device"} <= document["environment"].keys()
    if workload == "decode":
        assert [row["batch"] for row in document["rows"]] == [1, 3]
        assert all(0 < row["step_ms"]["p20"] <= row["step_ms"]["p80"] for row in document["rows"])
    else:
        (row,) = document["rows"]
        assert 5 <= row["output_tokens"] <= 5 * 16 and row["tokens_per_s"] > 0
