"""What capture measured, to start the next engine from."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import __version__
from .buckets import BucketLadder
from .document import read_document, write_document
from .errors import InvalidArgumentError
from .spans import BackendSpan, BackendTable, StepTime, backend_at, best_spans, checked_spans
from .spec import CacheSpec

SCHEMA_VERSION = 4
ORIGIN = ("device", "versions", "model", "page_size", "layout")  # what a profile holds for
PACKAGES = {"triton": "triton", "flashinfer": "flashinfer-python"}  # beside graphattn and torch


@dataclass(frozen=True, kw_only=True)
class BackendProfile:
    """What one bucket takes with one backend.

    Attributes:
        backend: who attends.
        capture_seconds: planning, warm-up (with compilation, if the step compiles) and capture.
        workspace_bytes: by how much its backend's workspaces grew.
        pool_bytes: what its graph added to torch's private pool; 0 without CUDA graphs.
        driver_bytes: by how much the driver's free memory shrank beyond that.
        nvml_bytes: by how much the process grew by NVML, the pool's growth included; None where NVML hides it.
        steps: its step at each context that was measured; may be empty.
    """

    backend: str
    capture_seconds: float
    workspace_bytes: int = 0
    pool_bytes: int = 0
    driver_bytes: int = 0
    nvml_bytes: int | None = None
    steps: tuple[StepTime, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BucketProfile:
    """What one bucket takes, and who serves it.

    Attributes:
        bucket: rows.
        backends: what was measured, by backend.
        spans: who serves it, at how many tokens a row; a backend that is not among them is not captured.

    Raises:
        InvalidArgumentError: a backend that was not measured serves it, or nobody serves some context.
    """

    bucket: int
    backends: tuple[BackendProfile, ...]
    spans: tuple[BackendSpan, ...]

    def __post_init__(self):
        measured = [each.backend for each in self.backends]
        for span in checked_spans(self.spans):
            if span.backend not in measured:
                raise InvalidArgumentError(
                    f"bucket {self.bucket} is served by {span.backend!r}, measured were {measured}: choose among those"
                )

    @property
    def captured(self) -> tuple[BackendProfile, ...]:
        """What each backend that serves it takes: a start captures it with all of these."""
        return tuple(each for each in self.backends if each.backend in {span.backend for span in self.spans})

    def backend_at(self, context: int) -> str:
        """Who serves it at that many tokens a row."""
        return backend_at(self.spans, context)


@dataclass(frozen=True, kw_only=True)
class StartCosts:
    """What a start took beside weights and cache.

    Attributes:
        backends: who attended at some bucket.
        settings: what that depends on beside the model, the device and the ladder; a start with others measures anew.
        max_seq_len: tokens that requests could reach; a start for fewer takes no more.
        growth: bytes by line of the ledger; of "activations and cache" those there were in the end.
    """

    backends: tuple[str, ...]
    settings: dict[str, Any]
    max_seq_len: int
    growth: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class CaptureProfile:
    """A ladder, who serves its buckets, what they took and on what. `LLM(capture_profile=PATH)` starts from it.

    Attributes:
        device: name of the device.
        versions: of graphattn, torch, triton and flashinfer; None for one that is not installed.
        model: what the step depends on: model type, layers, sizes, dtype and that of the cache.
        page_size: tokens in a page.
        layout: of a page.
        ladder: the buckets to capture; all of them were measured.
        buckets: what was measured, which may be more than the ladder.
        costs: what each start took besides that was measured.

    Raises:
        InvalidArgumentError: no ladder, or one with a bucket that was not measured.

    Example:
        >>> CaptureProfile.load("qwen3.json").ladder  # doctest: +SKIP
        (1, 2, 4, 8, 16)
    """

    device: str
    versions: dict[str, str | None]
    model: dict[str, Any]
    page_size: int
    layout: str
    ladder: tuple[int, ...]
    buckets: tuple[BucketProfile, ...]
    costs: tuple[StartCosts, ...]

    def __post_init__(self):
        object.__setattr__(self, "ladder", BucketLadder(self.ladder).sizes)
        measured = {each.bucket for each in self.buckets}
        missing = [bucket for bucket in self.ladder if bucket not in measured]
        if missing:
            raise InvalidArgumentError(
                f"the ladder {list(self.ladder)} has {missing}, measured were {sorted(measured)}: choose among those"
            )

    @property
    def max_batch(self) -> int:
        return self.ladder[-1]

    @property
    def backends(self) -> BackendTable:
        """Who serves each bucket of the ladder, at how many tokens a row."""
        return {each.bucket: each.spans for each in self.buckets if each.bucket in self.ladder}

    @classmethod
    def merge(cls, profiles: Sequence[CaptureProfile]) -> CaptureProfile:
        """One profile of engines that were measured with a backend each, every bucket served by the best of them.

        Args:
            profiles: of one model on one device, with the same buckets and every backend's steps at the same contexts;
                where two are alike, the earlier one's backend serves.

        Raises:
            InvalidArgumentError: no profiles, profiles of different things or buckets, or a bucket without steps.
        """
        if not profiles:
            raise InvalidArgumentError("no profiles to merge: measure at least one")
        first, measured = profiles[0], [{each.bucket: each for each in profile.buckets} for profile in profiles]
        for profile, buckets in zip(profiles, measured, strict=True):
            profile.check(**{name: getattr(first, name) for name in ORIGIN})
            if buckets.keys() != measured[0].keys():
                raise InvalidArgumentError(
                    f"profiles of the buckets {[*measured[0]]} and {[*buckets]}: measure the same with every backend"
                )
        merged = []
        for bucket in measured[0]:
            backends = tuple(each for buckets in measured for each in buckets[bucket].backends)
            spans = best_spans({each.backend: each.steps for each in backends})
            merged.append(BucketProfile(bucket=bucket, backends=backends, spans=spans))
        costs = tuple(each for profile in profiles for each in profile.costs)
        return replace(first, buckets=tuple(merged), costs=costs)

    def save(self, path: str | Path) -> None:
        """Writes it as JSON."""
        write_document(path, SCHEMA_VERSION, asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> CaptureProfile:
        """What `save` wrote.

        Raises:
            InvalidArgumentError: no such file, not JSON, another schema version, a field missing or of another kind.
        """
        found = read_document(path, "a capture profile", SCHEMA_VERSION, [field.name for field in fields(cls)])
        try:
            for name in ("versions", "model"):
                if not isinstance(found[name], dict):
                    raise TypeError(f"{name} is {found[name]!r}")
            found["buckets"] = tuple(_bucket(each) for each in found["buckets"])
            found["costs"] = tuple(
                StartCosts(**(each | {"backends": tuple(each["backends"])})) for each in found["costs"]
            )
            return cls(**found)
        except (TypeError, KeyError, InvalidArgumentError) as error:
            raise InvalidArgumentError(
                f"{path} is no capture profile ({type(error).__name__}: {error}): write it anew"
            ) from error

    def check(
        self, *, device: str, versions: dict[str, str | None], model: dict[str, Any], page_size: int, layout: str
    ) -> None:
        """Whether it was measured on just this, which `origin` tells of a model.

        Raises:
            InvalidArgumentError: it was not; names everything that differs, with both values.
        """
        differs = []
        for name, ours, theirs in (
            ("device", {"device": self.device}, {"device": device}),
            ("version of", self.versions, versions),
            ("model", self.model, model),
            ("cache", {"page_size": self.page_size, "layout": self.layout}, {"page_size": page_size, "layout": layout}),
        ):
            for key in {**ours, **theirs}:
                was, now = ours.get(key), theirs.get(key)
                if was != now:
                    what = name if name == key else f"{name} {key}"
                    differs.append(f"{what}: {was!r} in the profile, {now!r} here")
        if differs:
            raise InvalidArgumentError(
                f"the capture profile was made for something else ({'; '.join(differs)}): measure anew with "
                "tools/capture.py, or pass buckets= instead"
            )


def _bucket(found: dict[str, Any]) -> BucketProfile:
    """A bucket as `save` wrote it."""
    backends = [
        BackendProfile(**(each | {"steps": tuple(StepTime(**step) for step in each["steps"])}))
        for each in found["backends"]
    ]
    spans = [BackendSpan(**span) for span in found["spans"]]
    return BucketProfile(**(found | {"backends": tuple(backends), "spans": tuple(spans)}))


def origin(model: nn.Module, cache: CacheSpec) -> dict[str, Any]:
    """What a profile of this transformers model and cache depends on, as `CaptureProfile` and its `check` take it."""
    config, device = model.config.get_text_config(), model.device
    heads = config.num_attention_heads
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {_processor()}",
        "versions": {
            "graphattn": __version__,
            "torch": torch.__version__,
            **{name: _version(package) for name, package in PACKAGES.items()},
        },
        "model": {
            "type": config.model_type,
            "layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "heads": heads,
            "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
            "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
            "vocab_size": config.vocab_size,
            "dtype": str(model.dtype).removeprefix("torch."),
            "kv_cache_dtype": str(cache.dtype).removeprefix("torch."),
            **_layer_types(config),
        },
        "page_size": cache.page_size,
        "layout": cache.layout,
    }


def _layer_types(config: Any) -> dict[str, Any]:
    """How many layers are of each type and what those with windows see, of a model that mixes them."""
    types = Counter(getattr(config, "layer_types", None) or ())
    return {"layer_types": dict(types), "window": getattr(config, "sliding_window", None)} if len(types) > 1 else {}


def _processor() -> str:
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
