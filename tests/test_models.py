"""The sweep over transformers' model types tells served from refused from wrong, and the page says what was found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from graphattn.backends.reference import ReferencePlan
from graphattn.hf import oracle
from tools.families import page, sweep
from tools.families.shrink import NotBuilt, tiny
from tools.families.sweep import BY_ATTACH, NOT_BUILT, REFUSED, SERVED, WRONG, entries, judge

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parent.parent
# Of every verdict and every reason, what a family of that kind is to get.
SAMPLE = {
    "arcee": SERVED,
    "bart": BY_ATTACH,
    "bert": REFUSED,  # not causal
    "bigbird_pegasus": REFUSED,  # not causal
    "bloom": REFUSED,  # no attention interface
    "diffllama": REFUSED,  # two calls in a layer
    "falcon": REFUSED,  # no attention interface
    "gemma3": REFUSED,  # a vision tower
    "gptj": REFUSED,  # no attention interface
    "hrm_text": REFUSED,  # layers that run again
    "jamba": REFUSED,  # linear attention between
    "llama4_text": REFUSED,  # chunks
    "longcat_flash": SERVED,  # two attention modules in a layer
    "mpt": REFUSED,  # no attention interface
    "qwen3_next": REFUSED,  # linear attention between
    "reformer": NOT_BUILT,
    "xlnet": REFUSED,  # no attention interface
}
REASONS = {
    "bert": "not causal",
    "bloom": "interface was called for layers []",
    "diffllama": "called for layers [0, 0, 1, 1",
    "falcon": "interface was called for layers []",
    "gptj": "interface was called for layers []",
    "hrm_text": "called for layers [0, 0, 0",
    "jamba": "keeps a state",
    "llama4_text": "chunked_attention",
    "mpt": "interface was called for layers []",
    "qwen3_next": "keeps a state",
}


@pytest.mark.parametrize("kind", SAMPLE)
def test_a_model_type_gets_its_verdict(kind: str) -> None:
    found = judge(kind)
    assert found.verdict == SAMPLE[kind], found
    assert REASONS.get(kind, "") in (found.reason or "")
    assert (found.error is None) == (found.verdict not in (SERVED, BY_ATTACH))


@pytest.mark.slow
def test_no_model_type_is_wrong() -> None:
    found = list(sweep.sweep(entries()))
    assert len(found) == len(entries()) > 170
    assert [each for each in found if each.verdict == WRONG] == []
    assert sum(each.verdict in (SERVED, BY_ATTACH) for each in found) >= 73


def test_wrong_logits_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the comparison at attach out of the way, and a scale that is a percent off."""
    monkeypatch.setattr(oracle.Oracle, "compared", lambda *args: torch.no_grad())
    monkeypatch.setattr(oracle.Oracle, "check_logits", lambda *args: None)
    attend = ReferencePlan.attend
    monkeypatch.setattr(ReferencePlan, "attend", lambda self, q, *others: attend(self, 1.01 * q, *others))
    found = judge("llama")
    assert found.verdict == WRONG and found.error > sweep.ALLOWED


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (lambda *args: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda *args: float("nan"), "logits differ"),
    ],
    ids=["an error of another kind", "nan"],
)
def test_other_errors_are_wrong(fault, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "_in_llm", fault)
    found = judge("llama")
    assert found.verdict == WRONG and reason in found.reason


def test_a_child_that_dies_or_hangs_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "judge", lambda kind: os._exit(7))
    assert [each.reason for each in sweep.sweep(["llama"])] == ["its process ended with 7"]
    monkeypatch.setattr(sweep, "judge", lambda kind: time.sleep(60))
    assert [each.reason for each in sweep.sweep(["llama"], seconds=0.1)] == ["not done in 0.1 s"]


def test_what_is_not_built_says_why() -> None:
    with pytest.raises(NotBuilt, match="config: .*no-such-model"):
        tiny("no-such-model")


def test_the_page_says_what_the_json_files_say() -> None:
    docs = ROOT / "docs"
    assert (docs / "models.md").read_text() == page.render(docs / "models"), "python tools/models.py page"


def test_no_published_figure_is_wrong() -> None:
    documents = [json.loads(file.read_text()) for file in sorted((ROOT / "docs" / "models").glob("*.json"))]
    assert {document["workload"] for document in documents} == set(page.TITLES)
    for document in documents:
        for row in document["rows"]:
            assert row.get("verdict") != WRONG, row
            assert all(errors["is_right"] for errors in row.get("errors", {}).values()), row


def test_the_tool_writes_what_it_finds(tmp_path: Path) -> None:
    path = tmp_path / "models" / "found.json"
    for arguments in (["families", "--only", "llama,gemma2"], ["sweep", "--only", "llama,bloom"]):
        command = [sys.executable, str(ROOT / "tools" / "models.py"), *arguments, "--json", str(path)]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd="/")
        assert ran.returncode == 0, ran.stderr
        document = json.loads(path.read_text())
        assert document["workload"] == arguments[0] and len(document["rows"]) == 2
        assert document["environment"]["transformers"]
        assert ("| `llama` |" if arguments[0] == "families" else "`llama`") in page.render(path.parent)
