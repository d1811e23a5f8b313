"""Runs one peer in a process of its own: `python -m benchmark.peers JOB RESULT`, both JSON files.

What is found is written to RESULT after every case, so that a crash loses nothing that was measured before.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch

from ..environment import clocks, package_version
from ..nano import TEMPERATURE, Requests
from ..rows import lengths, prompts
from ..shape import config_of
from ..timing import spread
from . import PEERS
from .peer import Peer, Setting

EVEN_ONLY = "it takes rows of one length only"


def decode(peer: Peer, job: dict, case: str) -> dict:
    """One case of workload decode."""
    lens = lengths(case)
    if peer.even_rows_only and len(set(lens)) > 1:
        return {"reason": EVEN_ONLY}
    vocab = config_of(Path(peer.setting.shape)).vocab_size
    timed = peer.steps(prompts(lens, vocab), job["tokens"])
    return {
        "steps": len(timed.seconds),
        "step_ms": spread(timed.seconds, 1e3),
        "note": timed.note,
        "token_ids": timed.token_ids,
    }


def nano(peer: Peer, job: dict, case: str) -> dict:
    """Workload nano, which has one case."""
    vocab = config_of(Path(peer.setting.shape)).vocab_size
    requests = Requests(num_requests=job["requests"], longest=job["longest"], vocab_size=vocab)
    num_tokens, seconds = peer.serve(*requests.draw(), TEMPERATURE)
    return {"output_tokens": num_tokens, "seconds": seconds, "tokens_per_s": num_tokens / seconds}


def attempt(call, *arguments) -> dict:
    """What the call found, or how it failed."""
    try:
        return call(*arguments)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def main(job_path: Path, result_path: Path) -> None:
    job = json.loads(job_path.read_text())
    kind, setting = PEERS[job["peer"]], Setting(**job["setting"])
    result: dict = {"name": kind.name, "attention_path": None, "rows": []}

    def write() -> None:
        result_path.write_text(json.dumps(result))

    made = attempt(lambda: {"peer": kind(setting)})
    if "peer" not in made:
        result |= made
        return write()
    peer, measure = made["peer"], {"decode": decode, "nano": nano}[job["workload"]]
    result["versions"] = {package: package_version(package) for package in peer.packages}
    result["clocks"] = {"before": clocks(setting.device)}
    for case in job["cases"]:
        row = {"case": case} | attempt(measure, peer, job, case)
        result["rows"].append(row)
        result["attention_path"] = peer.attention_path
        result["clocks"]["after"] = clocks(setting.device)
        write()
    peer.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
