"""The capture tool at a small size: buckets measured, a ladder chosen, a profile that an engine starts from."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console

from graphattn import LLM, BackendError, BucketLadder, CaptureProfile, SamplingParams, Traffic, best_ladder
from graphattn.backends.reference import ReferenceBackend
from graphattn.plan import BACKENDS

ROOT = Path(__file__).parent.parent
SHAPE = ROOT / "tools" / "shapes" / "tiny.json"
TRAFFIC = Traffic(max_batch=12, steps={1: 40, 3: 200, 7: 60, 12: 4})


def run(*options: str) -> tuple[dict, str]:
    """The document of one run, and what it said besides."""
    command = [sys.executable, str(ROOT / "tools" / "capture.py"), "--shape", str(SHAPE), "--steps", "3", *options]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240, env={**os.environ}, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1]), ran.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("capture")


@pytest.fixture(scope="module")
def with_trace(folder: Path) -> tuple[dict, str]:
    TRAFFIC.save(folder / "batches.json")
    paths = {name: str(folder / f"capture.{name}") for name in ("json", "png", "profile")}
    options = ["--contexts", "40,16", "--max-buckets", "3", "--json", paths["json"], "--plot", paths["png"]]
    return run("--trace", str(folder / "batches.json"), *options, "--profile", paths["profile"])


def test_counts_in_thousands(tool) -> None:
    assert tool("benchmark.options").read_counts("--contexts", "512,2k,8k") == [512, 2048, 8192]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch):
    """Imports a module of tools/ by name."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module


def test_every_bucket_is_measured(with_trace: tuple[dict, str], folder: Path) -> None:
    document, said = with_trace
    assert document == json.loads((folder / "capture.json").read_text())
    assert [row["bucket"] for row in document["buckets"]] == [1, 2, 3, 4, 6, 7, 8, 12]
    for row in document["buckets"]:
        assert {span["backend"] for span in row["spans"]} <= {each["backend"] for each in row["backends"]}
        for each in row["backends"]:
            assert each["capture_s"] > 0 and each["pool_bytes"] >= 0 and each["driver_bytes"] >= 0
            assert each["nvml_bytes"] is None or each["nvml_bytes"] >= 0
            assert each["workspace_bytes"] >= 0 and (each["kernels"] is None) == (not torch.cuda.is_available())
            taken = row["bucket"] * (256 * 4 + 8)  # logits, and the id drawn from them
            assert each["alone"]["output_bytes"] == taken and each["output_bytes"] == taken * (row["bucket"] == 12)
            assert [step["context"] for step in each["steps"]] == document["contexts"] == [16, 40]
        for step in (step for each in row["backends"] for step in each["steps"]):
            assert 0 < step["step_ms"]["p20"] <= step["step_ms"]["p50"] <= step["step_ms"]["p80"]
            assert step["floor_ms"] > 0 and (step["eager_ms"] is None) == (not torch.cuda.is_available())
    assert "captured 8 buckets" in said and "timed 8 buckets" in said
    assert "What each bucket takes" in said and "What sharing saves" in said and "7 buckets were captured in" in said
    assert "What each bucket buys" in said
    assert document["model"]["name"] == "tiny" and document["model"]["layers"] == 2
    (engine,) = (each for each in document["engines"] if "ledger" in each)
    lines = {line["name"]: line["bytes"] for line in engine["ledger"]["lines"]}
    assert lines["weights"] > 0 and lines["logits"] > 0 and "KV pages" in said and "shared by all buckets" in said


def test_the_padding_that_a_bucket_saves(with_trace: tuple[dict, str]) -> None:
    saved = {row["bucket"]: row["waste_saved"] for row in with_trace[0]["buckets"]}
    assert saved[12] is None and saved[2] == saved[4] == 0
    whole, without = BucketLadder([*saved]), BucketLadder([size for size in saved if size != 3])
    assert saved[3] == pytest.approx(without.waste(TRAFFIC.steps) - whole.waste(TRAFFIC.steps))


def test_the_chosen_ladder_is_the_best_of_what_was_measured(with_trace: tuple[dict, str]) -> None:
    document, _ = with_trace
    times = {
        row["bucket"]: step["step_ms"]["p50"] / 1e3
        for row in document["buckets"]
        for each in row["backends"]
        for step in each["steps"][:1]
        if step["serves"]
    }
    best = best_ladder(TRAFFIC, times, max_buckets=3)
    chosen, *others = document["choice"]["ladders"]
    assert chosen["name"] == "chosen" and tuple(chosen["sizes"]) == best.sizes
    assert chosen["step_ms"] == pytest.approx(best.seconds / TRAFFIC.num_steps * 1e3)
    assert [each["name"] for each in others] == ["powers of two", "step 8", "step 16", "default"]
    assert all(each["step_ms"] >= chosen["step_ms"] * (1 - 1e-9) for each in others if len(each["sizes"]) <= 3)
    table = document["choice"]["table"]
    assert table[0]["sizes"] == [12] and table[-1]["sizes"] == chosen["sizes"] and len(table) <= 3
    assert [each["step_ms"] for each in table] == sorted((each["step_ms"] for each in table), reverse=True)


