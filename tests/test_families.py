"""Families of decoders, tiny and random: logits are those of transformers' eager attention, or the reason is said."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from graphattn import LLM, BackendError
from graphattn.hf import binding, oracle, probe, rotary, widths
from tools.families.measure import KINDS, measure, shows
from tools.families.table import FAMILIES, build

pytestmark = pytest.mark.usefixtures("one_thread")

SINKS = ("gpt-oss",)  # which the fused kernel does not serve
# What CI compiles: rotation in the op and outside it, experts, heads of two widths, positions that are learned.
CROSS_SECTION = ("qwen3-moe", "glm4", "gpt2", "deepseek-v3")


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Dynamo traces runs as it is; Inductor takes ten seconds to compile it."""
    import torch._inductor.compile_fx as inductor

    monkeypatch.setattr(inductor, "compile_fx", lambda graph, inputs: graph)
    torch._dynamo.reset()


def check(found: dict) -> None:
    assert found["refused"] is None, found["refused"]
    wrong = {kind: errors for kind, errors in found["errors"].items() if not errors["is_right"]}
    assert not wrong, wrong
    assert tuple(found["errors"]) == KINDS


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_transformers(name: str) -> None:
    check(measure(name, dtype=torch.float32))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_transformers_for_other_weights(name: str, seed: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check(measure(name, dtype=dtype, seed=seed))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in CROSS_SECTION else pytest.mark.slow) for n in FAMILIES]
)
def test_one_graph_serves_every_batch_and_prefill(name: str, traced: None) -> None:
    found = measure(name, dtype=torch.float32, compile=True)
    check(found)
    assert found["compiles"] == 1


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.parametrize("name", FAMILIES)
def test_one_graph_compiled_serves_every_batch_and_prefill(name: str) -> None:
    torch._dynamo.reset()
    found = measure(name, dtype=torch.float32, compile=True)
    check(found)
    assert found["compiles"] == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_matters(name: str) -> None:
    """Errors of a percent in a scale are a thousand times what is allowed; so is a window that is a token short."""

    def other_scale(module, given: dict) -> None:
        given["scaling"] = given["scaling"] * 1.01

    assert shows(name, other_scale) > 1e-4
    windows = []

    def other_window(module, given: dict) -> None:
        if given.get("sliding_window") is None:
            return
        windows.append(given["sliding_window"])
        mask = given["attention_mask"].clone()
        places = torch.arange(mask.shape[-1])
        mask[..., places[:, None] - places == given["sliding_window"] - 1] = torch.finfo(mask.dtype).min
        given["attention_mask"] = mask

    moved = shows(name, other_window)
    assert (moved > 1e-2) == bool(windows), (moved, windows)
    has_window = any("sliding" in key and value for key, value in FAMILIES[name].config.items())
    assert bool(windows) == has_window


def test_soft_caps_and_sinks_matter() -> None:
    def uncapped(module, given: dict) -> None:
        assert given.pop("softcap") == 2.0

    def other_sinks(module, given: dict) -> None:
        assert given["s_aux"] is module.sinks
        module.sinks.data += 1

    assert shows("gemma2", uncapped) > 1e-2
    assert shows("gpt-oss", other_sinks) > 1e-2


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads are as wide as FlashInfer's kernels."""
    on_cuda = SimpleNamespace(type="cuda")
    for module in (probe, rotary):
        monkeypatch.setattr(
            module, "served_width", lambda head_dim, v_dim, _: widths.served_width(head_dim, v_dim, on_cuda)
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_wider_heads_give_the_same(name: str, as_on_cuda: None) -> None:
    found = measure(name, dtype=torch.float32)
    check(found)
    width = {"llama-80": 128, "llama-96": 128}.get(name, 64)
    assert all(f"head_dim={width}" in layer for layer in found["layers"])


def test_explain_says_what_was_widened() -> None:
    with LLM(build(FAMILIES["deepseek-v3"], dtype=torch.float32), max_batch=2, num_pages=20) as llm:
        assert "heads are 24 wide, values 16, the rest are zeros" in llm.explain()
    with LLM(build(FAMILIES["llama"], dtype=torch.float32), max_batch=2, num_pages=20) as llm:
        assert "the rest are zeros" not in llm.explain()


def test_widths() -> None:
    cuda, cpu = SimpleNamespace(type="cuda"), SimpleNamespace(type="cpu")
    asked = [(64, 64), (80, 80), (96, 96), (128, 64), (192, 128), (256, 256), (512, 512)]
    assert [widths.served_width(*each, cuda) for each in asked] == [64, 128, 128, 128, 256, 256, 512]
    assert [widths.served_width(*each, cpu) for each in asked] == [64, 80, 96, 128, 192, 256, 512]


@pytest.mark.parametrize("fault", ["scale", "side"])
def test_a_fault_in_widening_is_seen(fault: str, as_on_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison at attach is out of the way, so that the logits have to tell."""
    monkeypatch.setattr(oracle.Oracle, "compared", lambda *args: torch.no_grad())
    monkeypatch.setattr(oracle.Oracle, "check_logits", lambda *args: None)
    if fault == "scale":
        add = binding.Binding._add_layer

        def of_the_wide_head(self, module, spec, rotary):
            for each in (*self.groups, spec):
                object.__setattr__(each, "scale", 128**-0.5)
            add(self, module, spec, rotary)

        monkeypatch.setattr(binding.Binding, "_add_layer", of_the_wide_head)
    else:
        pad = torch.nn.functional.pad
        monkeypatch.setattr(binding, "widened", lambda x, width: pad(x, (width - x.shape[-1], 0)))
    found = measure("llama-80", dtype=torch.float32)
    assert not any(errors["is_right"] for kind, errors in found["errors"].items() if kind != "batch of 1")


def check_captured(found: dict, backend: str) -> None:
    check(found)
    assert found["backend"] == backend and found["replays"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["fused", "flashinfer"])
@pytest.mark.parametrize("name", FAMILIES)
def test_captured_logits_are_transformers(name: str, backend: str) -> None:
    """Real CUDA graphs in bfloat16; experts run inside them too."""
    if name in SINKS and backend == "fused":
        with pytest.raises(BackendError, match="variant AttentionSinks"):
            measure(name, dtype=torch.bfloat16, device="cuda", backend=backend)
        return
    check_captured(measure(name, dtype=torch.bfloat16, device="cuda", backend=backend), backend)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in CROSS_SECTION else pytest.mark.slow) for n in FAMILIES]
)
def test_one_compiled_graph_serves_every_bucket(name: str) -> None:
    torch._dynamo.reset()
    found = measure(name, dtype=torch.bfloat16, device="cuda", compile=True)
    check_captured(found, "flashinfer" if name in SINKS else "fused")
    assert found["compiles"] == 1
