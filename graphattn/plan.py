"""Which backend serves each layer group, and the plans of a step: one per group."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .backends.base import Backend, Plan
from .backends.flashinfer import FlashInferBackend
from .backends.fused import FusedBackend
from .backends.reference import ReferenceBackend
from .batch import Batch
from .errors import BackendError, InvalidArgumentError
from .spec import AttentionSpec, CacheSpec
from .state import StepState

BACKENDS: dict[str, type[Backend]] = {
    "fused": FusedBackend,
    "flashinfer": FlashInferBackend,
    "reference": ReferenceBackend,
}


def choose_backend(name: str, spec: AttentionSpec, cache: CacheSpec, device: torch.device) -> type[Backend]:
    """The backend called `name`; "auto" is the fused one or else FlashInfer on CUDA, and the reference elsewhere.

    Raises:
        InvalidArgumentError: no backend has that name.
        BackendError: it cannot serve this layer group; says why, and what each other backend would say.
    """
    if name != "auto" and name not in BACKENDS:
        raise InvalidArgumentError(f"backend={name!r}: choose auto, {', '.join(BACKENDS)}")
    on_cuda = device.type == "cuda"
    candidates = [name] if name != "auto" else ["fused", "flashinfer"] if on_cuda else ["reference"]
    for candidate in candidates:
        if not BACKENDS[candidate].rejections(spec, cache, device):
            return BACKENDS[candidate]
    verdicts = [
        f"  {other}: {'; '.join(backend.rejections(spec, cache, device)) or f'can serve it (backend={other!r})'}"
        for other, backend in BACKENDS.items()
    ]
    raise BackendError(f"backend {name} cannot serve {spec} on {device}:\n" + "\n".join(verdicts))


class StepPlan:
    """The plans of one step shape, one per layer group; what `ops.active_plans` takes."""

    def __init__(self, groups: Sequence[Plan]):
        self.groups = tuple(groups)

    def plan(self, batch: Batch) -> None:
        """Plans every group for these rows, from host numbers only."""
        for group in self.groups:
            group.plan(batch)

    @property
    def signature(self) -> tuple:
        """What a captured step holds by value, over all groups."""
        return tuple(group.signature for group in self.groups)


class Planner:
    """Makes the plans of a model's layer groups.

    Args:
        groups: the layer groups, in the order that `Attention.group` counts.
        cache: pages, page size and dtype.
        device: where the steps run.
        backend: "auto", "fused", "flashinfer" or "reference".

    Raises:
        BackendError: the backend cannot serve a group.
    """

    def __init__(
        self, groups: Sequence[AttentionSpec], cache: CacheSpec, device: torch.device | str, backend: str = "auto"
    ):
        device = torch.device(device)
        self.groups, self.cache, self.device = tuple(groups), cache, device
        self.backends: list[Backend] = [
            choose_backend(backend, spec, cache, device)(index, spec, cache, device)
            for index, spec in enumerate(self.groups)
        ]

    def decode(self, state: StepState, bucket: int) -> StepPlan:
        """The plans of a bucket."""
        return StepPlan([backend.decode_plan(state, bucket) for backend in self.backends])

    def prefill(self) -> StepPlan:
        """The plans of a ragged step."""
        return StepPlan([backend.prefill_plan() for backend in self.backends])

    @property
    def capturable(self) -> bool:
        """Whether decode plans may be captured in a CUDA graph."""
        return all(backend.capturable for backend in self.backends)

    @property
    def num_bytes(self) -> int:
        """Bytes of the backends' workspaces on the device."""
        return sum(backend.num_bytes for backend in self.backends)
