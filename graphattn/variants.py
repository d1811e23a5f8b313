"""What a layer computes beyond softmax(q.k) v: changed logits, masks, sinks and factors, in CUDA and in plain torch.

Shape letters: B rows, H query heads, T query tokens of a row, L keys of a row.
"""

from __future__ import annotations

import hashlib
import keyword
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import Tensor

from .errors import InvalidArgumentError

# What a variant may define, and what each returns in CUDA.
HOOKS = {"logits": "float", "mask": "bool", "sink": "float", "output_scale": "float"}
C_TYPES = {
    torch.float64: "double",
    torch.float32: "float",
    torch.float16: "half",
    torch.bfloat16: "nv_bfloat16",
    torch.int64: "int64_t",
    torch.int32: "int32_t",
    torch.uint8: "uint8_t",
    torch.bool: "bool",
}
CPP_KEYWORDS = frozenset(
    "alignas alignof and and_eq asm auto bitand bitor bool break case catch char char8_t char16_t char32_t class compl "
    "concept const const_cast consteval constexpr constinit continue co_await co_return co_yield decltype default "
    "delete do double dynamic_cast else enum explicit export extern false float for friend goto if inline int long "
    "mutable namespace new noexcept not not_eq nullptr operator or or_eq private protected public register "
    "reinterpret_cast requires return short signed sizeof static static_assert static_cast struct switch template this "
    "thread_local throw true try typedef typeid typename union unsigned using virtual void volatile wchar_t while xor "
    "xor_eq".split()
)