def test_an_engine_starts_from_the_profile(with_trace: tuple[dict, str], folder: Path, tool) -> None:
    profile = CaptureProfile.load(folder / "capture.profile")
    assert list(profile.ladder) == with_trace[0]["choice"]["ladders"][0]["sizes"]
    for bucket in profile.buckets:
        assert all([step.context for step in each.steps] == [16, 40] for each in bucket.backends)
    on = "cuda" if torch.cuda.is_available() else "cpu"
    model = tool("benchmark.shape").random_model(SHAPE, getattr(torch, profile.model["dtype"]), on)
    with LLM(model, max_batch=12, num_pages=40, capture_profile=folder / "capture.profile") as llm:
        assert [each.bucket for each in llm.profile().buckets] == list(profile.ladder)
        assert len(llm.generate([1, 2, 3], SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids) == 3


def test_the_picture_is_drawn(with_trace: tuple[dict, str], folder: Path) -> None:
    assert (folder / "capture.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_trace_nothing_is_chosen(folder: Path) -> None:
    path = folder / "measured.profile"
    document, said = run("--buckets", "1,3", "--contexts", "8", "--profile", str(path), "--plot", str(folder / "x.png"))
    assert document["trace"] is None and document["choice"] is None and "waste_saved" not in document["buckets"][0]
    assert CaptureProfile.load(path).ladder == (1, 3) and "padding it saves" not in said


@pytest.mark.parametrize("max_batch", [1, 2, 8, 24, 256])
def test_candidates_hold_every_alternative_and_what_was_seen(tool, max_batch: int) -> None:
    ladders = tool("capturing.ladders")
    traffic = Traffic(max_batch=max_batch, steps={rows: rows for rows in range(1, max_batch + 1)})
    found = set(ladders.candidates(max_batch, traffic))
    others = ladders.alternatives(max_batch)
    assert all(found >= set(ladder) and ladder.max == max_batch for ladder in others.values())
    assert len(found) == min(max_batch, 64)
    assert max_batch < 24 or others["powers of two"].sizes[:5] == (1, 2, 4, 8, 16)


def test_the_budget_counts_bytes(tool) -> None:
    times, sizes = {1: 0.1, 3: 0.2, 7: 0.3, 12: 0.4}, {1: 5, 3: 5, 7: 5, 12: 10}
    found = tool("capturing.ladders").choose(TRAFFIC, times, sizes, max_buckets=None, max_bytes=15)
    chosen = found["ladders"][0]
    assert chosen["sizes"] == [3, 12] and chosen["bytes"] == 15
    assert found["ladders"][1]["step_ms"] is None, "its buckets were not all measured"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "give one of --model and --shape"),
        ({"model": "x", "shape": SHAPE}, "give one of --model and --shape"),
        ({"shape": SHAPE, "max_buckets": 3}, "--max-buckets limits what is chosen for a trace: give --trace"),
        ({"shape": SHAPE, "budget_mib": 3}, "--budget-mib limits what is chosen"),
        ({"shape": SHAPE, "contexts": "0"}, "--contexts '0': give counts from 1 up"),
        ({"shape": SHAPE, "buckets": "1,x"}, "--buckets '1,x': give counts from 1 up"),
        ({"shape": SHAPE, "buckets": "1,9", "max_batch": 8}, "bucket 9 is larger than max_batch=8"),
        ({"shape": SHAPE, "trace": Path("no.json")}, "no.json cannot be read as recorded batches"),
        ({"shape": SHAPE, "buckets": "2", "contexts": "9999"}, "the model's positions end at 4096"),
    ],
)
def test_what_cannot_be_measured_is_said(tool, options: dict, said: str) -> None:
    main = tool("benchmark.options").complaining(tool("capture").main)
    with pytest.raises(typer.BadParameter, match=said):
        main(**options)


def test_a_trace_of_another_size_is_refused(tool, tmp_path: Path) -> None:
    TRAFFIC.save(tmp_path / "batches.json")
    with pytest.raises(typer.BadParameter, match="--max-batch 4: the trace was recorded with max_batch=12"):
        tool("capture").main(shape=SHAPE, trace=tmp_path / "batches.json", max_batch=4)


