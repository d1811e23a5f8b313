"""Engines over an fp8 cache: how far their logits are from others', calibration, and what is refused."""

from __future__ import annotations

import random

import pytest
import torch
from stored import forced_logits
from tiny import tiny

from graphattn import LLM, InvalidArgumentError, KVScales, SamplingParams, calibrate
from graphattn.profile import CaptureProfile

MOST = 0.08  # RMS of what fp8 changes in logits, over their RMS: e4m3 rounds by 2^-4 at most, 2% RMS, in every layer


def drawn(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(128), k=count)


def rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_logits_are_near_those_over_a_wider_cache(family: str, layout: str) -> None:
    model, ids = tiny(family, dtype=torch.float32), drawn(200)
    exact = forced_logits(model, ids)
    scales = calibrate(model, [drawn(150, seed=1), drawn(60, seed=2)])
    options = {"kv_cache_dtype": "fp8", "kv_scales": scales, "layout": layout}
    found = forced_logits(model, ids, **options)
    assert 1e-4 < rms(found - exact) / rms(exact) < MOST
    assert torch.equal(found[:128], forced_logits(model, ids[:128], **options)), "tokens to come changed the past"


def test_decode_continues_what_was_prefilled() -> None:
    """Log-probabilities of greedy tokens, decoded one by one over reused pages, are those of a prefill over them."""
    model = tiny("qwen3", dtype=torch.float32)
    scales, params = calibrate(model, [drawn(64)]), SamplingParams(temperature=0, max_tokens=40, logprobs=0)
    prompts = [drawn(50, seed=3), drawn(7, seed=4), drawn(50, seed=3) + drawn(9, seed=5)]
    options = {"kv_cache_dtype": "fp8", "kv_scales": scales}
    with LLM(model, max_batch=3, num_pages=24, max_prefill_tokens=32, **options) as llm:
        outputs = llm.generate(prompts, params)
        assert ", fp8)" in llm.explain() and llm.pool.num_hits
    for prompt, output in zip(prompts, outputs, strict=True):
        logits = forced_logits(model, [*prompt, *output.token_ids], **options)
        rows = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        forced = [row[token].item() for row, token in zip(rows, output.token_ids, strict=True)]
        ours = [row[token] for row, token in zip(output.logprobs, output.token_ids, strict=True)]
        assert max(abs(a - b) for a, b in zip(ours, forced, strict=True)) < 0.02


def test_a_cascade_gives_the_same_tokens() -> None:
    model, params = tiny("llama", dtype=torch.float32), SamplingParams(temperature=0, max_tokens=12)
    prompts = [drawn(40) + drawn(count, seed=count) for count in (1, 5, 20)]
    found = []
    for backend in ("reference", "cascade"):
        with LLM(model, max_batch=3, num_pages=40, backend=backend, kv_cache_dtype="fp8") as llm:
            found.append([output.token_ids for output in llm.generate(prompts, params)])
    assert found[0] == found[1]


def test_bytes_are_those_of_the_dtype_and_pages_twice_as_many() -> None:
    model = tiny("llama", dtype=torch.bfloat16)
    found = {}
    for dtype in ("auto", "fp8"):
        with LLM(model, max_batch=2, kv_bytes=1 << 18, kv_cache_dtype=dtype) as llm:
            line = next(line for line in llm.ledger().lines if line.name == "KV pages")
            found[dtype] = llm.pool.num_usable + 1, line.bytes
    assert found["fp8"][0] == 2 * found["auto"][0] and found["fp8"][1] == found["auto"][1] == 1 << 18