@dataclass(frozen=True, eq=False, repr=False)
class Variant:
    """A computation of one's own inside the attention kernels, beside its twin in plain torch.

    The declaration is C++: it defines one or more of four member functions, with these very types and names, and reads
    the tensors (as pointers) and scalars (as floats) by their names:

        __device__ float logits(float logit, uint32_t head, int query, int key) const;  // a logit in another's place
        __device__ bool mask(uint32_t head, int query, int key) const;  // whether the query sees the key
        __device__ float sink(uint32_t head) const;  // exp of it joins the sum of the softmax; -inf for none
        __device__ float output_scale(uint32_t head, int query) const;  // multiplies what was attended

    `head` counts query heads; `query` and `key` are positions in the row, cached tokens included. A logit arrives
    multiplied by the spec's scale, and capped if the spec has a softcap. Causality and the spec's window hold in any
    case. A query that sees no key, and has no sink, gets zeros.

    For each function that is declared its twin is given under the same name. Twins take and return tensors that
    broadcast against the logits `[B, H, T, L]`: `logits(logits, head, query, key, values)`,
    `mask(head, query, key, values)`, `sink(head, values)` and `output_scale(head, query, values)`, with head
    `[H, 1, 1]`, query `[B, 1, T, 1]` and key `[L]` int64, and `values.NAME` each tensor (floats in the dtype that is
    computed in) and scalar. The CPU's backend computes them, and tests hold the kernels against them.

    `Attention(variant=...)` keeps the tensors, each as `layer.variant_NAME`: they move with the layer, and what is
    written into them in place is read by every later step, captured ones included. Variants are equal if all but the
    contents of their tensors is, so layers with sinks of their own share a group and its plan. Scalars are constants.

    Args:
        name: of the variant, a C++ identifier; compiler errors are reported under it.
        declaration: C++ text of the functions.
        tensors: contiguous, float64, float32, float16, bfloat16, int64, int32, uint8 or bool, of any shape.
        scalars: finite numbers.
        logits, mask, sink, output_scale: the twins.
        num_heads: query heads that the tensors are for; None for any number.

    Attributes:
        kinds: dtype and shape of each tensor, as declared.
        digest: the name, and a hash of all that is compiled or constant.

    Raises:
        InvalidArgumentError: a name that C++ or Python cannot have or that is taken, a tensor of another dtype or not
            contiguous, a scalar that is no finite number, a function without its twin or a twin without its function.

    Example:
        >>> Variant(
        ...     "Temperature",
        ...     '''__device__ float logits(float logit, uint32_t head, int query, int key) const {
        ...       return logit / temperature[head];
        ...     }''',
        ...     tensors={"temperature": torch.tensor([0.5, 2.0])},
        ...     logits=lambda logits, head, query, key, values: logits / values.temperature[head],
        ...     num_heads=2,
        ... )
        Variant('Temperature', logits, tensors=['temperature'])
    """

    name: str
    declaration: str
    tensors: Mapping[str, Tensor] = field(default_factory=dict, kw_only=True)
    scalars: Mapping[str, float] = field(default_factory=dict, kw_only=True)
    logits: Callable[..., Tensor] | None = field(default=None, kw_only=True)
    mask: Callable[..., Tensor] | None = field(default=None, kw_only=True)
    sink: Callable[..., Tensor] | None = field(default=None, kw_only=True)
    output_scale: Callable[..., Tensor] | None = field(default=None, kw_only=True)
    num_heads: int | None = field(default=None, kw_only=True)
    kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]] = field(init=False)
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        _check_name("the variant", self.name, ())
        for kind, values in (("tensor", self.tensors), ("scalar", self.scalars)):
            others = {*HOOKS, *(self.scalars if kind == "tensor" else self.tensors)}
            for name in values:
                _check_name(f"{kind} of variant {self.name}", name, others)
        for name, tensor in self.tensors.items():
            _check_tensor(f"tensor {name} of variant {self.name}", tensor)
        for name, number in self.scalars.items():
            if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
                raise InvalidArgumentError(
                    f"scalar {name} of variant {self.name} is {number!r}: it must be a finite number; "
                    "what changes belongs in tensors"
                )
        self._check_hooks()
        # Copies: what a spec is compared and hashed by must not change.
        object.__setattr__(self, "tensors", dict(self.tensors))
        object.__setattr__(self, "scalars", {name: float(number) for name, number in self.scalars.items()})
        # A parameter that is cast is the same tensor with another dtype; what the kernels read is the declared one.
        kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors.items()}
        object.__setattr__(self, "kinds", kinds)
        content = repr((self.declaration, kinds, self.scalars, self.hooks, self.num_heads))
        object.__setattr__(self, "digest", f"{self.name}-{hashlib.sha256(content.encode()).hexdigest()[:16]}")

    def _check_hooks(self) -> None:
        if not isinstance(self.declaration, str):
            raise InvalidArgumentError(
                f"the declaration of variant {self.name} is a {type(self.declaration).__name__}: give C++ text"
            )
        for hook, c_type in HOOKS.items():
            signature, twin = f"{c_type} {hook}(...)", getattr(self, hook)
            is_declared = re.search(rf"\b{c_type}\s+{hook}\s*\(", self.declaration) is not None
            if is_declared and twin is None:
                raise InvalidArgumentError(
                    f"variant {self.name} declares {signature} and has no twin for it: pass {hook}=, the same in torch"
                )
            if twin is not None and not callable(twin):
                raise InvalidArgumentError(f"{hook} of variant {self.name} is {twin!r}: give a function of tensors")
            if twin is not None and not is_declared:
                raise InvalidArgumentError(
                    f"variant {self.name} has a twin {hook}= and its declaration no {signature}: declare it"
                )
        if not self.hooks:
            signatures = ", ".join(f"{c_type} {hook}(...)" for hook, c_type in HOOKS.items())
            raise InvalidArgumentError(f"variant {self.name} declares nothing: declare one of {signatures}")

    @property
    def hooks(self) -> tuple[str, ...]:
        """The functions that it defines."""
        return tuple(hook for hook in HOOKS if getattr(self, hook) is not None)

    def _identity(self) -> tuple:
        return (self.digest, *(getattr(self, hook) for hook in HOOKS))

    def __eq__(self, other: object) -> bool:
        return self._identity() == other._identity() if isinstance(other, Variant) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._identity())

    def __repr__(self) -> str:
        return f"Variant({self.name!r}, {', '.join(self.hooks)}, tensors={[*self.tensors]})"

    def check(self, values: Sequence[Tensor], device: torch.device) -> None:
        """Whether `values` can stand for the tensors, in their order, on `device`.

        Raises:
            InvalidArgumentError: one of them has another dtype, shape or device, is not contiguous, or they are more
                or fewer.
        """
        if len(values) != len(self.tensors):
            raise InvalidArgumentError(f"variant {self.name} takes {[*self.tensors]}, given are {len(values)} tensors")
        for (name, (dtype, shape)), given in zip(self.kinds.items(), values, strict=True):
            what = f"tensor {name} of variant {self.name}"
            if given.dtype != dtype or given.shape != shape:
                raise InvalidArgumentError(
                    f"{what} is {list(given.shape)} {given.dtype}, declared is {list(shape)} {dtype}: keep it so, or "
                    "make the variant of tensors that are cast already"
                )
            if given.device != device:
                raise InvalidArgumentError(f"{what} is on {given.device}, the step on {device}: move the layer there")
            _check_tensor(what, given)

    def namespace(self, values: Sequence[Tensor], dtype: torch.dtype) -> SimpleNamespace:
        """What twins read: the tensors, floats as `dtype`, and the scalars."""
        named = zip(self.tensors, values, strict=True)
        tensors = {name: value.to(dtype) if value.is_floating_point() else value for name, value in named}
        return SimpleNamespace(**tensors, **self.scalars)

    def weights(
        self, logits_BHTL: Tensor, hidden_BTL: Tensor, query_BT: Tensor, values: SimpleNamespace
    ) -> tuple[Tensor, Tensor | float]:
        """What each key's value weighs, `[B, H, T, L]`, and the factor of what was attended; all by the twins."""
        head_H11 = torch.arange(logits_BHTL.shape[1], device=logits_BHTL.device)[:, None, None]
        query_B1T1, key_L = query_BT[:, None, :, None], torch.arange(logits_BHTL.shape[-1], device=logits_BHTL.device)
        hidden = hidden_BTL[:, None]
        if self.logits is not None:
            logits_BHTL = self.logits(logits_BHTL, head_H11, query_B1T1, key_L, values)
        if self.mask is not None:
            hidden = hidden | ~self.mask(head_H11, query_B1T1, key_L, values)
        logits_BHTL = logits_BHTL.masked_fill(hidden, -math.inf)
        num_keys = logits_BHTL.shape[-1]
        if self.sink is not None:
            sink = self.sink(head_H11, values).expand_as(logits_BHTL[..., :1])
            logits_BHTL = torch.cat((logits_BHTL, sink), dim=-1)
        weights_BHTL = logits_BHTL.softmax(-1)[..., :num_keys].masked_fill(hidden, 0)
        scale = 1.0 if self.output_scale is None else self.output_scale(head_H11, query_B1T1, values)
        return weights_BHTL, scale


