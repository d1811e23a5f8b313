"""Quantised weights pass through untouched: not merged, not folded, and with the logits that transformers has."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from graphattn import LLM, CaptureError, SamplingParams, UnsupportedModelError
from graphattn.engine.fold import fold
from graphattn.hf import attach
from graphattn.ledger import tensor_bytes
from tests.tiny import tiny
from tools.families.measure import DECODED, PROMPTS, logits_of, steps
from tools.families.table import FAMILIES, build

SIZES = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}
ROWS = [[(7 * row + 3 * column) % 128 for column in range(n + DECODED)] for row, n in enumerate(PROMPTS)]


class Int8Weight(Tensor):
    """A weight of int8 with a scale per row, wrapped as torchao wraps its own; multiplies by what it stands for."""

    @staticmethod
    def __new__(cls, values: Tensor, scales: Tensor):
        made = Tensor._make_wrapper_subclass(cls, values.shape, dtype=scales.dtype, device=values.device)
        made.values_int8, made.scales = values, scales
        return made

    @classmethod
    def of(cls, weight: Tensor) -> Int8Weight:
        scales = weight.abs().amax(1, keepdim=True) / 127
        return cls((weight / scales).round().to(torch.int8), scales)

    def __tensor_flatten__(self):
        return ["values_int8", "scales"], None

    @staticmethod
    def __tensor_unflatten__(inner, _, size, stride):
        return Int8Weight(inner["values_int8"], inner["scales"])

    def wide(self) -> Tensor:
        return self.values_int8.to(self.scales.dtype) * self.scales

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.clone.default, torch.ops.aten.alias.default):
            return cls(function(args[0].values_int8), function(args[0].scales))
        args = [each.wide() if isinstance(each, cls) else each for each in args]
        return function(*args, **(kwargs or {}))


class Int8Linear(nn.Linear):
    """A linear with a forward of its own, as bitsandbytes, GPTQ and fp8 have them."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.wide() if isinstance(self.weight, Int8Weight) else self.weight.round(decimals=1))


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear) and name != "lm_head"}


def _wrapped() -> PreTrainedModel:
    model = tiny("llama", dtype=torch.float32, **SIZES)
    for linear in _linears(model).values():
        linear.weight = nn.Parameter(Int8Weight.of(linear.weight.detach()), requires_grad=False)
    return model


def _subclassed() -> PreTrainedModel:
    model = tiny("llama", dtype=torch.float32, **SIZES)
    for linear in _linears(model).values():
        linear.__class__ = Int8Linear
    return model


def _loaded(make_config, folder) -> PreTrainedModel:
    tiny("llama", dtype=torch.bfloat16, **SIZES).save_pretrained(folder)
    options = {"quantization_config": make_config(), "dtype": torch.bfloat16, "device_map": "cpu"}
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def _torchao(name: str):
    def make():
        quantization = pytest.importorskip("torchao.quantization", reason="needs torchao: pip install torchao")
        from transformers import TorchAoConfig

        return TorchAoConfig(getattr(quantization, name)())

    return make


def _bitsandbytes(**options):
    def make():
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install bitsandbytes")
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(**options)

    return make


OWN = {"a wrapped weight": _wrapped, "a linear of its own": _subclassed}
REAL = {
    "torchao int8": _torchao("Int8WeightOnlyConfig"),
    "torchao int8 activations": _torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao fp8": _torchao("Float8WeightOnlyConfig"),
    "bitsandbytes int8": _bitsandbytes(load_in_8bit=True),
    "bitsandbytes int4": _bitsandbytes(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16),
}


@pytest.fixture(params=[*OWN, *REAL])
def model(request: pytest.FixtureRequest, tmp_path) -> PreTrainedModel:
    if request.param in OWN:
        return OWN[request.param]()
    return _loaded(REAL[request.param], tmp_path)


def test_they_pass_through(model: PreTrainedModel) -> None:
    model.set_attn_implementation("eager")
    right = [logits_of(model, row) for row in ROWS]
    seen = {name: (id(each), type(each), id(each.weight), type(each.weight)) for name, each in _linears(model).items()}
    bytes_before = tensor_bytes([*model.parameters(), *model.buffers()])
    with LLM(model, max_batch=len(ROWS), max_seq_len=64, num_pages=40) as llm:
        merged = llm._executor.binding.merged
        assert merged.num_merged == {"qkv": 0, "gate_up": 0}
        reasons = ("Int8Linear", "Linear8bitLt", "Linear4bit", "tied, quantized")
        assert len(merged.kept) == 4 and all(any(r in why for r in reasons) for why in merged.kept.values())
        assert not any("forward" in vars(each) for each in _linears(model).values())
        tolerance = 0.1 if model.dtype is torch.bfloat16 else 1e-4
        for _, row, columns, ours in steps(llm, ROWS):
            expected = right[row][columns].float()
            assert (ours.float() - expected).square().mean().sqrt() < tolerance * expected.square().mean().sqrt()
        assert llm.ledger().size_of("weights") == bytes_before
        llm._executor.check_model()
    found = {name: (id(each), type(each), id(each.weight), type(each.weight)) for name, each in _linears(model).items()}
    assert found == seen
    assert all(map(torch.equal, right, [logits_of(model, row) for row in ROWS]))
    with attach(model):
        ids = torch.tensor([ROWS[0]])
        with torch.no_grad():
            model(ids)


