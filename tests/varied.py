"""Variants with a formula by hand for each, and rows whose attention is computed by it, densely."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from dense import DenseRows
from torch import Tensor

from graphattn.spec import AttentionSpec
from graphattn.variants import Variant, alibi, attention_sinks

RAGGED = {
    "prefill": ([0, 0, 0, 0], [1, 16, 33, 7]),
    "chunks over prefixes": ([16, 5, 0, 31], [3, 27, 2, 1]),
    "decode": ([0, 15, 16, 40, 63], [1, 1, 1, 1, 1]),
}
LONG = {"prefill": ([0, 700], [300, 40]), "decode": ([0, 15, 700, 1500, 4000], [1] * 5)}

TEMPERATURE = """
__device__ float logits(float logit, uint32_t head, int query, int key) const {
  return logit / temperature[head];
}
"""
EVERYTHING = """
__device__ float logits(float logit, uint32_t head, int query, int key) const {
  return logit + slope * float(key - query) * float(signs[head]);
}
__device__ bool mask(uint32_t head, int query, int key) const {
  return (query - key) % int(strides[head]) == 0 && key != 5;
}
__device__ float sink(uint32_t head) const { return float(sinks[head]); }
__device__ float output_scale(uint32_t head, int query) const { return float(gates[head]) / float(1 + query % 3); }
"""


def _temperature(logits, head, query, key, values):
    return logits / values.temperature[head]


def _signed_distance(logits, head, query, key, values):
    return logits + values.slope * (key - query) * values.signs[head]


def _strided(head, query, key, values):
    return ((query - key) % values.strides[head] == 0) & (key != 5)


def sink_of_head(head, values):
    return values.sinks[head]


def _gates(head, query, values):
    return values.gates[head] / (1 + query % 3)


def draws(num_heads: int, seed: int = 7) -> Tensor:
    return torch.randn(num_heads, generator=torch.Generator().manual_seed(seed))


def temperature_of_head(num_heads: int) -> Variant:
    values = {"temperature": draws(num_heads).exp()}
    return Variant("Temperature", TEMPERATURE, tensors=values, logits=_temperature, num_heads=num_heads)


def everything(num_heads: int) -> Variant:
    tensors = {
        "signs": draws(num_heads, 1).sign().to(torch.float16),
        "strides": torch.arange(num_heads, dtype=torch.int32) % 3 + 1,
        "sinks": draws(num_heads, 2).bfloat16(),
        "gates": draws(num_heads, 3),
    }
    twins = {"logits": _signed_distance, "mask": _strided, "sink": sink_of_head, "output_scale": _gates}
    return Variant("Everything", EVERYTHING, tensors=tensors, scalars={"slope": 0.125}, num_heads=num_heads, **twins)


@dataclass(frozen=True)
class Case:
    """A variant, and by hand what it does to a row: to logits, to what is visible, to the sum, to the output."""

    make: Callable[[int], Variant]
    logits: Callable = lambda logits_HTL, query_T1, key_L, tensors: logits_HTL
    visible: Callable = lambda query_T1, key_L, tensors: True
    sink: Callable = lambda tensors: None
    gain: Callable = lambda query_T1, tensors: 1.0


CASES = {
    "sinks": Case(lambda heads: attention_sinks(draws(heads) * 2), sink=lambda t: t["sinks"]),
    "sinks in bfloat16": Case(lambda heads: attention_sinks(draws(heads).bfloat16()), sink=lambda t: t["sinks"]),
    "alibi": Case(alibi, lambda x, query, key, t: x - t["slopes"][:, None, None] * (query - key)),
    "temperature": Case(temperature_of_head, lambda x, query, key, t: x / t["temperature"][:, None, None]),
    "everything": Case(
        everything,
        lambda x, query, key, t: x - 0.125 * (query - key) * t["signs"][:, None, None],
        lambda query, key, t: ((query - key) % t["strides"][:, None, None] == 0) & (key != 5),
        lambda t: t["sinks"],
        lambda query, t: t["gates"][:, None, None] / (1 + query % 3),
    ),
}


class VariedRows(DenseRows):
    """Rows whose attention is a case's, with sums of exponentials in the place of softmax."""

    def __init__(self, case: Case, tensors: dict[str, Tensor], spec: AttentionSpec, *args, **options):
        super().__init__(spec, *args, **options)
        self.case, self.tensors = case, tensors

    def _row(self, row: int, dtype) -> Tensor:
        spec, case = self.spec, self.case
        tensors = {name: x.to(dtype) if x.is_floating_point() else x for name, x in self.tensors.items()}
        q_HTD, k_HLD, v_HLD = (x.to(dtype).transpose(0, 1) for x in (self.q[row], self.k[row], self.v[row]))
        k_HLD, v_HLD = (x.repeat_interleave(spec.group_size, 0) for x in (k_HLD, v_HLD))
        query_T1 = (torch.arange(q_HTD.shape[1], device=q_HTD.device) + self.cached[row])[:, None]
        key_L = torch.arange(k_HLD.shape[1], device=q_HTD.device)
        logits_HTL = q_HTD @ k_HLD.mT * spec.scale
        if spec.softcap is not None:
            logits_HTL = torch.tanh(logits_HTL / spec.softcap) * spec.softcap
        logits_HTL = case.logits(logits_HTL, query_T1, key_L, tensors).to(dtype)
        seen = (key_L <= query_T1) & (query_T1 - key_L < (spec.window or k_HLD.shape[1]))
        seen = (seen & case.visible(query_T1, key_L, tensors)).expand_as(logits_HTL)
        sink_H = case.sink(tensors)
        top_HT1 = logits_HTL.masked_fill(~seen, float("-inf")).amax(-1, keepdim=True)
        if sink_H is not None:
            top_HT1 = torch.maximum(top_HT1, sink_H[:, None, None])
        top_HT1 = torch.where(top_HT1.isfinite(), top_HT1, 0)
        weights_HTL = torch.where(seen, (logits_HTL - top_HT1).exp(), 0)
        total_HT1 = weights_HTL.sum(-1, keepdim=True)
        if sink_H is not None:
            total_HT1 = total_HT1 + (sink_H[:, None, None] - top_HT1).exp()
        out_HTD = (weights_HTL / torch.where(total_HT1 == 0, 1, total_HT1)) @ v_HLD
        return (out_HTD * case.gain(query_T1, tensors)).to(dtype).transpose(0, 1)


def rows_of(name: str, ragged, *, heads=(6, 2), head_dim=8, device="cpu", seed=0, page_size=16, dtype, **options):
    layout = options.pop("layout", "NHD")
    case = CASES[name]
    variant = case.make(heads[0])
    spec = AttentionSpec(num_heads=heads[0], num_kv_heads=heads[1], head_dim=head_dim, variant=variant, **options)
    tensors = {each: tensor.to(device) for each, tensor in variant.tensors.items()}
    placed = {"page_size": page_size, "dtype": dtype, "device": device, "seed": seed, "layout": layout}
    return VariedRows(case, tensors, spec, *ragged, **placed)
