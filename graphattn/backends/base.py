"""What a backend is: it says what it cannot serve, and makes plans that append and attend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..batch import Batch
from ..errors import InvalidArgumentError
from ..padded import PaddedBatch
from ..rope import Rotary
from ..spec import FP8, AttentionSpec, CacheSpec
from ..state import StepState

FP8_CAPABILITY = (8, 9)  # from which our kernels convert to fp8
PREFILL_KERNELS = ("auto", "fa2", "fa3")  # "auto" is what suits each batch


class Plan(Protocol):
    """How one layer group of one step shape is computed.

    Shape letters: N tokens, H query heads, K kv heads, D head dim.

    Attributes:
        page_shape: what it takes the pages of a cache to be, `CacheSpec.page_shape`.
        spec: the layer group.
    """

    page_shape: tuple[int, int, int]
    spec: AttentionSpec

    @property
    def signature(self) -> tuple:
        """Everything that a captured launch holds by value; a graph captured under another one must not be replayed."""
        ...

    def plan(self, batch: Batch) -> None:
        """Prepares for these rows, from host numbers only; called before each step."""
        ...

    def attend(
        self,
        q_NHD: Tensor,
        k_NKD: Tensor,
        v_NKD: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        rotary: Rotary | None = None,
        values: Sequence[Tensor] = (),
        scales_2K: Tensor | None = None,
    ) -> Tensor:
        """Norms and rotates queries and keys if asked to, appends keys and values, and attends causally over each row.

        Args:
            values: the layer's tensors of its variant, in the order of `Variant.tensors`.
            scales_2K: float32, of the keys and the values of an fp8 cache; the new token is attended to as it is
                stored there. None for other caches.

        Returns:
            `[N, H, D]`.

        Raises:
            InvalidArgumentError: the cache is fp8 and the plan was made for another, or the reverse.
        """
        ...


class PrefillPlan(Plan, Protocol):
    """A plan for ragged rows of any number of query tokens, or padded to one.

    Attributes:
        about: which kernels compute it; of any number of tokens how often each did too, and why no others do.
    """

    @property
    def about(self) -> str: ...


class Backend(Protocol):
    """Makes plans for one layer group.

    Attributes:
        name: what users ask for it by.
        capturable: whether its decode and padded plans may run inside a CUDA graph.
    """

    name: str
    capturable: bool

    def __init__(self, group: int, spec: AttentionSpec, cache: CacheSpec, device: torch.device): ...

    @staticmethod
    def rejections(spec: AttentionSpec, cache: CacheSpec, device: torch.device) -> list[str]:
        """Why this backend cannot serve the layer group; empty if it can. Imports nothing heavy to say so."""
        ...

    def decode_plan(self, state: StepState, bucket: int) -> Plan:
        """The plan of a bucket: one query token a row, reading the state's fixed-address page tables."""
        ...

    def prefill_plan(self, kernel: str = "auto", max_tokens: int = 0) -> PrefillPlan:
        """A plan for ragged rows.

        Args:
            kernel: one of `PREFILL_KERNELS`.
            max_tokens: query tokens of the largest batch; what only larger ones would use is not made ready.

        Raises:
            BackendError: it cannot compute prefill so, here.
        """
        ...

    def padded_plan(self, padded: PaddedBatch, kernel: str = "auto") -> PrefillPlan:
        """The plan of prefills that are padded to one number of tokens and rows, reading fixed-address buffers.

        Args:
            padded: the buffers.
            kernel: one of `PREFILL_KERNELS`; "auto" is one kernel for all of them.

        Raises:
            BackendError: it cannot compute prefill so, here.
        """
        ...

    @property
    def num_bytes(self) -> int:
        """Bytes of workspace on the device."""
        ...


def check_step(cache: CacheSpec, num_tokens: int, q_NHD: Tensor, k_cache: Tensor, scales_2K: Tensor | None) -> None:
    """Raises InvalidArgumentError for a layer with other tokens or fewer pages than its plan was made for, or with fp8
    pages under a plan of others, and the reverse."""
    if len(q_NHD) != num_tokens:
        raise InvalidArgumentError(
            f"q has {len(q_NHD)} tokens, the step was planned for {num_tokens}: give the layer all tokens of the batch "
            "that was planned last, and no others"
        )
    if len(k_cache) < cache.num_pages:
        raise InvalidArgumentError(
            f"the layer's cache has {len(k_cache)} pages, the plan was made for {cache.num_pages}: bind the cache of "
            "that CacheSpec (a compiler's backend that copies what an op writes, such as aot_eager, copies one page)"
        )
    is_fp8 = scales_2K is not None
    if is_fp8 == (k_cache.dtype == FP8) == cache.is_fp8 and (not is_fp8 or q_NHD.dtype == cache.query_dtype):
        return
    raise InvalidArgumentError(
        f"queries are {q_NHD.dtype}, the cache {k_cache.dtype} with {'' if is_fp8 else 'no '}scales, the plan was made "
        f"for queries of {cache.query_dtype} and a cache of {cache.dtype}: give both the same CacheSpec"
    )


def fp8_rejections(cache: CacheSpec, device: torch.device) -> list[str]:
    """Why a backend whose fp8 kernels are ours cannot serve a cache; empty if it can."""
    if not cache.is_fp8 or device.type != "cuda" or not torch.cuda.is_available():
        return []
    there = torch.cuda.get_device_capability(device)
    if there >= FP8_CAPABILITY:
        return []
    asked, there = (".".join(map(str, each)) for each in (FP8_CAPABILITY, there))
    return [f"dtype {cache.dtype}: its append takes compute capability {asked}, this device has {there}"]