def test_a_wrapped_weight_is_not_folded() -> None:
    """Whatever the kernel would take: it would read the wrapper's address."""
    plain, wrapped = tiny("llama", dtype=torch.float32, **SIZES), _wrapped()
    counts = {}
    for name, each in (("plain", plain), ("wrapped", wrapped)):
        torch._dynamo.reset()

        def backend(graph, _, name=name):
            counts[name] = fold(graph, lambda weight: True)
            return graph.forward

        step = torch.compile(lambda ids, each=each: each(ids, use_cache=False).logits, backend=backend)
        with torch.no_grad():
            ids = torch.tensor([ROWS[0]])
            found, right = step(ids), each(ids, use_cache=False).logits
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
    assert counts == {"plain": 15, "wrapped": 1}  # the head is not quantised


def test_a_weight_that_is_replaced_inside_its_wrapper_is_noticed() -> None:
    model = _wrapped()
    with LLM(model, max_batch=2, num_pages=20) as llm:
        assert llm._executor._placement.is_intact
        weight = model.model.layers[0].self_attn.q_proj.weight
        weight.values_int8 = weight.values_int8.clone()
        assert not llm._executor._placement.is_intact


def _as_by(method: str, *, is_compileable: bool) -> PreTrainedModel:
    model = tiny("llama", dtype=torch.float32)
    config = SimpleNamespace(quant_method=method)
    model.hf_quantizer = SimpleNamespace(is_compileable=is_compileable, quantization_config=config)
    return model


def _one_by_one() -> PreTrainedModel:
    model = build(FAMILIES["qwen3-moe"], dtype=torch.float32)
    model.set_experts_implementation("eager")
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: _as_by("bitsandbytes", is_compileable=False),
            "quantised by bitsandbytes, whose .* compile=False",
        ),
        (_one_by_one, r"experts one after another.* model.set_experts_implementation\('grouped_mm'\)"),
    ],
    ids=["bitsandbytes", "experts"],
)
def test_what_cannot_be_compiled_or_captured_is_refused(make, reason: str) -> None:
    options = {"max_batch": 2, "num_pages": 20}
    with pytest.raises(UnsupportedModelError, match=reason):
        LLM(make(), compile=True, **options)
    params = SamplingParams(temperature=0, max_tokens=2)
    with LLM(make(), compile=False, enforce_eager=True, **options) as llm:
        assert len(llm.generate([[1, 2, 3]], params)[0].token_ids) == 2


@pytest.mark.gpu
def test_what_cannot_be_captured_is_refused_where_graphs_are() -> None:
    for model in (_as_by("bitsandbytes", is_compileable=False), _one_by_one()):
        with pytest.raises(UnsupportedModelError, match="enforce_eager=True and compile=False"):
            LLM(model.to(torch.bfloat16).cuda(), compile=False, max_batch=2, num_pages=20)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in REAL if name.startswith("torchao")])
def test_quantised_weights_in_graphs(name: str, tmp_path) -> None:
    """Captured is eager bit for bit, compiled or not; no linear of ours reads a wrapped weight."""
    model = _loaded(REAL[name], tmp_path).cuda()
    for compile in (False, True):
        torch._dynamo.reset()
        if name == "torchao int8 activations":
            # torchao 0.18 prints a tensor if not traced by Dynamo, and torch's int8 product takes more than 16 rows.
            error, reason = (RuntimeError, "greater than 16") if compile else (CaptureError, "printing a tensor")
            with pytest.raises(error, match=reason):
                LLM(model, max_batch=4, num_pages=40, compile=compile)
            continue
        with LLM(model, max_batch=4, num_pages=40, compile=compile) as llm:
            outputs = llm.generate([row[:9] for row in ROWS], SamplingParams(temperature=0, max_tokens=8))
            assert len(outputs) == len(ROWS) and llm._executor.runner.counts["replay"] > 0
            pages = llm.pool.allocate(1)
            llm._executor.draw_greedily(1)
            llm._executor.runner.verify([5], [1], [[pages]])
            llm.pool.release(pages)
