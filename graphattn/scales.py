"""Scales of an fp8 cache: how values become e4m3 and what they stand for, and the scales of a model's layers.

Shape letters: L layers, K kv heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from .document import read_document, write_document
from .errors import InvalidArgumentError
from .spec import FP8

FP8_MAX = 448.0  # the largest e4m3 number; there is no infinity
SCHEMA_VERSION = 1


def pair(scales_2K: Tensor | None) -> Sequence[Tensor | None]:
    """The scales of keys and of values; two times None for none."""
    return (None, None) if scales_2K is None else scales_2K.unbind()


def quantised(x_NKD: Tensor, scale_K: Tensor | None) -> Tensor:
    """`x * (1 / scale)` in e4m3, to the nearest and ties to even; what is beyond 448 becomes 448, NaN stays NaN.

    Args:
        x_NKD: `[..., K, D]`.
        scale_K: float32; None for `x` as it is.
    """
    if scale_K is None:
        return x_NKD
    wide_NKD = x_NKD.to(torch.promote_types(x_NKD.dtype, torch.float32)) * (1 / scale_K)[:, None]
    return wide_NKD.clamp(-FP8_MAX, FP8_MAX).to(FP8)


def dequantised(x_NKD: Tensor, scale_K: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What e4m3 numbers `[..., K, D]` stand for, `x * scale` in `dtype`; without scales `x` as it is."""
    if scale_K is None:
        return x_NKD
    return x_NKD.to(dtype) * scale_K[:, None].to(dtype)


def checked_scale(name: str, scale: float | Tensor, num_kv_heads: int) -> Tensor:
    """A scale of every kv head, `[K]` float32.

    Args:
        name: what errors call it.
        scale: one for all heads, or one for each.
        num_kv_heads: K.

    Raises:
        InvalidArgumentError: neither, or one of them is not positive and finite in float32.
    """
    try:
        scale_K = torch.as_tensor(scale).detach().float()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidArgumentError(f"{name}={scale!r}: give a float, or a tensor with one for each kv head") from error
    if scale_K.shape not in ((), (num_kv_heads,)):
        raise InvalidArgumentError(
            f"{name} is {tuple(scale_K.shape)}: give one number, or one for each of {num_kv_heads} kv heads"
        )
    if not (scale_K.isfinite() & (scale_K > 0)).all():
        raise InvalidArgumentError(f"{name}={scale_K.tolist()}: scales must be positive and finite")
    return scale_K.expand(num_kv_heads)


@dataclass(frozen=True, eq=False)
class KVScales:
    """What a stored key or value of 1.0 stands for, in each layer and kv head of a model.

    Attributes:
        k, v: `[L, K]` float32 on the CPU.

    Raises:
        InvalidArgumentError: they are not two such tensors of one shape, positive and finite.

    Example:
        >>> KVScales(torch.ones(2, 4), torch.ones(2, 4)).num_layers
        2
    """

    k: Tensor
    v: Tensor

    def __post_init__(self) -> None:
        for field in fields(self):
            given = getattr(self, field.name)
            if not isinstance(given, Tensor) or given.dim() != 2:
                found = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
                raise InvalidArgumentError(f"KVScales.{field.name} is {found}: give a tensor [layers, kv heads]")
            rows = [checked_scale(f"KVScales.{field.name}[{at}]", row, len(row)) for at, row in enumerate(given)]
            object.__setattr__(self, field.name, torch.stack(rows).cpu())
        if self.k.shape != self.v.shape:
            raise InvalidArgumentError(f"KVScales.k is {tuple(self.k.shape)}, v {tuple(self.v.shape)}: make them equal")

    @property
    def num_layers(self) -> int:
        return len(self.k)

    @classmethod
    def of_largest(cls, k: Tensor, v: Tensor) -> KVScales:
        """Scales under which values of these magnitudes fit: the power of two from `largest / 448` on, 1 where it is 0.

        A power of two costs nothing, since e4m3 has its precision at any magnitude, and makes multiplying bfloat16
        queries or outputs by it exact.

        Args:
            k, v: the largest magnitudes `[L, K]`.

        Raises:
            InvalidArgumentError: one is not finite.
        """
        scales = []
        for name, largest_LK in (("keys", k), ("values", v)):
            if not largest_LK.isfinite().all():
                raise InvalidArgumentError(f"the largest {name} are {largest_LK.tolist()}: they must be finite")
            scale_LK = torch.exp2(torch.log2(largest_LK.double() / FP8_MAX).ceil()).float()
            scales.append(torch.where(scale_LK > 0, scale_LK, 1.0))
        return cls(*scales)

    def save(self, path: str | Path) -> None:
        """Writes them as JSON."""
        write_document(path, SCHEMA_VERSION, {"k": self.k.tolist(), "v": self.v.tolist()})

    @classmethod
    def load(cls, path: str | Path) -> KVScales:
        """What `save` wrote.

        Raises:
            InvalidArgumentError: no such file, not JSON, another schema version, or no such scales.
        """
        found = read_document(path, "a file of KV scales", SCHEMA_VERSION, ["k", "v"])
        try:
            return cls(*(torch.tensor(found[name], dtype=torch.float32) for name in ("k", "v")))
        except (TypeError, ValueError, InvalidArgumentError) as error:
            raise InvalidArgumentError(f"{path} has no KV scales ({type(error).__name__}: {error})") from error