def attention_sinks(sinks_H: Tensor) -> Variant:
    """Attention sinks: `exp(sinks[head])` joins the sum of each softmax, so heads may attend to less than one whole.

    Args:
        sinks_H: `[num_heads]`, of a float dtype; the logits as they stand in gpt-oss checkpoints.

    Raises:
        InvalidArgumentError: they are no vector of floats.

    Source: OpenAI, "gpt-oss-120b & gpt-oss-20b Model Card", 2025; Miller, "Attention Is Off By One", 2023.
    """
    _check_vector("sinks_H", sinks_H)
    declaration = "__device__ float sink(uint32_t head) const { return float(sinks[head]); }\n"
    tensors = {"sinks": sinks_H}
    return Variant("AttentionSinks", declaration, tensors=tensors, sink=_sink_of_head, num_heads=len(sinks_H))


def alibi(slopes_H: Tensor | int) -> Variant:
    """ALiBi: `slopes[head] * (key - query)` is added to each logit, after the spec's scale and softcap.

    Args:
        slopes_H: `[num_heads]`, of a float dtype; or the number of heads, for the slopes of the paper.

    Raises:
        InvalidArgumentError: they are no vector of floats, or the number is below 1.

    Source: Press, Smith, Lewis, "Train Short, Test Long", ICLR 2022.
    """
    if isinstance(slopes_H, int):
        slopes_H = alibi_slopes(slopes_H)
    _check_vector("slopes_H", slopes_H)
    declaration = (
        "__device__ float logits(float logit, uint32_t head, int query, int key) const {\n"
        "  return logit + float(slopes[head]) * float(key - query);\n"
        "}\n"
    )
    tensors = {"slopes": slopes_H}
    return Variant("Alibi", declaration, tensors=tensors, logits=_biased_by_distance, num_heads=len(slopes_H))


def alibi_slopes(num_heads: int) -> Tensor:
    """The slopes of the ALiBi paper, `[num_heads]` float32: 2^(-8 i / n) for i = 1..n where n is a power of two.

    For other counts: those of the power of two below, then every other one of the power above.

    Raises:
        InvalidArgumentError: fewer than 1.
    """
    if num_heads < 1:
        raise InvalidArgumentError(f"num_heads={num_heads}: it must be at least 1")
    below = 1 << (num_heads.bit_length() - 1)
    exponents = [8 * i / below for i in range(1, below + 1)]
    exponents += [4 * i / below for i in range(1, 2 * below + 1, 2)][: num_heads - below]
    return torch.tensor([2.0**-exponent for exponent in exponents], dtype=torch.float32, device="cpu")


# Functions of the module, so that variants made by two calls are equal.
def _sink_of_head(head, values):
    return values.sinks[head]


def _biased_by_distance(logits, head, query, key, values):
    return logits + values.slopes[head] * (key - query)


def _check_name(what: str, name: str, taken) -> None:
    if not isinstance(name, str) or not (name.isascii() and name.isidentifier()) or name in CPP_KEYWORDS:
        raise InvalidArgumentError(f"{what} is called {name!r}: that is no C++ identifier")
    if keyword.iskeyword(name) or name.startswith("_") or "__" in name:
        raise InvalidArgumentError(f"{what} is called {name!r}: Python or C++ keeps such names; take another")
    if name in taken:
        raise InvalidArgumentError(f"{what} is called {name!r}, and so is another part of it; take another name")


def _check_tensor(what: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise InvalidArgumentError(f"{what} is a {type(tensor).__name__}: give a torch.Tensor, or make it a scalar")
    if tensor.dtype not in C_TYPES:
        raise InvalidArgumentError(f"{what} is {tensor.dtype}: kernels read {', '.join(map(str, C_TYPES))}")
    if not tensor.is_contiguous():
        raise InvalidArgumentError(f"{what} has strides {tensor.stride()}: kernels read one block; make it contiguous")


def _check_vector(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor) or tensor.dim() != 1 or not tensor.is_floating_point():
        got = f"{list(tensor.shape)} {tensor.dtype}" if isinstance(tensor, Tensor) else repr(tensor)
        raise InvalidArgumentError(f"{name} is {got}: give a vector of floats, one for each query head")
