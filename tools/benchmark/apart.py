"""Runs a module of the bench in a process of its own: `python -m benchmark.MODULE JOB RESULT`, both JSON files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

TOOLS = Path(__file__).resolve().parent.parent
LAST_LINES = 12  # of what a process that crashed wrote


def run_apart(
    module: str, job: dict, timeout_s: int | None = None, environment: Mapping[str, str] | None = None
) -> tuple[dict, str | None]:
    """Runs it and waits.

    Args:
        module: its name within `benchmark`.
        job: what it reads from JOB.
        timeout_s: seconds until it is ended; None to wait for it.
        environment: variables beside this process's.

    Returns:
        What it last wrote to RESULT, empty if nothing, and how it failed, None if it did not.
    """
    with TemporaryDirectory() as folder:
        job_path, result_path = Path(folder, "job"), Path(folder, "result")
        job_path.write_text(json.dumps(job))
        path = os.pathsep.join(filter(None, [str(TOOLS), os.environ.get("PYTHONPATH")]))
        failure = None
        with Path(folder, "log").open("w+") as log:
            try:
                ran = subprocess.run(
                    [sys.executable, "-m", f"benchmark.{module}", str(job_path), str(result_path)],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    timeout=timeout_s,
                    env={**os.environ, **(environment or {}), "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
                )
            except subprocess.TimeoutExpired:
                failure = f"ended after {timeout_s} s (--peer-timeout)"
            else:
                if ran.returncode:
                    log.seek(0)
                    last = "".join(log.readlines()[-LAST_LINES:])
                    failure = f"its process ended with {ran.returncode}: {last}"
        return json.loads(result_path.read_text()) if result_path.exists() else {}, failure
