"""The capture profile: as it was written, for what it was made for, and the engine that starts from it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny

from graphattn import (
    LLM,
    BucketError,
    BucketProfile,
    CaptureProfile,
    InvalidArgumentError,
    OutOfPagesError,
    SamplingParams,
    StepTime,
    Traffic,
)
from graphattn.profile import origin

SIZES = {"max_batch": 4, "num_pages": 40}
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def model(**config):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    return tiny("llama", num_layers=1, head_dim=8, **(sizes | config))


@pytest.fixture(scope="module")
def profile() -> CaptureProfile:
    with LLM(model(), **SIZES) as llm:
        return llm.profile({4: [StepTime(context=8, p20=0.001, p50=0.002, p80=0.003)]}, ladder=[2, 4])


@pytest.fixture
def path(profile: CaptureProfile, tmp_path: Path) -> Path:
    profile.save(tmp_path / "profile.json")
    return tmp_path / "profile.json"


def test_it_says_what_was_measured_on_what(profile: CaptureProfile) -> None:
    assert profile.model == {
        "type": "llama",
        "layers": 1,
        "hidden_size": 16,
        "heads": 2,
        "kv_heads": 1,
        "head_dim": 8,
        "vocab_size": 128,
        "dtype": "float64",
    }
    assert profile.device.startswith("cpu") and (profile.page_size, profile.layout) == (16, "NHD")
    assert profile.versions.keys() == {"graphattn", "torch", "triton", "flashinfer"}
    assert profile.versions["torch"] == torch.__version__
    assert profile.ladder == (2, 4) and profile.max_batch == 4
    assert [each.bucket for each in profile.buckets] == [1, 2, 4]
    assert all(each.capture_seconds > 0 and each.pool_bytes == each.driver_bytes == 0 for each in profile.buckets)
    assert [len(each.steps) for each in profile.buckets] == [0, 0, 1]


def test_it_is_read_as_it_was_written(profile: CaptureProfile, path: Path) -> None:
    assert CaptureProfile.load(path) == profile
    assert json.loads(path.read_text())["schema_version"] == 2


def test_an_engine_takes_its_ladder(path: Path) -> None:
    with LLM(model(), **SIZES, capture_profile=path) as llm:
        assert "buckets     2 (0 steps), 4 (0 steps)" in llm.explain()
        assert [each.bucket for each in llm.profile().buckets] == [2, 4]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"buckets": [1, 4]}, r"buckets=\[1, 4\] and a capture_profile with the ladder \[2, 4\]: give one of them"),
        ({"max_batch": 8}, "max_batch=8, the capture_profile was made for 4: pass max_batch=4"),
        ({"page_size": 4}, "page_size: 16 in the profile, 4 here"),
        ({"layout": "HND"}, "layout: 'NHD' in the profile, 'HND' here"),
        ({"capture_profile": "no.json"}, "no.json cannot be read as a capture profile"),
    ],
)
def test_an_engine_of_another_kind_refuses_it(path: Path, options: dict, words: str) -> None:
    of = model()
    before = of.config
    with pytest.raises(InvalidArgumentError, match=words):
        LLM(of, **(SIZES | {"capture_profile": path} | options))
    assert of.config is before, "the model was left attached"


def test_another_model_is_refused(path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="model hidden_size: 16 in the profile, 32 here"):
        LLM(model(hidden_size=32), **SIZES, capture_profile=path)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"device": "another"}, "device: 'another' in the profile, 'cpu, "),
        ({"versions": {"torch": "1.0"}}, "version of torch: '1.0' in the profile, '"),
        ({"model": {"layers": 2}}, "model layers: 2 in the profile, 1 here"),
    ],
)
def test_what_differs_is_named_with_both_values(profile: CaptureProfile, changed: dict, words: str) -> None:
    here = origin(model(), page_size=16, layout="NHD")
    profile.check(**here)
    changed = {name: value if name == "device" else getattr(profile, name) | value for name, value in changed.items()}
    with pytest.raises(InvalidArgumentError, match=words) as raised:
        replace(profile, **changed).check(**here)
    assert str(raised.value).count("in the profile") == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found: "{", "is not JSON .*: give a capture profile"),
        (lambda found: found | {"schema_version": 7}, "has schema_version 7, this version of graphattn reads 2"),
        (lambda found: {name: found[name] for name in found if name != "model"}, "lacks model: it is not a capture"),
        (lambda found: found | {"model": 3}, "model is 3"),
        (lambda found: found | {"ladder": []}, "at least one is needed"),
        (lambda found: found | {"ladder": [3, 4]}, r"the ladder \[3, 4\] has \[3\], measured were \[1, 2, 4\]"),
        (lambda found: found | {"buckets": [{"bucket": 4}]}, "is no capture profile"),
        (lambda found: found | {"buckets": [{"rows": 4, "steps": []}]}, "is no capture profile .*rows"),
    ],
)
def test_what_no_profile_is(path: Path, change, words: str) -> None:
    changed = change(json.loads(path.read_text()))
    path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(InvalidArgumentError, match=words) as raised:
        CaptureProfile.load(path)
    assert str(path) in str(raised.value)


def test_only_captured_buckets_get_step_times() -> None:
    with LLM(model(), **SIZES) as llm, pytest.raises(InvalidArgumentError, match=r"step times of \[3\], captured are"):
        llm.profile({3: []})


def test_steps_are_timed_and_leave_nothing_behind(tmp_path: Path) -> None:
    batches = tmp_path / "batches.json"
    with LLM(model(), **SIZES, record_batches=batches) as llm:
        before = llm.generate([[1, 2, 3], [4]], GREEDY)
        explained = llm.explain()
        for eager in (False, True):
            seconds = llm.time_steps(3, 20, num_steps=5, eager=eager)
            assert len(seconds) == 5 and all(each > 0 for each in seconds)
        llm.time_steps(4, 1, num_steps=1)
        assert llm.explain() == explained and llm.pool.num_used == 0
        after = llm.generate([[1, 2, 3], [4]], GREEDY)
        assert [each.token_ids for each in after] == [each.token_ids for each in before]
        llm.pool.check()
    recorded = Traffic.load(batches)
    assert recorded.max_batch == 4 and max(recorded.steps) == 2, "timed steps are no traffic"


@pytest.mark.parametrize(
    ("asked", "error", "words"),
    [
        ((0, 5), InvalidArgumentError, "num_rows=0: it must be an int, at least 1"),
        ((1, 0), InvalidArgumentError, "context=0"),
        ((1, 500), InvalidArgumentError, "rows of 500 tokens grow to 522 in 20 timed steps and 3 before"),
        ((5, 5), BucketError, "a batch of 5 rows"),
        ((4, 300), OutOfPagesError, "84 pages needed for 4 rows of 322 tokens, the cache has 39"),
    ],
)
def test_steps_that_cannot_be_timed(asked: tuple[int, int], error: type[Exception], words: str) -> None:
    with LLM(model(), **SIZES) as llm, pytest.raises(error, match=words):
        llm.time_steps(*asked)


def test_steps_are_timed_alone() -> None:
    with LLM(model(), **SIZES) as llm:
        llm.add_request([1, 2], GREEDY)
        with pytest.raises(InvalidArgumentError, match="time_steps runs alone, and there are requests"):
            llm.time_steps(1, 5)


def test_a_bucket_profile_needs_no_step_times() -> None:
    assert BucketProfile(bucket=1, capture_seconds=0.1).steps == ()


@pytest.mark.gpu
def test_graphs_are_timed_beside_the_eager_step() -> None:
    of = tiny("llama", dtype=torch.bfloat16, head_dim=64, hidden_size=128).to("cuda")
    with LLM(of, max_batch=4, num_pages=80, compile=False) as llm:
        replayed, eager = (sorted(llm.time_steps(4, 64, eager=eager))[10] for eager in (False, True))
        assert 0 < replayed < eager
        found = llm.profile()
        assert found.device == torch.cuda.get_device_name() and sum(each.pool_bytes for each in found.buckets) > 0
