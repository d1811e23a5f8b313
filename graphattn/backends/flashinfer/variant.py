"""A variant as FlashInfer's JIT takes it: the struct around its functions, and the arguments of its module.

The kernels call LogitsMask for tiles at the border of what is causal or in the window, and for no others, so a
variant's mask is part of LogitsTransform, which is called for every logit. Where the context is split, OutputTransform
sees a part of the row, so a variant scales what was attended and does not otherwise change it; M_D_UPDATE counts the
sink in the first part alone. Rows of a tile beyond the request's queries are computed and dropped: their position is
clamped to the last query's, so that what is looked up by position stays within the row.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch

from ...errors import BackendError
from ...spec import AttentionSpec
from ...variants import C_TYPES

MAX_LINES = 20  # of a compiler's output in an error


class Arguments(NamedTuple):
    """What `gen_customize_batch_prefill_module` takes after the backend, in its order."""

    uri: str
    dtype_q: torch.dtype
    dtype_kv: torch.dtype
    dtype_o: torch.dtype
    dtype_indices: torch.dtype
    head_dim_qk: int
    head_dim_vo: int
    tensor_names: tuple[str, ...]
    tensor_types: tuple[str, ...]
    scalar_names: tuple[str, ...]
    scalar_types: tuple[str, ...]
    struct_name: str
    struct: str


def arguments(spec: AttentionSpec, dtype: torch.dtype, kv_dtype: torch.dtype | None = None) -> Arguments:
    """The arguments for queries of `dtype`, and pages of it or of `kv_dtype`; the uri is made of all others."""
    variant = spec.variant
    names = _scalar_names(spec)
    rest = (
        *(dtype, kv_dtype or dtype, dtype, torch.int32, spec.head_dim, spec.head_dim),
        tuple(f"variant_{name}" for name in variant.tensors),
        tuple(C_TYPES[dtype] for dtype, _ in variant.kinds.values()),
        names,
        ("double",) * len(names),
        f"Graphattn{variant.name}",
        struct(spec),
    )
    return Arguments(f"graphattn_{variant.name}_{hashlib.sha256(repr(rest).encode()).hexdigest()[:24]}", *rest)


def scalars(spec: AttentionSpec) -> tuple[float, ...]:
    """The values that `run` takes after the tensors."""
    softcap = () if spec.softcap is None else (spec.softcap,)
    return (spec.scale, *softcap, *spec.variant.scalars.values())


def _scalar_names(spec: AttentionSpec) -> tuple[str, ...]:
    softcap = () if spec.softcap is None else ("graphattn_softcap",)
    return ("graphattn_scale", *softcap, *(f"variant_{name}" for name in spec.variant.scalars))


def struct(spec: AttentionSpec) -> str:
    """C++ of the variant's functions beside its tensors and scalars, and of the hooks that call them."""
    variant = spec.variant
    has = {hook: hook in variant.hooks for hook in ("logits", "mask", "sink", "output_scale")}
    name, functions = f"Graphattn{variant.name}", f"Graphattn{variant.name}Functions"
    members = [f"const {C_TYPES[dtype]}* {each};" for each, (dtype, _) in variant.kinds.items()]
    members += [f"float {each};" for each in variant.scalars]
    reads = [f"functions.{each} = params.variant_{each};" for each in (*variant.tensors, *variant.scalars)]
    if spec.softcap is not None:
        reads.append("softcap = params.graphattn_softcap;")
    query = "const int query = int(kv_len - qo_len + min(qo_idx, qo_len - 1));"
    logit = ["float logit = logits * scale_qk;"]
    if spec.softcap is not None:
        logit.append("logit = softcap * float(math::tanh(logit / softcap));")
    if has["logits"] or has["mask"]:
        logit.append(query)
    if has["logits"]:
        logit.append("logit = functions.logits(logit, qo_head_idx, query, int(kv_idx));")
    if has["mask"]:
        logit.append("if (!functions.mask(qo_head_idx, query, int(kv_idx))) logit = -math::inf;")
    sink = """
  REGISTER_M_D_UPDATE(params, kv_tile_idx, qo_head_idx, m, d, scale, {
    // m is in powers of two here. Where neither key nor sink has weight it stays -inf, and the output zero.
    const float term = kv_tile_idx == 0 ? functions.sink(qo_head_idx) * math::log2e : -math::inf;
    const float top = fmaxf(m, term);
    scale = 1.f;
    if (top != -math::inf) {
      scale = math::ptx_exp2(m - top);
      d = d * scale + math::ptx_exp2(term - top);
      m = top;
    }
  })
"""
    output = ["float factor = (m != -math::inf) ? math::ptx_rcp(d) : 0.f;"]
    if has["sink"]:
        output.append("factor *= scale;")
    if has["output_scale"]:
        output += [query, "factor *= functions.output_scale(qo_head_idx, query);"]
    return f"""
struct {functions} {{
  {_lines(members, 2)}
#line 1 "{variant.name}"
{variant.declaration}
#line 1 "graphattn"
}};

struct {name} : AttentionVariantBase {{
  static constexpr bool use_softmax = true;
  uint32_t qo_len, kv_len, window_left;
  float sm_scale_log2, scale_qk, softcap;
  {functions} functions;

  template <typename Params>
  __device__ __host__ {name}(const Params& params, uint32_t batch_idx, uint8_t* smem_ptr) {{
    qo_len = params.get_qo_len(batch_idx);
    kv_len = params.get_kv_len(batch_idx);
    window_left = (params.window_left >= 0) ? params.window_left : kv_len;
    sm_scale_log2 = math::log2e;
    scale_qk = params.graphattn_scale;
    {_lines(reads, 4)}
  }}

  REGISTER_LOGITS_TRANSFORM(params, logits, batch_idx, qo_idx, kv_idx, qo_head_idx, kv_head_idx, {{
    {_lines(logit, 4)}
    return logit;
  }})

  REGISTER_LOGITS_MASK(params, batch_idx, qo_idx, kv_idx, qo_head_idx, kv_head_idx, {{
    return kv_idx + qo_len + window_left >= kv_len + qo_idx;
  }})
{sink if has["sink"] else ""}
  REGISTER_OUTPUT_TRANSFORM(params, output, batch_idx, qo_idx, qo_head_idx, m, d, scale, {{
    {_lines(output, 4)}
    return output * factor;
  }})
}};
"""


def _lines(statements: list[str], indent: int) -> str:
    return ("\n" + " " * indent).join(statements)


def not_compiled(spec: AttentionSpec, dtype: torch.dtype, error: Exception) -> BackendError:
    """The error that names the variant and has the compiler's last lines, without the build tool's around them."""
    lines = f"{type(error).__name__}: {error}".splitlines()
    said = [line for line in lines if line.strip() and not _is_of_the_build(line)][-MAX_LINES:]
    return BackendError(
        f"variant {spec.variant.name} could not be compiled or loaded for {dtype}, head_dim {spec.head_dim}; the last "
        "lines of what was said:\n" + "\n".join(said)
    )


def _is_of_the_build(line: str) -> bool:
    return line.startswith(("[", "ninja:", "FAILED:")) or " -c " in line
