"""Workload `start`: how long an engine takes to be ready, in new processes, by which compile caches are filled.

`python -m benchmark.start JOB RESULT` is one start; both are JSON files.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from .apart import run_apart

CASES = {"caches empty": "torch", "kernels built": "torch-again", "caches filled": "torch-again"}  # folder of torch's


def measure(shape: Path, engine: dict) -> Iterator[dict]:
    """Starts over empty caches of Triton and torch, over Triton's filled (its kernels are built, Inductor's too), and
    over both filled; FlashInfer's modules are those that are there.

    Args:
        shape: config of the model.
        engine: arguments of `LLM`.

    Yields:
        A row of each: seconds of imports, of making the weights, and of `LLM(...)`, within that up to its first
        captured bucket and from there to the last, and of the first token of a prompt of three after it; how many
        buckets, and how many compiled graphs came from the cache.

    Raises:
        RuntimeError: a start failed; with what it wrote last.
    """
    job = {"shape": str(shape.resolve()), "engine": engine}
    with TemporaryDirectory() as folder:
        for case, kept in CASES.items():
            folders = {"TORCHINDUCTOR_CACHE_DIR": kept, "TRITON_CACHE_DIR": "triton"}
            caches = {name: str(Path(folder, part)) for name, part in folders.items()}
            result, failure = run_apart("start", job, environment=caches)
            if failure is not None:
                raise RuntimeError(f"a start with {case}: {failure}")
            yield {"case": case} | result


def start(job: dict) -> dict:
    """One start in this process, which has imported nothing yet."""
    marks = [time.perf_counter()]

    def lap() -> float:
        marks.append(time.perf_counter())
        return marks[-1] - marks[-2]

    import torch
    from torch._dynamo.utils import counters

    from graphattn import LLM, SamplingParams

    from .shape import random_model

    found, captured = {"import_s": lap()}, []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = random_model(Path(job["shape"]), torch.bfloat16 if device == "cuda" else torch.float32, device)
    found["weights_s"] = lap()

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "capture":
            captured.append(time.perf_counter())

    with LLM(model, progress=progress, **job["engine"]) as llm:
        found["engine_s"] = lap()
        found["first_capture_s"] = captured[0] - marks[-2]
        found["other_captures_s"] = captured[-1] - captured[0]
        found["captures"] = len(captured)
        found["graphs_from_cache"] = counters["aot_autograd"]["autograd_cache_hit"]
        llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
        found["first_token_s"] = lap()
    return found


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(start(json.loads(Path(sys.argv[1]).read_text()))))