def test_scales_are_the_largest_of_what_transformers_caches() -> None:
    """Keys as they are after norm and rotation, over all prompts, by layer and head; the model is left as it was."""
    model = tiny("qwen3", dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[:16].mul_(100)  # of the first kv head
    prompts = [drawn(30), drawn(11, seed=1)]
    k, v = (torch.zeros(2, 2) for _ in "kv")
    with torch.no_grad():
        for prompt in prompts:
            for at, layer in enumerate(model(torch.tensor([prompt]), use_cache=True).past_key_values.layers):
                k[at] = torch.maximum(k[at], layer.keys.abs().amax((0, 2, 3)))
                v[at] = torch.maximum(v[at], layer.values.abs().amax((0, 2, 3)))
    scales = calibrate(model, prompts)
    for largest, found in ((k, scales.k), (v, scales.v)):
        assert ((largest / found > 223.9) & (largest / found <= 448.1)).all()
    assert len(set(scales.v[1].tolist())) > 1, "both heads are alike"
    assert "forward" not in vars(model) and not any("graphattn" in name for name, _ in model.named_modules())


def test_weights_and_scales_change_under_a_running_engine(tmp_path) -> None:
    """Tokens are those of an engine that began with them, whatever was cached; scales stay where steps read them."""
    model, params = tiny("llama", dtype=torch.float32), SamplingParams(temperature=0, max_tokens=10)
    prompts = [drawn(40), drawn(21, seed=1)]
    scales = calibrate(model, prompts)
    scales = KVScales(2 * scales.k, scales.v)
    narrow = KVScales(scales.k / 64, scales.v / 64)  # most of what is stored saturates
    narrow.save(tmp_path / "narrow.json")
    with LLM(model, max_batch=2, num_pages=30, kv_cache_dtype="fp8", kv_scales=narrow) as llm:
        wanted = [output.token_ids for output in llm.generate(prompts, params)]
    with LLM(model, max_batch=2, num_pages=30, kv_cache_dtype="fp8", kv_scales=scales) as llm:
        first = [output.token_ids for output in llm.generate(prompts, params)]
        layers = llm._executor.binding.layers
        assert torch.equal(torch.stack([layer.kv_scales for layer in layers], 1), torch.stack([scales.k, scales.v]))
        held = [layer.kv_scales.data_ptr() for layer in layers]
        llm.load_weights({}, kv_scales=tmp_path / "narrow.json")
        assert [layer.kv_scales.data_ptr() for layer in layers] == held
        assert [output.token_ids for output in llm.generate(prompts, params)] == wanted != first
        with pytest.raises(InvalidArgumentError, match=r"kv_scales are for \(1, 2\) layers and kv heads"):
            llm.load_weights({}, kv_scales=KVScales(torch.ones(1, 2), torch.ones(1, 2)))
        assert [output.token_ids for output in llm.generate(prompts, params)] == wanted


def test_a_profile_is_for_one_dtype_of_cache(tmp_path) -> None:
    model = tiny("llama", dtype=torch.float32)
    with LLM(model, max_batch=2, num_pages=8, kv_cache_dtype="fp8") as llm:
        profile = llm.profile()
    assert profile.model["kv_cache_dtype"] == "float8_e4m3fn"
    profile.save(tmp_path / "profile.json")
    options = {"max_batch": 2, "num_pages": 8, "capture_profile": tmp_path / "profile.json"}
    with LLM(model, kv_cache_dtype="fp8", **options) as llm:
        assert llm.profile().ladder == CaptureProfile.load(tmp_path / "profile.json").ladder
    with pytest.raises(InvalidArgumentError, match="model kv_cache_dtype: 'float8_e4m3fn' in the profile, 'float32'"):
        LLM(model, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"kv_cache_dtype": "int8"},
            "kv_cache_dtype='int8': choose 'auto' for the model's own, torch.float32, or 'fp8'",
        ),
        ({"kv_cache_dtype": torch.float8_e5m2}, "kv_cache_dtype=torch.float8_e5m2"),
        ({"kv_scales": KVScales(torch.ones(2, 2), torch.ones(2, 2))}, "pass kv_cache_dtype='fp8', or no scales"),
        ({"kv_cache_dtype": "fp8", "kv_scales": 0.5}, "kv_scales is a float: give KVScales, or a file of them"),
        ({"kv_cache_dtype": "fp8", "kv_scales": "nowhere.json"}, "nowhere.json cannot be read as a file of KV scales"),
        (
            {"kv_cache_dtype": "fp8", "kv_scales": KVScales(torch.ones(2, 4), torch.ones(2, 4))},
            r"kv_scales are for \(2, 4\) layers and kv heads, the model has \(2, 2\): calibrate this model",
        ),
    ],
    ids=str,
)
def test_what_an_engine_refuses(options: dict, words: str) -> None:
    model = tiny("llama", dtype=torch.float32)
    with pytest.raises(InvalidArgumentError, match=words):
        LLM(model, max_batch=1, num_pages=4, **options)
    LLM(model, max_batch=1, num_pages=4).close()


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([], "give a list of at least one"),
        ("text", "give a list of at least one"),
        (["text"], "is text and there is no tokenizer"),
        ([[1], []], r"prompts\[1\] has 0 tokens: give 1 to 512"),
        ([[1] * 513], r"prompts\[0\] has 513 tokens: give 1 to 512"),
    ],
    ids=["none", "one text", "no tokenizer", "empty", "too long"],
)
def test_what_calibration_refuses(prompts: object, words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        calibrate(tiny("llama"), prompts)


def test_what_is_not_finite_is_no_scale() -> None:
    model = tiny("llama", dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = torch.nan
    with pytest.raises(InvalidArgumentError, match="the largest values are .* must be finite"):
        calibrate(model, [[1, 2, 3]])
