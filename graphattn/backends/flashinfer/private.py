"""The one place that reads FlashInfer's private state; it refuses any version but the one that was read."""

from __future__ import annotations

import functools
import os
import shutil
import time
from pathlib import Path

import flashinfer
import torch
from flashinfer.jit import gen_batch_prefill_module, gen_customize_batch_prefill_module
from flashinfer.prefill import get_batch_prefill_jit_module, get_batch_prefill_module
from torch import Tensor

from ...errors import BackendError
from ...spec import POS_ENCODINGS, AttentionSpec, CacheSpec
from . import VERSION, variant

HEADER = "curand_kernel.h"  # fa3 includes it, and small CUDA toolkits lack it

if flashinfer.__version__ != VERSION:
    raise BackendError(
        f"flashinfer {flashinfer.__version__} is installed, its private state was read in {VERSION}: "
        f"pip install flashinfer-python=={VERSION}"
    )


def plan_info(wrapper) -> tuple[int, ...]:
    """The planner's offsets and sizes, which a captured launch of the wrapper holds by value."""
    return tuple(wrapper._plan_info)


def replan_prefill(
    wrapper,
    qo_indptr_S1: Tensor,
    kv_indptr_S1: Tensor,
    kv_lens_S: Tensor,
    spec: AttentionSpec,
    page_size: int,
    *,
    causal: bool,
) -> None:
    """Splits the work of a captured prefill anew; its `plan` does too, and writes the page tables.

    Args:
        wrapper: planned once by `plan`, for as many slots and at least as many queries.
        qo_indptr_S1, kv_indptr_S1: queries and pages of each slot, int32 on the host.
        kv_lens_S: tokens of those pages, likewise.
        spec, page_size: as in that plan.
        causal: likewise.
    """
    of_fa2 = (-1, False, 0, 0)  # fixed_split_size, disable_split_kv, num_colocated_ctas, uniform_q_len
    with torch.cuda.device(wrapper.device):
        wrapper._plan_info = wrapper._cached_module.plan(
            wrapper._float_workspace_buffer,
            wrapper._int_workspace_buffer,
            wrapper._pin_memory_int_workspace_buffer,
            qo_indptr_S1,
            kv_indptr_S1,
            kv_lens_S,
            wrapper._max_total_num_rows,
            len(kv_lens_S),
            spec.num_heads,
            spec.num_kv_heads,
            page_size,
            True,  # in a CUDA graph
            spec.head_dim,
            spec.head_dim,
            causal,
            -1 if spec.window is None else spec.window - 1,  # window_left
            *(of_fa2 if wrapper._backend == "fa2" else ()),
        )


def why_no_fa3(spec: AttentionSpec, cache: CacheSpec) -> str | None:
    """Why the module of the fa3 prefill can neither be loaded nor compiled; None if it can be."""
    module = gen_batch_prefill_module("fa3", *_key(spec, cache))
    if module.is_aot:
        return None
    lacks = []
    if os.environ.get("FLASHINFER_DISABLE_JIT"):
        lacks.append("FLASHINFER_DISABLE_JIT is set")
    if shutil.which("ninja") is None:
        lacks.append("ninja is not on the PATH")
    if not module.is_compiled:
        home = _cuda_home()
        nvcc = Path(os.environ.get("FLASHINFER_NVCC") or home / "bin" / "nvcc")
        if not nvcc.exists():
            lacks.append(f"there is no {nvcc}")
        includes = (home / "include", Path("/usr/include"))
        is_told = "FLASHINFER_EXTRA_CUDAFLAGS" in os.environ  # where else to look
        if not is_told and not any((folder / HEADER).exists() for folder in includes):
            lacks.append(f"there is no {includes[0] / HEADER}")
    return f"its module is not prebuilt and cannot be compiled: {', '.join(lacks)}" if lacks else None


def has_fa3(spec: AttentionSpec, cache: CacheSpec) -> bool:
    """Whether the module of the fa3 prefill is prebuilt or was compiled before."""
    module = gen_batch_prefill_module("fa3", *_key(spec, cache))
    return module.is_aot or module.is_compiled


def load(kernel: str, spec: AttentionSpec, cache: CacheSpec) -> float:
    """Loads the module of a prefill kernel, compiling it if need be; returns the seconds that this took.

    Raises:
        BackendError: it could not be compiled or loaded.
    """
    started = time.perf_counter()
    if spec.variant is not None:
        load_variant(spec, cache)
        return time.perf_counter() - started
    try:
        # What plan() asks for with these very arguments, and keeps.
        get_batch_prefill_module(kernel, *_key(spec, cache))
    except Exception as error:
        other = "; prefill='fa2' does without it" if kernel == "fa3" else ""
        raise BackendError(
            f"FlashInfer's {kernel} prefill for {spec} could not be compiled or loaded{other}. "
            f"{type(error).__name__}: {error}"
        ) from error
    return time.perf_counter() - started


def load_variant(spec: AttentionSpec, cache: CacheSpec):
    """The module of the spec's variant, which decodes and prefills; compiled once, loaded once in a process.

    Raises:
        BackendError: it could not be compiled or loaded; names the variant, with the compiler's last lines.
    """
    try:
        return _variant_module(variant.arguments(spec, cache.query_dtype, cache.dtype))
    except Exception as error:
        raise variant.not_compiled(spec, cache.query_dtype, error) from error


@functools.cache
def _variant_module(arguments: variant.Arguments):
    # What wrappers do with jit_args, but once and not for each wrapper, and for equal strides of keys and values only.
    module = gen_customize_batch_prefill_module("fa2", *arguments, paged_kv_stride_mode="equal").build_and_load()
    return get_batch_prefill_jit_module(arguments.uri, module)


def use(wrapper, module, arguments: variant.Arguments) -> None:
    """Has a wrapper of either kind plan and run a variant's module."""
    wrapper._jit_module = module
    wrapper._jit_additional_tensor_names = list(arguments.tensor_names)
    wrapper._jit_additional_scalar_names = list(arguments.scalar_names)


def _key(spec: AttentionSpec, cache: CacheSpec) -> tuple:
    query, fp16_qk_reduction = cache.query_dtype, False
    dtypes = (query, cache.dtype, query, torch.int32)
    pos_encoding = POS_ENCODINGS.index(spec.pos_encoding)  # FlashInfer's PosEncodingMode
    has_window, has_softcap = spec.window is not None, spec.softcap is not None
    sizes = (spec.head_dim, spec.head_dim)
    return (*dtypes, *sizes, pos_encoding, has_window, has_softcap, fp16_qk_reduction)


def _cuda_home() -> Path:
    """Where FlashInfer looks for the compiler (jit/cpp_ext.py)."""
    asked, found = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"), shutil.which("nvcc")
    return Path(asked or (found and Path(found).parent.parent) or "/usr/local/cuda")
