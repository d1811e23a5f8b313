"""The capture profile: as it was written, for what it was made for, and the engine that starts from it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from tiny import tiny

from graphattn import (
    LLM,
    AttentionSpec,
    BackendError,
    BackendSpan,
    BucketError,
    CacheSpec,
    CaptureProfile,
    InvalidArgumentError,
    OutOfPagesError,
    Planner,
    SamplingParams,
    StepState,
    StepTime,
    Traffic,
)
from graphattn.backends.reference import ReferenceBackend
from graphattn.plan import BACKENDS
from graphattn.profile import origin

SIZES = {"max_batch": 4, "num_pages": 40}
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def with_spans(found: dict, spans: list[tuple[int, str]]) -> dict:
    """A profile's fields with other spans in its first bucket."""
    first, *others = found["buckets"]
    changed = first | {"spans": [{"context": context, "backend": backend} for context, backend in spans]}
    return found | {"buckets": [changed, *others]}


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
        "kv_cache_dtype": "float64",
    }
    assert profile.device.startswith("cpu") and (profile.page_size, profile.layout) == (16, "NHD")
    assert profile.versions.keys() == {"graphattn", "torch", "triton", "flashinfer"}
    assert profile.versions["torch"] == torch.__version__
    assert profile.ladder == (2, 4) and profile.max_batch == 4
    assert [each.bucket for each in profile.buckets] == [1, 2, 4]
    for each in profile.buckets:
        (took,) = each.backends
        assert took.backend == "reference" and took.capture_seconds > 0 and took.pool_bytes == took.driver_bytes == 0
        assert len(took.steps) == (each.bucket == 4) and each.spans == (BackendSpan(context=1, backend="reference"),)


def test_it_is_read_as_it_was_written(profile: CaptureProfile, path: Path) -> None:
    assert CaptureProfile.load(path) == profile
    assert json.loads(path.read_text())["schema_version"] == 4


def test_an_engine_takes_its_ladder(path: Path) -> None:
    with LLM(model(), **SIZES, capture_profile=path) as llm:
        assert "buckets     2 reference (0 steps), 4 reference (0 steps)" in llm.explain()
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
    here = origin(model(), CacheSpec(num_pages=2, dtype=model().dtype))
    profile.check(**here)
    changed = {name: value if name == "device" else getattr(profile, name) | value for name, value in changed.items()}
    with pytest.raises(InvalidArgumentError, match=words) as raised:
        replace(profile, **changed).check(**here)
    assert str(raised.value).count("in the profile") == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found: "{", "is not JSON .*: give a capture profile"),
        (lambda found: found | {"schema_version": 7}, "has schema_version 7, this version of graphattn reads 4"),
        (lambda found: {name: found[name] for name in found if name != "model"}, "lacks model: it is not a capture"),
        (lambda found: found | {"model": 3}, "model is 3"),
        (lambda found: found | {"ladder": []}, "at least one is needed"),
        (lambda found: found | {"ladder": [3, 4]}, r"the ladder \[3, 4\] has \[3\], measured were \[1, 2, 4\]"),
        (lambda found: found | {"buckets": [{"bucket": 4}]}, "is no capture profile"),
        (lambda found: found | {"buckets": [{"rows": 4, "backends": [], "spans": []}]}, "is no capture profile .*rows"),
        (lambda found: with_spans(found, []), r"backends from \[\] tokens a row on: the first begins at 1"),
        (lambda found: with_spans(found, [(2, "reference")]), r"backends from \[2\] tokens a row on"),
        (
            lambda found: with_spans(found, [(1, "reference"), (1, "reference")]),
            r"backends from \[1, 1\] tokens a row on",
        ),
        (
            lambda found: with_spans(found, [(1, "fused")]),
            r"bucket 1 is served by 'fused', measured were \['reference'\]",
        ),
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


class Twin(ReferenceBackend):
    """A second backend where there is but one, which keeps the buckets that it was asked to plan."""

    name = "twin"
    planned: ClassVar[list[int]] = []

    def decode_plan(self, state: StepState, bucket: int):
        self.planned.append(bucket)
        return super().decode_plan(state, bucket)


@pytest.fixture
def twin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "twin", Twin)
    monkeypatch.setattr(Twin, "planned", [])


def steps(**p50: float) -> tuple[StepTime, ...]:
    """Steps that hardly vary, by context: `c16=0.5`."""
    return tuple(
        StepTime(context=int(name[1:]), p20=0.99 * each, p50=each, p80=1.01 * each) for name, each in p50.items()
    )


def measured(backend: str, times: dict[int, tuple[StepTime, ...]]) -> CaptureProfile:
    with LLM(model(), **SIZES, backend=backend) as llm:
        return llm.profile(times, ladder=[2, 4])


@pytest.fixture
def merged(twin) -> CaptureProfile:
    """The reference serves 1 and 2 rows, the twin 4 rows of few tokens, the reference 4 rows from 40 tokens on."""
    times = {1: steps(c10=1, c40=1), 2: steps(c10=1, c40=2), 4: steps(c10=2, c40=3)}
    faster = {1: steps(c10=0.98, c40=2), 2: steps(c10=1.5, c40=2.5), 4: steps(c10=1, c40=4)}
    return CaptureProfile.merge([measured("reference", times), measured("twin", faster)])