def test_contexts_that_do_not_fit_are_left_out(tool) -> None:
    capturing, backends = tool("capturing.measure"), tool("capturing.backends")
    model = tool("benchmark.shape").random_model(SHAPE, torch.float32, "cpu")
    with LLM(model, max_batch=2, num_pages=8) as llm, capturing.progress(Console()) as bars:
        rows, profile = capturing.measure(llm, [64, 16], 2, rate=1e9, compares=True, bars=bars)
    measured = [each.backends[0].steps for each in profile.buckets]
    assert [[step.context for step in steps] for steps in measured] == [[16, 64], [16]]
    assert "10 pages needed for 2 rows of 68 tokens" in rows[1]["steps"][1]["reason"]
    assert rows[0]["steps"][0]["eager_ms"]["p50"] > 0
    lines = [{"name": name, "bytes": size << 20} for name, size in (("logits", 3), ("workspaces", 4), ("weights", 9))]
    shown = [
        {"bucket": bucket.bucket, "backends": [backends.with_serves(row, bucket)]}
        for row, bucket in zip(rows, profile.buckets, strict=True)
    ]
    engines = [{"backend": "reference", "ledger": {"lines": lines}}, {"backend": "fused", "reason": "no GPU"}]
    table = tool("capturing.report").bucket_table({"buckets": shown, "trace": None, "engines": engines})
    assert table.row_count == 5
    shared, captured = table.caption.splitlines()
    assert shared == "shared by all buckets with reference: logits 3.0 MiB, workspaces 4.0 MiB"
    assert (
        captured.startswith("1 buckets were captured in 0.") and "all graphs take 0.0 MiB beyond its pool" in captured
    )
    assert [list(column.cells)[-1] for column in table.columns[:4]] == ["shared", "reference", "", "7.0"]


class Twin(ReferenceBackend):
    """A second backend where there is but one; slower where it counts more tokens than it is fast for."""

    name = "twin"


def test_each_backend_is_measured_in_an_engine_of_its_own(tool, monkeypatch, tmp_path: Path) -> None:
    """With steps whose times are made up: which backend serves, what the tables say, and the profile."""
    monkeypatch.setitem(BACKENDS, "twin", Twin)
    backends, measuring, report = tool("capturing.backends"), tool("capturing.measure"), tool("capturing.report")
    made_up = {("reference", 16): 2.0, ("reference", 40): 3.0, ("twin", 16): 1.5, ("twin", 40): 4.0}

    def time_steps(llm: LLM, num_rows: int, context: int, *, num_steps: int, eager: bool = False) -> list[float]:
        return [made_up[llm._executor.planner.names(num_rows)[0], context]] * num_steps

    monkeypatch.setattr(LLM, "time_steps", time_steps)
    options = {"num_pages": 40, "max_seq_len": 64}
    with measuring.progress(Console()) as bars:
        engines, rows, profile = backends.measure_each(
            backends.candidates("reference, twin, fused", "cpu"),
            lambda: tool("benchmark.shape").random_model(SHAPE, torch.float32, "cpu"),
            BucketLadder([1, 2]),
            options,
            skips=True,
            bars=bars,
            contexts=[16, 40],
            num_steps=2,
            rate=1e9,
            compares=False,
        )
    assert [each["backend"] for each in engines] == ["reference", "twin", "fused"]
    assert "backend     twin on cpu" in engines[1]["explain"] and "needs a CUDA device" in engines[2]["reason"]
    assert [row["spans"] for row in rows] == [
        [{"context": 1, "backend": "twin"}, {"context": 17, "backend": "reference"}]
    ] * 2
    served = [[(step["context"], step["step_ms"]["p50"]) for step in backends.serving(row)] for row in rows]
    assert served == [[(16, 1500), (40, 3000)]] * 2
    rows[1]["backends"][0] |= {"pool_bytes": 2**20, "driver_bytes": 2**20}
    assert [backends.graph_bytes(row) for row in rows] == [0, 2**21]
    document = {"buckets": rows, "trace": None, "engines": engines}
    assert report.bucket_table(document).row_count == 10
    assert all({"logits", "workspaces"} < {line["name"] for line in each["ledger"]["lines"]} for each in engines[:2])
    assert [each.backends for each in profile.costs] == [("reference",), ("twin",)]
    table = report.backend_table(document)
    assert "fused was not measured: backend fused cannot serve" in table.title
    columns = [list(column.cells) for column in table.columns]
    assert columns[1] == ["twin from 1 tokens a row, reference from 17 tokens a row"] * 2
    assert columns[2] == ["25.0% at 16, 25.0% at 40"] * 2 and columns[3] == ["0.0", "0.0"]
    profile.save(tmp_path / "two.profile")
    assert CaptureProfile.load(tmp_path / "two.profile") == profile
    assert profile.backends[2] == profile.buckets[1].spans


def test_a_backend_that_was_asked_for_is_not_left_out(tool) -> None:
    with pytest.raises(BackendError, match="backend fused cannot serve"):
        tool("capture").main(shape=SHAPE, backend="reference,fused", buckets="1", contexts="8", steps=1)
