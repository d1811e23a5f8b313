"""The bench runs at small sizes: correctness first, tables, peers, and one JSON document as the last line."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from typer.testing import CliRunner

ROOT = Path(__file__).parent.parent
WORKLOADS = {
    "decode": ["--batches", "1,3", "--context", "20", "--tokens", "4", "--skew", "1x60+3x9", "--against", "all"],
    "nano": ["--requests", "5", "--longest", "16", "--against", "transformers-cb,naive"],
    "attention": ["--cases", "2x40,3x20+1x70,4x40/9+2x7", "--repeats", "3"],
    "step": ["--batches", "1,3", "--context", "20", "--tokens", "3"],
    "prefill": ["--prompt", "90", "--budgets", "64,32", "--decoding", "3", "--context", "20"],
    "start": ["--batches", "3", "--context", "20", "--tokens", "4", "--compile"],
}
ON_A_CPU = ("transformers-cb", "transformers-static", "sdpa", "naive")
EVEN_ONLY = ("transformers-static", "sdpa", "flash-attn")
DRAWN = ("decode", "step")


def run(workload: str, folder: Path) -> dict:
    """The document of one run, which is also in the folder."""
    path = folder / f"{workload}.json"
    command = [sys.executable, str(ROOT / "tools" / "bench.py"), "--workload", workload, "--json", str(path)]
    command += WORKLOADS[workload]
    if workload in DRAWN:
        command += ["--plot", str(folder / f"{workload}.png")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240, env={**os.environ}, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    document = json.loads(ran.stdout.splitlines()[-1])
    assert document == json.loads(path.read_text())
    return document


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


COMPILED = pytest.param("start", marks=pytest.mark.inductor)


@pytest.fixture(scope="module", params=[name for name in WORKLOADS if name != "start"] + [COMPILED])
def document(request: pytest.FixtureRequest, folder: Path) -> dict:
    return run(request.param, folder)


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch):
    """Imports a module of tools/ by name."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module


def is_ordered(figures: dict[str, float]) -> bool:
    return 0 < figures["p20"] <= figures["p50"] <= figures["p80"]


def test_bench(document: dict, folder: Path) -> None:
    workload = document["workload"]
    assert document["schema_version"] == 2 and document["model"]["shape"] == "tiny"
    assert {"command", "commit", "torch", "device", "clocks"} <= document["environment"].keys()
    assert document["environment"]["clocks"].keys() == {"before", "after"}
    assert document["copy_rate_gb_s"] > 0
    if workload != "attention":
        assert document["accuracy"]["ours_rms"] < 1e-3
    {
        "decode": check_decode,
        "nano": check_nano,
        "attention": check_attention,
        "step": check_step,
        "prefill": check_prefill,
        "start": check_start,
    }[workload](document)
    if workload in DRAWN:
        assert (folder / f"{workload}.png").read_bytes().startswith(b"\x89PNG")


def check_decode(document: dict) -> None:
    rows = {row["case"]: row for row in document["rows"]}
    assert list(rows) == ["1x20", "3x20", "1x60+3x9"]
    assert [row["batch"] for row in rows.values()] == [1, 3, 4]
    assert all(is_ordered(row["step_ms"]) and row["steps"] == 4 and row["floor_ms"] > 0 for row in rows.values())
    assert all("token_ids" not in row for row in rows.values())
    peers = {peer["name"]: peer for peer in document["peers"]}
    assert {*ON_A_CPU, "flash-attn", "vllm", "nano-vllm", "nano-vllm-graphattn"} == peers.keys()
    for name, peer in peers.items():
        if name not in ON_A_CPU:
            assert peer.get("reason") or peer.get("error") or peer["rows"]
            continue
        assert "reason" not in peer and "error" not in peer, peer
        assert peer["attention_path"] and peer["versions"]["transformers"]
        assert [row["case"] for row in peer["rows"]] == list(rows)
        for row in peer["rows"]:
            if name in EVEN_ONLY and row["case"] == "1x60+3x9":
                assert row["reason"]
                continue
            assert is_ordered(row["step_ms"]) and row["steps"] == 4, row
            assert row["ratio"] == pytest.approx(row["step_ms"]["p50"] / rows[row["case"]]["step_ms"]["p50"])
            assert row["same_tokens"] == 20, f"{name} generates other tokens than ours at {row['case']}"


