"""The paths that workload `attention` compares: a backend, a layout of the pages, and what the layer does besides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import graphattn as ga
from graphattn.variants import Variant, alibi, attention_sinks

THETA = 10000.0
WINDOW = 4096


@dataclass(frozen=True)
class Path:
    """One way to attend.

    Attributes:
        backend: that plans and computes it; "" for the device's first.
        layout: of the cache's pages.
        options: what `Attention` takes beyond heads and width, made of the query heads, head dim and device.
        turns: whether queries and keys are turned before the layer, as transformers turns them.
        is_fp8: whether the cache holds e4m3, over scales of 1.
    """

    backend: str = ""
    layout: str = "NHD"
    options: Callable[[int, int, str], dict] = lambda heads, head_dim, device: {}
    turns: bool = False
    is_fp8: bool = False


def inverse_frequencies(pairs: int, head_dim: int, device: str) -> Tensor:
    """Of the first `pairs` pairs of a head, as Llama has them."""
    return THETA ** (-2 * torch.arange(pairs, device=device) / head_dim)


def _rotary(heads: int, head_dim: int, device: str) -> dict:
    return {"rotary": ga.Rotary(inverse_frequencies(head_dim // 2, head_dim, device))}


def _partial(heads: int, head_dim: int, device: str) -> dict:
    return {"rotary": ga.Rotary(inverse_frequencies(head_dim // 4, head_dim, device))}


def _by_length(heads: int, head_dim: int, device: str) -> dict:
    short = inverse_frequencies(head_dim // 2, head_dim, device)
    return {"rotary": ga.Rotary(torch.stack((short, short / 4)), threshold=512)}


def _in_attention(heads: int, head_dim: int, device: str) -> dict:
    return {"pos_encoding": "rope_llama", "rope_theta": THETA}


def _softcap(heads: int, head_dim: int, device: str) -> dict:
    return {"softcap": 30.0}


def _window(heads: int, head_dim: int, device: str) -> dict:
    return {"window": WINDOW}


def _sinks(heads: int, head_dim: int, device: str) -> dict:
    return {"variant": attention_sinks(torch.linspace(-1, 1, heads, device=device))}


def _alibi(heads: int, head_dim: int, device: str) -> dict:
    return {"variant": alibi(ga.variants.alibi_slopes(heads).to(device))}


def _temperature(heads: int, head_dim: int, device: str) -> dict:
    variant = Variant(
        "Temperature",
        "__device__ float logits(float logit, uint32_t head, int query, int key) const {\n"
        "  return logit / temperature[head];\n}",
        tensors={"temperature": torch.linspace(0.5, 2, heads, device=device)},
        logits=lambda logits, head, query, key, values: logits / values.temperature[head],
        num_heads=heads,
    )
    return {"variant": variant}


COMPARISONS: dict[str, dict[str, Path]] = {
    "backends": {name: Path(name) for name in ("fused", "flashinfer", "reference", "cascade")},
    "layouts": {
        f"{name} {layout}": Path(name, layout)
        for name in ("fused", "flashinfer", "reference", "cascade")
        for layout in ("NHD", "HND")
    },
    "cache": {
        f"{name} {dtype}": Path(name, is_fp8=dtype == "fp8")
        for name in ("fused", "flashinfer", "reference", "cascade")
        for dtype in ("16 bit", "fp8")
    },
    "rope": {
        "not turned": Path(),
        "turned by torch before": Path(turns=True),
        "rotary": Path(options=_rotary),
        "rotary, half the dims": Path(options=_partial),
        "rotary by length": Path(options=_by_length),
        "flashinfer, rotary": Path("flashinfer", options=_rotary),
        "flashinfer, rope_llama": Path("flashinfer", options=_in_attention),
    },
    "variants": {
        "none": Path(),
        "soft cap": Path(options=_softcap),
        f"window {WINDOW}": Path(options=_window),
        "flashinfer, none": Path("flashinfer"),
        "flashinfer, soft cap": Path("flashinfer", options=_softcap),
        f"flashinfer, window {WINDOW}": Path("flashinfer", options=_window),
        "flashinfer, sinks": Path("flashinfer", options=_sinks),
        "flashinfer, ALiBi": Path("flashinfer", options=_alibi),
        "flashinfer, a temperature per head": Path("flashinfer", options=_temperature),
    },
}
FIRST = {"cuda": "fused", "cpu": "reference"}
SERVED = {"cuda": ("fused", "flashinfer", "cascade"), "cpu": ("reference", "cascade")}


def compared(what: str, device: str) -> dict[str, Path]:
    """The paths of a comparison by name, those of other devices' backends left out; on a CPU the reference stands
    for FlashInfer where what it computes is compared, not who computes it."""
    paths = {}
    for name, path in COMPARISONS[what].items():
        backend = path.backend or FIRST[device]
        if what in ("rope", "variants") and backend not in SERVED[device]:
            backend = FIRST[device]
        if backend in SERVED[device]:
            paths[name] = replace(path, backend=backend)
    return paths


class Turn:
    """Rotates queries and keys where a transformers model does: between projection and layer, compiled on CUDA.

    Args:
        head_dim: width of a head.
        device: where it runs.
    """

    def __init__(self, head_dim: int, device: str):
        self._inv_freq = inverse_frequencies(head_dim // 2, head_dim, device)
        self._apply = torch.compile(apply_rotary_pos_emb) if device == "cuda" else apply_rotary_pos_emb

    def angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines of a step, once for all layers."""
        angles = positions[:, None].float() * self._inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def __call__(self, q: Tensor, k: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self._apply(q, k, *angles)
