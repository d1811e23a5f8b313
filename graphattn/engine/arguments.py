"""What `LLM` can be asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from ..backends.base import PREFILL_KERNELS
from ..buckets import BucketLadder
from ..document import may_be_written
from ..errors import InvalidArgumentError, UnsupportedModelError
from ..hf.load import end_token_ids, load_model
from ..plan import BACKENDS, CASCADE_MODES
from ..profile import CaptureProfile
from ..runner import CAPTURE_MODES, CAPTURE_OOM_MODES
from ..scales import KVScales
from ..spans import BackendTable
from ..spec import LAYOUTS, CacheSpec, check_counts
from .sizing import KV_OOM_MODES


def check_arguments(
    *,
    model,
    tokenizer,
    memory_fraction,
    backend,
    compile,
    capture,
    layout,
    prefill,
    cascade,
    on_capture_oom,
    on_kv_oom,
    record_batches,
    progress,
    prefill_buckets,
    switches,
    counts,
) -> None:
    """Raises InvalidArgumentError for the first argument of `LLM` that is outside what it can be; loads nothing."""
    if not isinstance(model, (str, Path, nn.Module)):
        raise InvalidArgumentError(f"model is a {type(model).__name__}: give a path, a name or a loaded model")
    if tokenizer is not None and not callable(getattr(tokenizer, "decode", None)):
        raise InvalidArgumentError(f"tokenizer is a {type(tokenizer).__name__}: give a transformers tokenizer")
    for name, value, allowed in (
        ("backend", backend, ("auto", *BACKENDS)),
        ("compile", compile, ("auto", True, False)),
        ("capture", capture, CAPTURE_MODES),
        ("layout", layout, ("auto", *LAYOUTS)),
        ("on_capture_oom", on_capture_oom, CAPTURE_OOM_MODES),
        ("on_kv_oom", on_kv_oom, KV_OOM_MODES),
        ("prefill", prefill, PREFILL_KERNELS),
        ("cascade", cascade, CASCADE_MODES),
    ):
        if not any(type(value) is type(each) and value == each for each in allowed):  # 1 is no True
            raise InvalidArgumentError(f"{name}={value!r}: choose {', '.join(map(str, allowed[:-1]))} or {allowed[-1]}")
    check_counts(**{name: value for name, value in counts.items() if value is not None})
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise InvalidArgumentError(f"{name}={value!r}: it must be True or False")
    if progress is not None and not callable(progress):
        raise InvalidArgumentError(f"progress is a {type(progress).__name__}: give a function, or None")
    if record_batches is not None:
        if not isinstance(record_batches, (str, Path)):
            raise InvalidArgumentError(f"record_batches is a {type(record_batches).__name__}: give the path of a file")
        if not may_be_written(record_batches):
            raise InvalidArgumentError(
                f"record_batches={str(record_batches)!r}: no file can be written there, make its folder first"
            )
    if (
        isinstance(memory_fraction, bool)
        or not isinstance(memory_fraction, (int, float))
        or not 0 < memory_fraction <= 1
    ):
        raise InvalidArgumentError(f"memory_fraction={memory_fraction!r}: it must be above 0 and at most 1")
    _check_prefill_buckets(prefill_buckets, counts["max_prefill_tokens"])
    if counts["num_pages"] is not None and counts["kv_bytes"] is not None:
        raise InvalidArgumentError(
            f"num_pages={counts['num_pages']} and kv_bytes={counts['kv_bytes']}: give one of them"
        )


def _check_prefill_buckets(buckets: Sequence[int] | None, max_prefill_tokens: int) -> None:
    """Raises InvalidArgumentError for numbers of tokens that are none, or that no step computes."""
    if buckets is None:
        return
    if not isinstance(buckets, Sequence) or isinstance(buckets, (str, bytes)):
        raise InvalidArgumentError(f"prefill_buckets={buckets!r}: give a sequence of numbers of tokens, () for none")
    for bucket in buckets:
        check_counts(**{"a bucket of prefill_buckets": bucket})
    if max(buckets, default=0) > max_prefill_tokens:
        raise InvalidArgumentError(
            f"prefill_buckets={list(buckets)}: a step computes max_prefill_tokens={max_prefill_tokens} at most, raise "
            "that or drop the bucket"
        )


def ladder_for(max_batch: int, buckets: Sequence[int] | None, profile: CaptureProfile | None) -> BucketLadder:
    """The buckets asked for, the profile's, or a ladder that suits `max_batch`.

    Raises:
        InvalidArgumentError: buckets and a profile were given, or a profile of another `max_batch`.
    """
    if buckets is not None and (not isinstance(buckets, Iterable) or isinstance(buckets, (str, bytes))):
        raise InvalidArgumentError(f"buckets={buckets!r}: give a sequence of batch sizes")
    if profile is None:
        return BucketLadder.default(max_batch) if buckets is None else BucketLadder(buckets, max_batch)
    if buckets is not None:
        raise InvalidArgumentError(
            f"buckets={list(buckets)} and a capture_profile with the ladder {list(profile.ladder)}: give one of them"
        )
    if profile.max_batch != max_batch:
        raise InvalidArgumentError(
            f"max_batch={max_batch}, the capture_profile was made for {profile.max_batch}: pass "
            f"max_batch={profile.max_batch}, or measure a profile for {max_batch}"
        )
    return BucketLadder(profile.ladder)


def backend_for(backend: str, profile: CaptureProfile | None, cascade: str) -> str | BackendTable:
    """The backend asked for, or who serves each of the profile's buckets.

    Raises:
        InvalidArgumentError: a backend was asked for, and the profile has another one; or a cascade, which no profile
            has measured.
    """
    if profile is None:
        return backend
    if cascade != "off":
        raise InvalidArgumentError(
            f"cascade={cascade!r} and a capture_profile, which does not know what cascades take: give one of them"
        )
    named = sorted({span.backend for spans in profile.backends.values() for span in spans})
    if backend != "auto" and named != [backend]:
        raise InvalidArgumentError(
            f"backend={backend!r} and a capture_profile whose buckets are served by {' and '.join(named)}: leave "
            "backend out, or measure a profile with it alone"
        )
    return profile.backends


def scales_for(kv_scales: KVScales | str | Path | None, cache: CacheSpec) -> KVScales | None:
    """The scales asked for, read from their file if need be.

    Raises:
        InvalidArgumentError: neither, no such file, or a cache that takes none.
    """
    if kv_scales is None:
        return None
    if not cache.is_fp8:
        raise InvalidArgumentError(f"kv_scales for a cache of {cache.dtype}: pass kv_cache_dtype='fp8', or no scales")
    if isinstance(kv_scales, (str, Path)):
        return KVScales.load(kv_scales)
    if not isinstance(kv_scales, KVScales):
        raise InvalidArgumentError(f"kv_scales is a {type(kv_scales).__name__}: give KVScales, or a file of them")
    return kv_scales


def opened(
    model,
    tokenizer,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    progress: Callable[[int, int], None],
) -> tuple:
    """A model and its tokenizer: loaded ones as they are, else loaded from where `model` says.

    Calls `progress(done, 1)` before and after.

    Raises:
        InvalidArgumentError: dtype or device for a loaded model, or a device that is not there.
    """
    progress(0, 1)
    if isinstance(model, nn.Module):
        if dtype is not None or device is not None:
            raise InvalidArgumentError("dtype and device are for loading; this model is loaded: use model.to(...)")
    else:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and not torch.cuda.is_available():
            raise InvalidArgumentError(f"device={str(device)!r}: torch {torch.__version__} sees no CUDA device")
        model, loaded = load_model(model, dtype=dtype, device=device, with_tokenizer=tokenizer is None)
        tokenizer = tokenizer or loaded
    progress(1, 1)
    return model, tokenizer


class Vocabulary(NamedTuple):
    """How many ids a model can be fed, and how many of them it can draw: ids go from 0 to it, itself left out."""

    fed: int
    drawn: int


def vocabulary_of(model: nn.Module) -> Vocabulary:
    """Both sizes.

    Raises:
        UnsupportedModelError: it may draw others than it can be fed.
    """
    fed, head = model.get_input_embeddings().num_embeddings, model.get_output_embeddings()
    drawn = fed if head is None else head.weight.shape[0]
    if drawn > fed:
        raise UnsupportedModelError(
            f"{type(model).__name__} draws from {drawn} ids and embeds {fed}: resize its embeddings"
        )
    return Vocabulary(fed, drawn)


def end_ids_of(model: nn.Module, tokenizer, vocabulary: Vocabulary) -> list[int]:
    """Ids that end a text; one that cannot be drawn ends nothing, and could not be banned below min_tokens either."""
    return [token_id for token_id in end_token_ids(model, tokenizer) if 0 <= token_id < vocabulary.drawn]