def check_nano(document: dict) -> None:
    (row,) = document["rows"]
    assert 5 <= row["output_tokens"] <= 5 * 16 and row["tokens_per_s"] > 0
    continuous, naive = document["peers"]
    (theirs,) = continuous["rows"]
    assert theirs["output_tokens"] == row["output_tokens"]
    assert theirs["ratio"] == pytest.approx(row["tokens_per_s"] / theirs["tokens_per_s"])
    assert "serves no queue" in naive["reason"]


def check_attention(document: dict) -> None:
    assert [row["case"] for row in document["rows"]] == ["2x40", "3x20+1x70", "4x40/9+2x7"]
    for row in document["rows"]:
        assert row["floor_us"] > 0 and row["gemms_us_per_layer"] > 0
        assert row["paths"].keys() == {"reference", "cascade"}
        for found in row["paths"].values():
            assert found["us_per_layer"]["p20"] <= found["us_per_layer"]["p80"]
            assert found["check"]["ours_rms"] < 1e-5
    even, _, shared = (row["floor_us"] for row in document["rows"])
    assert shared / even == pytest.approx((40 + 4 * 9 + 2 * 7) / 80)


def check_step(document: dict) -> None:
    assert [row["case"] for row in document["rows"]] == ["1x20", "3x20"]
    for row in document["rows"]:
        assert row["idle_share"] is None and row["host_us"] > 0 and row["steps"] == 3
        attend = next(each for each in row["top"] if each["name"] == "graphattn::rotary_attend")
        assert attend["count_per_step"] == 2
        assert attend["us_per_step"] == pytest.approx(2 * attend["us_each"])
        assert attend["us_per_layer"] == pytest.approx(attend["us_each"])


def check_start(document: dict) -> None:
    assert [(row["case"], row["graphs_from_cache"]) for row in document["rows"]] == [
        ("caches empty", 0),
        ("kernels built", 0),
        ("caches filled", 1),
    ]
    for row in document["rows"]:
        assert row["captures"] == 3  # buckets 1, 2 and 3
        assert row["first_capture_s"] + row["other_captures_s"] <= row["engine_s"]
        assert min(row[name] for name in ("import_s", "weights_s", "other_captures_s", "first_token_s")) > 0


def check_prefill(document: dict) -> None:
    found = document["rows"]
    assert [(row["prompt_tokens"], row["max_prefill_tokens"]) for row in found["alone"]] == [
        (16, 64),
        (64, 64),
        (90, 64),
    ]
    assert [row["max_prefill_tokens"] for row in found["beside"]] == [64, 32]
    assert all(0 < row["gap_ms"]["p50"] <= row["gap_ms"]["p99"] <= row["gap_ms"]["max"] for row in found["beside"])


def test_page_of_every_workload(document: dict, folder: Path, tool) -> None:
    text = tool("benchmark.page").render(folder)
    assert f"### tiny: {document['workload']}" in text and document["environment"]["command"] in text
    if document["workload"] in DRAWN:
        assert f"benchmarks/{document['workload']}.png" in text


