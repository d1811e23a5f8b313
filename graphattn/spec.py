"""What a layer group computes and where its keys and values lie."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch

from .errors import InvalidArgumentError
from .variants import Variant

LAYOUTS = ("NHD", "HND")
POS_ENCODINGS = ("none", "rope_llama")
FP8 = torch.float8_e4m3fn
QUERY_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
DTYPES = (*QUERY_DTYPES, FP8)


@dataclass(frozen=True, kw_only=True, repr=False)
class AttentionSpec:
    """One layer group: layers whose attention is the same computation and so can share one plan.

    Attributes:
        num_heads: query heads, a multiple of `num_kv_heads`.
        num_kv_heads: key and value heads.
        head_dim: width of a head, the same for queries, keys and values.
        scale: multiplies q.k before the softmax; `1/sqrt(head_dim)` where None is given.
        window: how many of the latest keys a query sees, itself included; None for all of them.
            FlashInfer's `window_left` is `window - 1`.
        softcap: logits become `softcap * tanh(logits / softcap)`; None for none.
        pos_encoding: "none", or "rope_llama": queries and keys turn while they attend, and the cache has keys that were
            not turned, so that pages hold for any place in a row. Pair i of a head is dims i and i + head_dim / 2, and
            turns by position / rope_scale * rope_theta^(-2 i / head_dim).
        rope_theta, rope_scale: of that; frequencies of any other kind are `Rotary`'s.
        variant: what is computed beyond that, after scale and softcap and beside the window; None for nothing.

    Raises:
        InvalidArgumentError: a count is below 1, the query heads are no multiple of the kv heads, there is no such
            pos_encoding, or the variant is for another number of heads.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    pos_encoding: str = "none"
    rope_theta: float = 10000.0
    rope_scale: float = 1.0
    variant: Variant | None = None

    def __post_init__(self) -> None:
        check_counts(num_heads=self.num_heads, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim)
        if self.num_heads % self.num_kv_heads:
            raise InvalidArgumentError(
                f"num_heads={self.num_heads} is no multiple of num_kv_heads={self.num_kv_heads}: "
                "every kv head serves the same number of query heads"
            )
        if self.scale is None:
            object.__setattr__(self, "scale", 1.0 / math.sqrt(self.head_dim))
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise InvalidArgumentError(f"scale={self.scale}: it must be a positive number")
        if self.window is not None and not (isinstance(self.window, int) and self.window >= 1):
            raise InvalidArgumentError(f"window={self.window}: it counts the token itself, so it is an int, at least 1")
        if self.softcap is not None and not self.softcap > 0:
            raise InvalidArgumentError(f"softcap={self.softcap}: it must be positive, or None for no cap")
        if self.pos_encoding not in POS_ENCODINGS:
            raise InvalidArgumentError(f"pos_encoding={self.pos_encoding!r}: choose {' or '.join(POS_ENCODINGS)}")
        for name in ("rope_theta", "rope_scale"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise InvalidArgumentError(f"{name}={getattr(self, name)}: it must be a positive number")
        if self.pos_encoding == "rope_llama" and self.head_dim % 2:
            raise InvalidArgumentError(
                f"pos_encoding='rope_llama' turns pairs, head_dim is {self.head_dim}: make it even"
            )
        if self.variant is not None and not isinstance(self.variant, Variant):
            raise InvalidArgumentError(f"variant={self.variant!r}: give a graphattn.variants.Variant, or None for none")
        if self.variant is not None and self.variant.num_heads not in (None, self.num_heads):
            raise InvalidArgumentError(
                f"variant {self.variant.name} is for {self.variant.num_heads} heads, num_heads is {self.num_heads}: "
                "give its tensors one entry for each query head"
            )

    def __repr__(self) -> str:
        """All but what is as it is by default."""
        told = (field for field in fields(self) if getattr(self, field.name) != field.default)
        return f"AttentionSpec({', '.join(f'{field.name}={getattr(self, field.name)!r}' for field in told)})"

    @cached_property
    def told(self) -> str:
        """What it computes in words, the same for specs that are equal; but for the variant, which its digest tells."""
        numbers = ("scale", "softcap", "rope_theta", "rope_scale")  # 50 and 50.0 are one cap
        floats = {name: float(getattr(self, name)) for name in numbers if getattr(self, name) is not None}
        return repr(replace(self, variant=None, **floats))

    @property
    def group_size(self) -> int:
        """Query heads that share a kv head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """How the paged cache of a layer lies in memory.

    Attributes:
        num_pages: pages of each layer, the null page 0 among them.
        page_size: tokens in a page.
        dtype: that keys and values are kept in; `torch.float8_e4m3fn` keeps them in a byte each, over a scale.
        query_dtype: of queries, keys and values as they come, and of what is attended: `dtype`, or where that is fp8
            bfloat16 if None is given.
        layout: of a page: "NHD" `[page_size, num_kv_heads, head_dim]` or "HND" `[num_kv_heads, page_size, head_dim]`.

    Raises:
        InvalidArgumentError: fewer than 2 pages, an empty page, a dtype that attention has no kernel for, queries of
            another dtype than a cache that is not fp8, or an unknown layout.
    """

    num_pages: int
    page_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    layout: str = "NHD"
    query_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        check_counts(num_pages=self.num_pages, page_size=self.page_size)
        if self.num_pages < 2:
            raise InvalidArgumentError(f"num_pages={self.num_pages}: page 0 is reserved, so at least 2 are needed")
        if self.dtype not in DTYPES:
            raise InvalidArgumentError(f"dtype={self.dtype}: the cache holds one of {', '.join(map(str, DTYPES))}")
        if self.query_dtype is None:
            object.__setattr__(self, "query_dtype", torch.bfloat16 if self.is_fp8 else self.dtype)
        if self.query_dtype not in (QUERY_DTYPES if self.is_fp8 else (self.dtype,)):
            raise InvalidArgumentError(
                f"query_dtype={self.query_dtype} with dtype={self.dtype}: only a cache of {FP8} has queries of another "
                f"dtype, one of {', '.join(map(str, QUERY_DTYPES))}"
            )
        if self.layout not in LAYOUTS:
            raise InvalidArgumentError(f"layout={self.layout!r}: choose {' or '.join(LAYOUTS)}")

    @property
    def is_fp8(self) -> bool:
        """Whether keys and values are kept over scales, which each layer has."""
        return self.dtype == FP8

    def page_shape(self, spec: AttentionSpec) -> tuple[int, int, int]:
        """Shape of one page of a layer's keys, and of its values."""
        page = (self.page_size, spec.num_kv_heads) if self.layout == "NHD" else (spec.num_kv_heads, self.page_size)
        return (*page, spec.head_dim)

    def page_bytes(self, spec: AttentionSpec) -> int:
        """Bytes that one page takes in one layer, keys and values together."""
        return 2 * self.page_size * spec.num_kv_heads * spec.head_dim * self.dtype.itemsize


def check_counts(**counts: int) -> None:
    """Raises InvalidArgumentError for the first that counts nothing, by its name."""
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**63:
            raise InvalidArgumentError(f"{name}={value!r}: it must be an int, at least 1 and below 2**63")
