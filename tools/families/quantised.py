"""Weights as transformers' quantisers load them, run as they are."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from importlib.util import find_spec

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from graphattn import LLM, UnsupportedModelError
from graphattn.shortage import first_line

from .measure import DECODED, PROMPTS, logits_of, steps
from .table import FAMILIES, build

WIDTHS = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}  # blocks of weights are 32 or 128 wide
ROWS = [[(7 * row + 3 * column) % 128 for column in range(n + DECODED)] for row, n in enumerate(PROMPTS)]


def _torchao(name: str, **options) -> Callable:
    def make():
        from torchao import quantization

        return transformers.TorchAoConfig(getattr(quantization, name)(**options))

    return make


def _own(name: str, **options) -> Callable:
    return lambda: getattr(transformers, name)(**options)


BFLOAT16 = {"bnb_4bit_compute_dtype": torch.bfloat16}
# By name: the module it takes, and what makes its config.
QUANTISERS: dict[str, tuple[str, Callable]] = {
    "torchao int8 weights": ("torchao", _torchao("Int8WeightOnlyConfig")),
    "torchao int8 weights and activations": ("torchao", _torchao("Int8DynamicActivationInt8WeightConfig")),
    "torchao fp8 weights": ("torchao", _torchao("Float8WeightOnlyConfig")),
    "torchao fp8 weights and activations": ("torchao", _torchao("Float8DynamicActivationFloat8WeightConfig")),
    "torchao int4 weights": ("mslk", _torchao("Int4WeightOnlyConfig", group_size=32)),
    "bitsandbytes int8": ("bitsandbytes", _own("BitsAndBytesConfig", load_in_8bit=True)),
    "bitsandbytes int4": ("bitsandbytes", _own("BitsAndBytesConfig", load_in_4bit=True, **BFLOAT16)),
    "fp8 in blocks (DeepSeek's)": ("transformers", _own("FineGrainedFP8Config", weight_block_size=(32, 32))),
}


def loaded(name: str, device: str = "cpu") -> PreTrainedModel:
    """A tiny Llama whose weights transformers quantised while it loaded them; the original is in bfloat16."""
    with tempfile.TemporaryDirectory() as folder:
        config = {**FAMILIES["llama"].config, **WIDTHS}
        family = FAMILIES["llama"].__class__(title="", kind="llama", config=config)
        build(family, dtype=torch.bfloat16).save_pretrained(folder)
        options = {"quantization_config": QUANTISERS[name][1](), "dtype": torch.bfloat16, "device_map": device}
        return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def try_quantiser(name: str, device: str = "cpu", *, compile: bool = False) -> dict:
    """What came of one: `reason` where it was not run, or the `error` of its logits as a share of their size."""
    module, _ = QUANTISERS[name]
    if find_spec(module) is None:
        return {"name": name, "reason": f"{module} is not installed"}
    doing = "loaded"
    try:
        model = loaded(name, device)
        model.set_attn_implementation("eager")
        doing = "run by transformers"
        right = [logits_of(model, row).float() for row in ROWS]
        doing = "run by LLM"
        return {"name": name, "reason": None, **_run(model, right, compile)}
    except Exception as error:
        return {"name": name, "reason": f"not {doing}: {first_line(error)}"}


def _run(model: PreTrainedModel, right: list[Tensor], compile: bool) -> dict:
    """In graphs where the device has them, unless `LLM` refuses that."""
    options, uncapturable = {"max_batch": len(ROWS), "max_seq_len": 64, "num_pages": 40}, False
    try:
        llm = LLM(model, compile=compile, **options)
    except UnsupportedModelError:
        llm, uncapturable = LLM(model, compile=False, enforce_eager=True, **options), True
    scale = torch.cat(right).square().mean().sqrt()
    with llm:
        errors = [
            (ours.float() - right[row][columns]).square().mean().sqrt() / scale
            for _, row, columns, ours in steps(llm, ROWS)
        ]
        merged, replays = llm._executor.binding.merged.num_merged, llm._executor.runner.counts["replay"]
    linear = next(each for key, each in model.named_modules() if key.endswith("q_proj"))
    return {
        "linear": f"{type(linear).__name__} over {type(linear.weight).__name__}",
        "merged": sum(merged.values()),
        "uncapturable": uncapturable,
        "replays": replays,
        "error": torch.stack(errors).max().item(),
    }
