"""SmolLM2-135M on a CPU in float32: the same greedy tokens as transformers, and the demo as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny

from graphattn import LLM, ModelFileError, SamplingParams

pytestmark = pytest.mark.model
ROOT = Path(__file__).parent.parent
PROMPTS = (
    "The capital of France is",
    "Once upon a time",
    "def fibonacci(n):",
    "Water boils at",
    "The three primary colours are",
    "In 1969, the first humans",
    "A recipe for pancakes:\n1.",
    "Dear Sir or Madam,",
    "The mitochondria is",
    "Q: What is 7 times 8?\nA:",
    "import numpy as np\n",
    "The quick brown fox",
    "To be, or not to be",
    "My favourite season is",
    "The largest planet in the solar system",
    "She opened the door and",
    "List of fruits: apple, banana,",
    "The stock market",
    "Why do cats purr?",
    "a",
)


def test_greedy_tokens_are_those_of_generate(weights: Path) -> None:
    """20 prompts x 64 tokens, through chunked prefill, prefix cache and several buckets."""
    from graphattn.hf import load_model

    model, tokenizer = load_model(weights, dtype=torch.float32)
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    tokenizer.padding_side = "left"
    padded = tokenizer(list(PROMPTS), return_tensors="pt", padding=True)
    with torch.no_grad():
        rows = model.generate(**padded, max_new_tokens=64, do_sample=False)
    expected = [row[padded["input_ids"].shape[1] :].tolist() for row in rows]
    params = SamplingParams(temperature=0, max_tokens=64)
    with LLM(model, tokenizer=tokenizer, max_batch=12, max_seq_len=256, max_prefill_tokens=50) as llm:
        outputs = llm.generate(ids, params)
        assert llm.pool.num_used == 0
    end = tokenizer.eos_token_id
    for output, row in zip(outputs, expected, strict=True):
        kept = row[: row.index(end) + 1] if end in row else row
        assert list(output.token_ids) == kept
        assert output.finish_reason == ("stop" if end in row else "length")
        assert output.text == tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_demo(weights: Path) -> None:
    """It streams an answer through the chat template and says what ran."""
    command = [
        sys.executable,
        str(ROOT / "tools" / "demo.py"),
        "--max-tokens",
        "12",
        "--",
        "What is the capital of France?",
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, cwd="/")
    assert ran.returncode == 0, ran.stderr
    assert "> What is the capital of France?" in ran.stdout
    assert "The capital of France is Paris." in ran.stdout
    for word in ("tokens/s", "buckets", "weights", "KV pages"):
        assert word in ran.stdout


def test_a_gguf_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"no model at all")
    with pytest.raises(ModelFileError, match="is not a GGUF file: it does not start with the bytes 'GGUF'"):
        LLM(path, device="cpu")
    path.write_bytes(b"GGUF" + bytes(range(200)))
    with pytest.raises(ModelFileError, match="could not be converted from GGUF"):
        LLM(path, device="cpu")


def test_paths_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="neither a folder with config.json nor a .gguf file"):
        LLM(tmp_path, device="cpu")
    with pytest.raises(ModelFileError, match="does not exist"):
        LLM(tmp_path / "nothing", device="cpu")
    with pytest.raises(ModelFileError, match="does not exist"):
        LLM(tmp_path / "nothing.gguf", device="cpu")


def test_a_folder_that_lacks_weights_is_not_served(tmp_path: Path) -> None:
    model = tiny("llama", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, words in (
        ({"num_hidden_layers": 3}, r"lacks \d+ weights that its config asks for \(model.layers.2"),
        ({"hidden_size": 32}, "cannot be loaded: RuntimeError"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ModelFileError, match=words):
            LLM(tmp_path, device="cpu")
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelFileError, match="cannot be loaded: SafetensorError"):
        LLM(tmp_path, device="cpu")
