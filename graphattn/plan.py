"""Which backend serves each layer group, and the plans of a step: one per group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from .backends.base import Backend, Plan
from .backends.cascade import CascadeBackend, CascadePlan
from .backends.flashinfer import FlashInferBackend
from .backends.fused import FusedBackend
from .backends.reference import ReferenceBackend
from .batch import Batch
from .errors import BackendError, InvalidArgumentError
from .padded import PaddedBatch
from .spans import BackendSpan, BackendTable, Spans, backend_at, checked_spans
from .spec import AttentionSpec, CacheSpec
from .state import StepState

BACKENDS: dict[str, type[Backend]] = {
    "fused": FusedBackend,
    "flashinfer": FlashInferBackend,
    "reference": ReferenceBackend,
    "cascade": CascadeBackend,
}
CASCADE_MODES = ("off", "auto")


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
    """The plans of one step shape, one per layer group; what `ops.active_plans` takes.

    Attributes:
        groups: the plans.
        caches: what pages of a ragged batch are checked against; None for a decode step, whose state checks them.
    """

    def __init__(self, groups: Sequence[Plan], caches: Sequence[CacheSpec] | None = None):
        self.groups, self.caches = tuple(groups), caches

    def plan(self, batch: Batch) -> None:
        """Plans every group for these rows, from host numbers only.

        Raises:
            InvalidArgumentError: a ragged batch has another page size, other layer groups, or a page that its cache
                has not.
        """
        if self.caches is not None:
            self._check(batch, self.caches)
        for group in self.groups:
            group.plan(batch)

    def _check(self, batch: Batch, caches: Sequence[CacheSpec]) -> None:
        if len(batch.groups) != len(caches):
            raise InvalidArgumentError(
                f"the batch has tables of {len(batch.groups)} layer groups, the planner has {len(caches)}: give "
                "tables[group][row]"
            )
        for index, (csr, cache) in enumerate(zip(batch.groups_host, caches, strict=True)):
            if batch.page_size != cache.page_size:
                raise InvalidArgumentError(
                    f"the batch has page_size={batch.page_size}, the cache {cache.page_size}: make them equal"
                )
            if (largest := int(csr.indices_P.max())) >= cache.num_pages:
                raise InvalidArgumentError(
                    f"page {largest} of layer group {index}: the cache has pages 0 to {cache.num_pages - 1}"
                )

    def pays(self, batch: Batch) -> bool:
        """Whether these are plans of a cascade that some group is taken to be faster with, for these rows."""
        return any(isinstance(group, CascadePlan) and group.pays(batch) for group in self.groups)

    @property
    def signature(self) -> tuple:
        """What a captured step holds by value, over all groups."""
        return tuple(group.signature for group in self.groups)


class Planner:
    """Makes the plans of a model's layer groups.

    Args:
        groups: the layer groups, in the order that `Attention.group` counts.
        cache: pages, page size and dtype; or one for each group, which differ in the number of pages alone.
        device: where the steps run.
        backend: "auto", "fused", "flashinfer", "reference" or "cascade"; or who serves each bucket at how many
            tokens a row.
        cascade: "auto" plans a cascade for every bucket besides, for steps where `StepPlan.pays` says so; "off" none.

    Attributes:
        caches: one for each layer group.
        backends: one for each layer group; of a table, its first. They prefill.
        table: who serves each bucket; None where one backend serves all.

    Raises:
        BackendError: the backend, one of the table, or the cascade, cannot serve a group.
        InvalidArgumentError: no backend has that name, an unknown cascade mode, a table that does not say who serves a
            context, or caches that are not those of the groups.
    """

    def __init__(
        self,
        groups: Sequence[AttentionSpec],
        cache: CacheSpec | Sequence[CacheSpec],
        device: torch.device | str,
        backend: str | BackendTable = "auto",
        cascade: str = "off",
    ):
        if cascade not in CASCADE_MODES:
            raise InvalidArgumentError(f"cascade={cascade!r}: choose {' or '.join(CASCADE_MODES)}")
        if isinstance(groups, AttentionSpec):
            raise InvalidArgumentError("groups is one AttentionSpec: give a list, with one for each layer group")
        device = torch.device(device)
        self.groups, self.device = tuple(groups), device
        self.caches = (cache,) * len(self.groups) if isinstance(cache, CacheSpec) else tuple(cache)
        if len(self.caches) != len(self.groups) or len({replace(each, num_pages=2) for each in self.caches}) != 1:
            raise InvalidArgumentError(
                f"caches {list(self.caches)} for {len(self.groups)} layer groups: give one for all, or one for each, "
                "all of one page_size, dtype and layout"
            )

        def made(name: str) -> list[Backend]:
            return [
                choose_backend(name, spec, cache, device)(index, spec, cache, device)
                for index, (spec, cache) in enumerate(zip(self.groups, self.caches, strict=True))
            ]

        self.table: dict[int, Spans] | None = None
        if isinstance(backend, str):
            backends = made(backend)
            self._made = {", ".join(dict.fromkeys(each.name for each in backends)): backends}
        else:
            self.table = {bucket: checked_spans(backend[bucket]) for bucket in sorted(backend)}
            names = dict.fromkeys(span.backend for spans in self.table.values() for span in spans)
            if not names or not BACKENDS.keys() >= names.keys():
                raise InvalidArgumentError(f"a table of the backends {[*names]}: choose among {', '.join(BACKENDS)}")
            self._made = {name: made(name) for name in names}
        self._first, self.backends = next(iter(self._made.items()))
        self._cascades, self._without_cascade = cascade == "auto", set[int]()
        if self._cascades and CascadeBackend.name not in self._made:
            self._made[CascadeBackend.name] = made(CascadeBackend.name)

    @property
    def cache(self) -> CacheSpec:
        """That of the first group; the others' have its page size, dtype and layout."""
        return self.caches[0]

    @property
    def all_names(self) -> tuple[str, ...]:
        """Every backend that serves some bucket."""
        return tuple(self._made)

    def spans(self, bucket: int) -> Spans:
        """Who serves a bucket, at how many tokens a row.

        Raises:
            InvalidArgumentError: the table has no such bucket.
        """
        if self.table is None:
            return (BackendSpan(context=1, backend=self._first),)
        if bucket not in self.table:
            raise InvalidArgumentError(f"no backend for bucket {bucket}: the table has {list(self.table)}; add it")
        return self.table[bucket]

    def names(self, bucket: int) -> tuple[str, ...]:
        """The backends that serve a bucket, each once; a cascade besides them comes last."""
        names = dict.fromkeys(span.backend for span in self.spans(bucket))
        return (*names, *(name for name in self.cascade_names(bucket) if name not in names))

    def cascade_names(self, bucket: int) -> tuple[str, ...]:
        """The backend that serves a bucket where rows share enough, if one does."""
        return (CascadeBackend.name,) if self._cascades and bucket not in self._without_cascade else ()

    def has_others(self, bucket: int, backend: str) -> bool:
        """Whether a bucket can do without a backend: then others serve every context that it does."""
        return any(span.backend != backend for span in self.spans(bucket))

    def backend_for(self, bucket: int, seq_lens: Sequence[int]) -> str:
        """The one that serves these rows at a bucket: by their tokens, shared out evenly among its rows."""
        spans = self.spans(bucket)
        return spans[0].backend if len(spans) == 1 else backend_at(spans, max(1, -(-sum(seq_lens) // bucket)))

    def leave_out(self, bucket: int, backend: str) -> None:
        """Has the other backends of a bucket serve what this one did, each what follows where it begins."""
        if backend in self.cascade_names(bucket):
            self._without_cascade.add(bucket)
        if backend not in {span.backend for span in self.spans(bucket)}:
            return
        left: list[BackendSpan] = []
        for span in self.spans(bucket):
            if span.backend != backend and (not left or left[-1].backend != span.backend):
                left.append(span if left else BackendSpan(context=1, backend=span.backend))
        self.table = {**self.table, bucket: checked_spans(left)}

    def restore(self, table: dict[int, Spans] | None) -> None:
        """Has backends serve again as by a table that was in force before any was left out."""
        self.table = table
        self._without_cascade.clear()

    def check_state(self, state: StepState) -> None:
        """Raises InvalidArgumentError if a step's buffers are for other pages, layer groups or another device."""
        for what, theirs, ours in (
            ("page_size", state.page_size, self.cache.page_size),
            ("layer groups", state.groups, self.groups),
            ("device", state.device.type, self.device.type),
        ):
            if ours != theirs:
                raise InvalidArgumentError(f"the state has {what} {theirs}, the planner {ours}: make them equal")

    def decode(self, state: StepState, bucket: int, backend: str | None = None) -> StepPlan:
        """The plans of a bucket, by the backend of that name; None for the first."""
        return StepPlan([each.decode_plan(state, bucket) for each in self._made[backend or self._first]])

    def prefill(self, kernel: str = "auto", max_tokens: int = 0) -> StepPlan:
        """The plans of a ragged step.

        Args:
            kernel: "auto", FlashInfer's "fa2" or "fa3"; "auto" is fa3 for batches that are large enough, if
                `max_tokens` is, on a Hopper GPU, and fa2 for others.
            max_tokens: query tokens of the largest batch.

        Raises:
            BackendError: the backend cannot compute prefill so, here; says why.
        """
        return StepPlan([backend.prefill_plan(kernel, max_tokens) for backend in self.backends], self.caches)

    def padded(self, padded: PaddedBatch, kernel: str = "auto") -> StepPlan:
        """The plans of prefills that are padded to one number of tokens.

        Args:
            padded: their buffers.
            kernel: as for `prefill`; "auto" is one kernel for all of them.

        Raises:
            BackendError: the backend cannot compute prefill so, here; says why.
        """
        return StepPlan([backend.padded_plan(padded, kernel) for backend in self.backends], self.caches)

    def check_capturable(self) -> None:
        """Raises BackendError if plans of some backend may not be captured in a CUDA graph."""
        for name, backends in self._made.items():
            if not all(each.capturable for each in backends):
                raise BackendError(f"backend {name} cannot run inside a CUDA graph: pass enforce_eager=True")

    @property
    def num_shared(self) -> int:
        """Decode steps planned in levels whose rows shared pages, in the layer group where most did."""
        return max((each.counts["shared"] for each in self._made.get(CascadeBackend.name, ())), default=0)

    @property
    def num_bytes(self) -> int:
        """Bytes of the backends' workspaces on the device."""
        return sum(backend.num_bytes for backends in self._made.values() for backend in backends)
