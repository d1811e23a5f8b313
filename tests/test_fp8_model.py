"""What an fp8 cache costs the real model: the perplexity of a text, beside that over a cache of the model's dtype."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from stored import forced_logits
from test_real_model import PROMPTS

from graphattn import calibrate

pytestmark = pytest.mark.model
TEXT = (Path(__file__).parent / "text.txt").read_text()
MOST = 0.03  # by how much, at most, the mean log-probability of a token may fall


def test_perplexity_is_that_over_a_wider_cache(weights: Path) -> None:
    """Calibrated on other text; what scales of 1.0 do is printed too."""
    from graphattn.hf import load_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model, tokenizer = load_model(weights, dtype=dtype, device=device)
    ids = tokenizer(TEXT)["input_ids"]
    scales = calibrate(model, PROMPTS, tokenizer=tokenizer)
    found = {}
    for name, options in (
        (str(dtype), {}),
        ("fp8, calibrated", {"kv_cache_dtype": "fp8", "kv_scales": scales}),
        ("fp8, scales of 1.0", {"kv_cache_dtype": "fp8"}),
    ):
        logits = forced_logits(model, ids, **options)
        labels = torch.tensor(ids[1:], device=logits.device)
        found[name] = torch.nn.functional.cross_entropy(logits[:-1].double(), labels).item()
        print(f"{len(ids)} tokens, cache of {name}: perplexity {torch.tensor(found[name]).exp().item():.4f}")
    wide, calibrated, _ = found.values()
    assert len(ids) > 700 and 1 < wide < 5, "the model does not predict this text"
    assert calibrated - wide < MOST, f"fp8 costs {calibrated - wide:.4f} a token, allowed is {MOST}"