def test_the_page_says_what_the_json_files_say(tool) -> None:
    docs = ROOT / "docs"
    written = tool("benchmark.page").render(docs / "benchmarks")
    assert (docs / "benchmarks.md").read_text() == written, "python tools/bench.py --page docs/benchmarks.md"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"workload": "nope"}, "choose decode, nano, attention, step, prefill"),
        ({"against": "fast"}, "peer 'fast': choose from transformers-cb"),
        ({"workload": "step", "against": "sdpa"}, "--against goes with decode and nano"),
        ({"workload": "nano", "plot_path": Path("x.png")}, "--plot goes with decode and step"),
        ({"cases": "8by3"}, "write ROWSxTOKENS"),
        ({"skew": "1x3+"}, "write ROWSxTOKENS"),
        ({"batches": "1,0"}, "give counts from 1 up"),
        ({"draw": Path("x.json")}, "--draw needs --plot"),
        ({"kv_cache_dtype": "int8"}, "--kv-cache-dtype int8: choose auto or fp8"),
        ({"kv_cache_dtype": "fp8", "workload": "attention"}, "of attention, --compare cache shows both"),
        (
            {"draw": ROOT / "docs" / "benchmarks" / "nano-h100.json", "plot_path": Path("x.png")},
            "is of nano: there are plots of decode and step",
        ),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_runs(tool, options: dict, said: str) -> None:
    with pytest.raises(typer.BadParameter, match=said):
        tool("bench").main(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--backend", "nope"], "backend='nope': choose auto"),
        (["--shape", "README.md"], "README.md is no config of a model"),
        (["--json", "/none/x.json"], "/none/x.json: no file can be written there"),
        (["--plot", "x.txt"], "x.txt: draw one of .png"),
        (["--draw", "README.md", "--plot", "x.png"], "README.md is no document of a measurement"),
    ],
)
def test_what_a_user_got_wrong_is_said_without_a_traceback(tool, options: list[str], said: str) -> None:
    app = typer.Typer()
    app.command()(tool("benchmark.options").complaining(tool("bench").main))
    ran = CliRunner().invoke(app, options)
    assert ran.exit_code == 2
    assert said in " ".join(re.sub("[\u2500-\u257f]", " ", ran.output).split())


def job(shape: Path) -> dict:
    setting = {"shape": str(shape), "device": "cpu", "max_batch": 1, "max_len": 64}
    return {"workload": "decode", "cases": ["1x4"], "tokens": 2, "setting": setting}


def test_a_peer_that_fails_says_how(tool, tmp_path: Path) -> None:
    run_peer = tool("benchmark.against").run_peer
    found = run_peer("sdpa", job(tmp_path / "missing.json"), 240)
    assert found["name"] == "sdpa" and not found["rows"] and "missing.json is no config of a model" in found["error"]
    found = run_peer("sdpa", job(ROOT / "tools" / "shapes" / "tiny.json"), 0)
    assert found == {
        "name": "sdpa",
        "attention_path": None,
        "rows": [],
        "error": "ended after 0 s (--peer-timeout)",
    }


def test_a_case_that_fails_leaves_the_others(tool) -> None:
    attempt = tool("benchmark.peers.__main__").attempt
    assert attempt(lambda: {"steps": 1}) == {"steps": 1}
    assert attempt(lambda: 1 / 0) == {"error": "ZeroDivisionError: division by zero"}


def test_a_failed_peer_is_in_the_table(tool) -> None:
    row = {"case": "1x8", "batch": 1, "context": 8, "step_ms": {"p50": 2.0}}
    peers = [
        {"name": "a", "attention_path": "x", "rows": [{"case": "1x8", "step_ms": {"p50": 3.0}, "ratio": 1.5}]},
        {"name": "b", "attention_path": None, "rows": [{"case": "1x8", "error": "OutOfMemoryError: no room\nat all"}]},
        {"name": "c", "attention_path": None, "rows": [], "error": "Traceback\n ...\nRuntimeError: it crashed\n"},
        {"name": "d", "attention_path": None, "rows": [], "reason": "not installed"},
    ]
    document = {"workload": "decode", "model": {"shape": "tiny"}, "rows": [row], "peers": peers}
    assert tool("benchmark.against").comparison(document) == [
        ["", "1x8"],
        ["graphattn", "2.000"],
        ["a", "3.000 (1.50x)"],
        ["b", "error: OutOfMemoryError: no room"],
        ["c", "error: RuntimeError: it crashed"],
        ["d", "not installed"],
    ]


def test_published_figures_stand_beside_the_same_shape_and_context_only(tool) -> None:
    row = {"case": "8x1024", "batch": 8, "context": 1024, "step_ms": {"p50": 1.0}}
    document = {"workload": "decode", "model": {"shape": "qwen3-0.6b"}, "rows": [row]}
    comparison = tool("benchmark.against").comparison
    assert ["vLLM 0.26, published", "1.68 (1.68x)"] in comparison(document)
    document["rows"] = [row | {"context": 512}]
    assert len(comparison(document)) == 2