def test_every_bucket_gets_the_backend_that_is_fastest_there(merged: CaptureProfile) -> None:
    spans = {each.bucket: [(span.context, span.backend) for span in each.spans] for each in merged.buckets}
    assert spans == {1: [(1, "reference")], 2: [(1, "reference")], 4: [(1, "twin"), (40, "reference")]}
    assert [[one.backend for one in each.backends] for each in merged.buckets] == [["reference", "twin"]] * 3
    assert merged.backends == {each.bucket: each.spans for each in merged.buckets[1:]}
    assert merged.buckets[2].backends[1].steps == steps(c10=1, c40=4)
    assert [merged.buckets[2].backend_at(context) for context in (39, 40)] == ["twin", "reference"]


def test_an_engine_obeys_the_table(merged: CaptureProfile, tmp_path: Path) -> None:
    """Rows that grow from one backend's tokens into the other's; what is generated is the same."""
    params = replace(GREEDY, max_tokens=40)
    prompts = [list(range(3)), list(range(30)), list(range(9)), list(range(40))]
    with LLM(model(), **SIZES) as llm:
        expected = [each.token_ids for each in llm.generate(prompts, params)]
    merged.save(tmp_path / "merged.json")
    Twin.planned.clear()
    with LLM(model(), **SIZES, capture_profile=tmp_path / "merged.json", check=False) as llm:
        captured = [(each.bucket, each.backend) for each in llm._executor.runner.captures]
        assert captured == [(4, "twin"), (4, "reference"), (2, "reference")] and Twin.planned == [4]
        assert [each.token_ids for each in llm.generate(prompts, params)] == expected
        served = {(4, "twin"): 18, (4, "reference"): 21}  # the rows' tokens are 86 to 238, and 157 are 40 a row
        assert llm._executor.runner.served == served
        explained = llm.explain()
        assert "2 reference (0 steps), 4 twin from 1 tokens a row (18 steps), 4 reference from 40 tokens" in explained
        assert "backend     reference, twin on cpu" in explained
        llm.time_steps(4, 50, num_steps=1)
        assert llm._executor.runner.served == served
        again = llm.profile({4: [StepTime(context=each, p20=1, p50=1, p80=1) for each in (10, 39, 40)]})
        took = {each.backend: [step.context for step in each.steps] for each in again.buckets[1].backends}
        assert took == {"twin": [10, 39], "reference": [40]} and again.buckets[1].spans == merged.buckets[2].spans


def test_rows_that_are_missing_count_as_short(merged: CaptureProfile, tmp_path: Path) -> None:
    """Who serves is chosen by the tokens of the whole step: 3 rows of 50 at bucket 4 are as many as 4 of 38."""
    merged.save(tmp_path / "merged.json")
    with LLM(model(), **SIZES, capture_profile=tmp_path / "merged.json") as llm:
        runner = llm._executor.runner
        for length in (52, 53):
            runner.run([0] * 3, [length] * 3, [[[1] * 4] * 3])
        assert runner.served == {(4, "twin"): 1, (4, "reference"): 1}
        runner.verify([0] * 4, [40] * 4, [[[1] * 3] * 4])
        assert runner.served[4, "reference"] == 2


def test_a_backend_beside_a_table_that_has_another_is_refused(merged: CaptureProfile, path: Path) -> None:
    with LLM(model(), **SIZES, backend="reference", capture_profile=path) as llm:
        assert "2 reference (0 steps)" in llm.explain()
    merged.save(path)
    with pytest.raises(InvalidArgumentError, match="buckets are served by reference and twin: leave backend out"):
        LLM(model(), **SIZES, backend="reference", capture_profile=path)


def test_what_cannot_be_merged(profile: CaptureProfile, twin) -> None:
    with pytest.raises(InvalidArgumentError, match="no profiles to merge"):
        CaptureProfile.merge([])
    with pytest.raises(InvalidArgumentError, match="no context at which all backends were measured: {'reference'"):
        CaptureProfile.merge([profile])
    with pytest.raises(InvalidArgumentError, match="page_size: 8 in the profile, 16 here"):
        CaptureProfile.merge([profile, replace(profile, page_size=8)])
    fewer = replace(profile, ladder=(4,), buckets=profile.buckets[2:])
    with pytest.raises(InvalidArgumentError, match=r"profiles of the buckets \[1, 2, 4\] and \[4\]"):
        CaptureProfile.merge([profile, fewer])


def test_a_table_must_name_backends_and_buckets() -> None:
    def made(table: dict) -> Planner:
        spec = AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=4)
        return Planner([spec], CacheSpec(num_pages=8, dtype=torch.float32), "cpu", table)

    for names in ((), ("auto",), ("reference", "flash")):
        with pytest.raises(InvalidArgumentError, match="choose among fused, flashinfer, reference"):
            made({2: [BackendSpan(context=1 + at, backend=name) for at, name in enumerate(names)]} if names else {})
    with pytest.raises(BackendError, match="backend fused cannot serve"):
        made({2: [BackendSpan(context=1, backend="fused")]})
    with pytest.raises(InvalidArgumentError, match=r"no backend for bucket 3: the table has \[2\]"):
        made({2: [BackendSpan(context=1, backend="reference")]}).spans(3)


@pytest.mark.gpu
def test_graphs_are_timed_beside_the_eager_step() -> None:
    of = tiny("llama", dtype=torch.bfloat16, head_dim=64, hidden_size=128).to("cuda")
    with LLM(of, max_batch=4, num_pages=80, compile=False) as llm:
        replayed, eager = (sorted(llm.time_steps(4, 64, eager=eager))[10] for eager in (False, True))
        assert 0 < replayed < eager
        found = llm.profile()
        assert (
            found.device == torch.cuda.get_device_name()
            and sum(each.backends[0].pool_bytes for each in found.buckets) > 0
        )
