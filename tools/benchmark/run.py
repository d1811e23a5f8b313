"""One run of the bench: what is asked, and the document that it grows."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from rich.console import Console

from graphattn import LLM

from .accuracy import accuracy, is_wrong
from .against import run_peers
from .environment import clocks, environment
from .report import peers_table
from .rows import PREFILL_TOKENS, WARM_TOKENS
from .shape import random_model
from .timing import copy_rate

SCHEMA_VERSION = 2
FP8_FLOOR = 0.2  # of log-probabilities: what an fp8 cache may add to their RMS error
WIDTH = 160  # of tables that go to no terminal


class Run:
    """Measures the ceiling when it is made; the workload then adds its part.

    Args:
        workload: its name.
        shape: config of the model.
        engine: arguments of `LLM` that are the same for every engine of the run.
        commit: None to ask git.
        json_path: where the document is written whenever something is added; None for nowhere.

    Attributes:
        device, dtype: what the model runs on, and in.
        rate: bytes per second of a copy within the device.
        document: what is known so far.
        console: where tables go.
    """

    def __init__(self, workload: str, shape: Path, engine: dict, commit: str | None, json_path: Path | None):
        self.shape, self.engine, self._json_path = shape, engine, json_path
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        self.console = Console(highlight=False, stderr=True)
        if not self.console.is_terminal:
            self.console = Console(highlight=False, stderr=True, width=WIDTH)
        before = clocks(self.device)
        self.rate = copy_rate(self.device)
        self.console.print(f"a copy within the device runs at {self.rate / 1e9:.0f} GB/s")
        self.document = {
            "schema_version": SCHEMA_VERSION,
            "workload": workload,
            "environment": environment(self.device, commit) | {"clocks": {"before": before}},
            "model": {"shape": shape.stem, "dtype": str(self.dtype), "weights": "random"},
            "options": engine,
            "copy_rate_gb_s": self.rate / 1e9,
        }

    def add(self, **parts) -> None:
        """Adds to the document and writes it, so that what comes later can fail without loss."""
        self.document |= parts
        if self._json_path is not None:
            self._json_path.write_text(json.dumps(self.document, indent=1) + "\n")

    def collect(self, rows: Iterable[dict], **parts) -> list[dict]:
        """Adds rows one by one, each when it is measured, and parts with them; returns all."""
        found = []
        for row in rows:
            found.append(row)
            self.add(rows=found, **parts)
        return found

    def check(self) -> bool:
        """Whether our results are right: if not, says so, and nothing should be measured."""
        checked = accuracy(self.shape, self.dtype, self.device, self.engine)
        self.add(accuracy=checked)
        self.console.print(checked)
        self._free()
        wrong = is_wrong(checked, FP8_FLOOR if self.engine.get("kv_cache_dtype") == "fp8" else 1e-3)
        if wrong:
            self.console.print("our error is more than twice plain torch's: not measuring a step that is wrong")
        return not wrong

    def model(self):
        """The random model."""
        return random_model(self.shape, self.dtype, self.device)

    def on_engine(self, sizes: dict, measure: Callable[[LLM], list[dict]]) -> list[dict]:
        """What `measure` finds on an engine of these sizes; the engine's own account goes into the document."""
        started, model = time.perf_counter(), self.model()
        options = {"max_prefill_tokens": PREFILL_TOKENS} | self.engine | sizes
        with LLM(model, prefix_cache=False, **options) as llm:
            start_seconds = time.perf_counter() - started
            rows = measure(llm)
            account = {"explain": llm.explain().splitlines(), "ledger": llm.ledger().to_json()}
        self.add(options=options, start_s=start_seconds, **account)
        return rows

    def against(self, names: list[str], timeout_s: int, setting: dict, cases: list[str], **job) -> None:
        """Runs peers on the same cases and adds what they did.

        Args:
            names: of the peers.
            timeout_s: seconds that each may take.
            setting: `max_batch` and `max_len`, as `Setting` takes them, and `compile`.
            cases: as our rows are called.
            job: what else the workload takes.
        """
        self._free()
        setting = setting | {"shape": str(self.shape.resolve()), "device": self.device}
        job |= {"workload": self.document["workload"], "cases": cases, "setting": setting}
        results: list[dict] = []
        for result in run_peers(names, job, timeout_s, self.document["rows"]):
            results.append(result)
            said = result.get("reason") or result.get("error") or result["attention_path"]
            self.console.print(f"{result['name']}: {said}")
            self.add(peers=results)
        self.add(peers=results, warm_tokens=WARM_TOKENS)
        self.console.print(peers_table(self.document))

    def finish(self) -> None:
        """Notes the clocks at the end and prints the document, the last line."""
        self.document["environment"]["clocks"]["after"] = clocks(self.device)
        if isinstance(self.document["rows"], list):
            for row in self.document["rows"]:
                row.pop("token_ids", None)  # they were for comparing
        self.add()
        print(json.dumps(self.document), flush=True)

    def _free(self) -> None:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