def test_a_document_is_drawn_later(tool, tmp_path: Path) -> None:
    tool("bench").main(draw=ROOT / "docs" / "benchmarks" / "decode-h100.json", plot_path=tmp_path / "decode.png")
    assert (tmp_path / "decode.png").read_bytes().startswith(b"\x89PNG")


def test_device_share_of_a_trace(tool) -> None:
    events = [
        {"cat": "kernel", "name": "gemm", "ts": 100.0, "dur": 10.0},
        {"cat": "kernel", "name": "gemm", "ts": 105.0, "dur": 10.0},  # half of it beside the first
        {"cat": "gpu_memcpy", "name": "copy", "ts": 135.0, "dur": 5.0},
        {"cat": "cuda_runtime", "name": "cudaEventSynchronize", "ts": 90.0, "dur": 30.0},
        {"cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 80.0, "dur": 8.0},
    ]
    found = tool("benchmark.step")._device_share({"events": events, "seconds": 100e-6}, steps=2, num_layers=2)
    assert found["kernels_per_step"] == 1.5 and found["busy_us"] == 10.0
    assert found["idle_share"] == pytest.approx(0.5)  # 20 of 40 us
    assert found["host_us"] == pytest.approx(35.0)
    assert found["top"][0] == {
        "name": "gemm",
        "count_per_step": 1.0,
        "us_each": 10.0,
        "us_per_step": 10.0,
        "us_per_layer": 5.0,
    }


def test_lengths(tool) -> None:
    rows = tool("benchmark.rows")
    assert rows.lengths("1x300+2x7") == [300, 7, 7]
    assert rows.prompts([3, 5], 50) == rows.prompts([3, 5], 50)


def test_rows_that_share(tool) -> None:
    rows = tool("benchmark.rows")
    assert rows.sharing_rows("2x32/5+1x7") == [(37, 32, 0), (37, 32, 0), (7, 0, 1)]
    with pytest.raises(ValueError, match="ROWSxSHARED/OWN"):
        rows.sharing_rows("2x32/")
    attention = tool("benchmark.attention")
    config = SimpleNamespace(
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, hidden_size=16, intermediate_size=16
    )
    config.num_hidden_layers = 1
    asked = rows.sharing_rows("3x40/9+2x20")
    chain = attention.Chain(config, torch.float32, "cpu", 5)
    pages = attention.Pages(chain, tool("benchmark.paths").Path("reference"), asked, torch.float32, "cpu")
    first, *others = pages.tables[:3]
    assert all(table[:2] == first[:2] for table in others)
    assert len({page for table in pages.tables for page in table}) == 2 + 3 * 2 + 2 * 2


@pytest.mark.parametrize(
    ("comparison", "count"), [("backends", 2), ("layouts", 4), ("cache", 4), ("rope", 7), ("variants", 9)], ids=str
)
def test_paths_of_a_comparison(tool, comparison: str, count: int) -> None:
    """Each is checked against plain torch."""
    config = tool("benchmark.shape").config_of(ROOT / "tools" / "shapes" / "tiny.json")
    measure = tool("benchmark.attention").measure
    (row,) = measure(config, torch.float32, "cpu", ["2x20"], 2, 1e9, comparison)
    assert len(row["paths"]) == count
    assert all(found["check"]["ours_rms"] < 1e-5 and found["step_us"] > 0 for found in row["paths"].values())


def test_an_engine_over_an_fp8_cache_is_checked_with_a_floor_of_its_own(tool) -> None:
    shape, options = ROOT / "tools" / "shapes" / "tiny.json", {"backend": "auto", "kv_cache_dtype": "fp8"}
    checked = tool("benchmark.accuracy").accuracy(shape, torch.float32, "cpu", options)
    assert 1e-4 < checked["ours_rms"] < 0.05


@pytest.mark.parametrize("shape", sorted((ROOT / "tools" / "shapes").glob("*.json")), ids=lambda path: path.stem)
def test_shapes_are_configs(tool, shape: Path) -> None:
    config = tool("benchmark.shape").config_of(shape)
    assert config.num_attention_heads % config.num_key_value_heads == 0
    assert config.rope_parameters["rope_type"] in ("default", "llama3")
