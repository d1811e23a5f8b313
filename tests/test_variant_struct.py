"""The CUDA of a declaration, compiled for the host and driven as FlashInfer's fa2 kernels drive it.

Chunks of a row are computed apart by an online softmax in powers of two, each with its update and its output
transform, and merged by what they weigh; LogitsMask is asked for keys at the border alone, and LogitsTransform for
rows of a tile that no query stands for (prefill.cuh of FlashInfer 0.7.2.post1, in the order of its steps).
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess

import pytest
import torch
from torch import Tensor
from varied import CASES, VariedRows, rows_of

from graphattn.backends.flashinfer import variant as cuda

KERNEL = r"""
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>
#define __device__
#define __host__
using half = float;         // tensors are handed over as float32
using nv_bfloat16 = float;
using std::max;
using std::min;

namespace math {
constexpr float log2e = 1.44269504088896340736f;
constexpr float inf = std::numeric_limits<float>::infinity();
inline float ptx_exp2(float x) { return exp2f(x); }
inline float ptx_log2(float x) { return log2f(x); }
inline float ptx_rcp(float x) { return 1.f / x; }
inline float tanh(float x) { return tanhf(x); }
}  // namespace math

#define REGISTER_LOGITS_TRANSFORM(params, logits, b, qo, kv, head, kv_head, ...) \
  template <typename Params, typename T> T LogitsTransform(const Params& params, T logits, uint32_t b, uint32_t qo, \
                                                           uint32_t kv, uint32_t head, uint32_t kv_head) { __VA_ARGS__ }
#define REGISTER_LOGITS_MASK(params, b, qo, kv, head, kv_head, ...) \
  template <typename Params> bool LogitsMask(const Params& params, uint32_t b, uint32_t qo, uint32_t kv, \
                                             uint32_t head, uint32_t kv_head) { __VA_ARGS__ }
#define REGISTER_M_D_UPDATE(params, tile, head, m, d, scale, ...) \
  template <typename Params, typename M> void update_m_d(const Params& params, uint32_t tile, uint32_t head, M& m, \
                                                         float& d, float& scale) { __VA_ARGS__ }
#define REGISTER_OUTPUT_TRANSFORM(params, output, b, qo, head, m, d, scale, ...) \
  template <typename Params, typename T, typename M> T OutputTransform(const Params& params, T output, uint32_t b, \
      uint32_t qo, uint32_t head, M& m, float& d, float scale) { __VA_ARGS__ }

struct AttentionVariantBase {
  REGISTER_LOGITS_TRANSFORM(params, logits, b, qo, kv, head, kv_head, { return logits; })
  REGISTER_LOGITS_MASK(params, b, qo, kv, head, kv_head, { return true; })
  REGISTER_M_D_UPDATE(params, tile, head, m, d, scale, { return; })
};

struct Params {
  PARAMS
  uint32_t lengths[2];
  int32_t window_left;
  uint32_t get_qo_len(uint32_t) const { return lengths[0]; }
  uint32_t get_kv_len(uint32_t) const { return lengths[1]; }
};

STRUCT

constexpr uint32_t TILE = 4;  // keys for which a border is looked at together

extern "C" void attend(void** tensors, double* scalars, const float* q, const float* k, const float* v, float* out,
                       uint32_t qo_len, uint32_t kv_len, uint32_t heads, uint32_t kv_heads, uint32_t dim,
                       int window_left, uint32_t chunk) {
  Params params;
  SETTER
  params.lengths[0] = qo_len, params.lengths[1] = kv_len, params.window_left = window_left;
  NAME variant(params, 0, nullptr);
  for (uint32_t qo = 0; qo < qo_len + 3; ++qo)  // three rows beyond the queries, computed and dropped
    for (uint32_t head = 0; head < heads; ++head) {
      const uint32_t kv_head = head / (heads / kv_heads);
      std::vector<float> merged(dim, 0.f);
      float merged_weight = 0.f;
      for (uint32_t tile = 0; tile * chunk < kv_len; ++tile) {
        float m = -math::inf, d = 1.f, scale = NAN;
        std::vector<float> o(dim, 0.f);
        const uint32_t end = min((tile + 1) * chunk, kv_len);
        for (uint32_t kv = tile * chunk; kv < end; ++kv) {
          float logit = 0.f;
          for (uint32_t i = 0; i < dim; ++i)
            logit += q[(min(qo, qo_len - 1) * heads + head) * dim + i] * k[(kv * kv_heads + kv_head) * dim + i];
          logit = variant.LogitsTransform(params, logit, 0, qo, kv, head, kv_head);
          const bool in_window = kv / TILE * TILE + qo_len >= kv_len + qo ||
                                 kv / TILE * TILE + qo_len + variant.window_left >= kv_len + qo;
          const bool is_border = kv / TILE == (end - 1) / TILE || !in_window || kv + TILE + qo_len > kv_len + qo;
          if (is_border && (kv + qo_len > kv_len + qo || !variant.LogitsMask(params, 0, qo, kv, head, kv_head)))
            logit = -math::inf;
          const float top = max(m, logit);
          const float top_scaled = max(top * variant.sm_scale_log2, -std::numeric_limits<float>::max());
          const float kept = math::ptx_exp2(m * variant.sm_scale_log2 - top_scaled);
          const float weight = math::ptx_exp2(logit * variant.sm_scale_log2 - top_scaled);
          d = d * kept + weight, m = top;
          for (uint32_t i = 0; i < dim; ++i) o[i] = o[i] * kept + weight * v[(kv * kv_heads + kv_head) * dim + i];
        }
        if (m != -math::inf) m *= variant.sm_scale_log2;
        variant.update_m_d(params, tile, head, m, d, scale);
        const float weight = math::ptx_exp2(math::ptx_log2(d) + m);
        merged_weight += weight;
        for (uint32_t i = 0; i < dim; ++i)
          merged[i] += weight * variant.OutputTransform(params, o[i], 0, qo, head, m, d, scale);
      }
      for (uint32_t i = 0; i < dim && qo < qo_len; ++i)
        out[(qo * heads + head) * dim + i] = merged_weight == 0.f ? 0.f : merged[i] / merged_weight;
    }
}
"""


@pytest.fixture(scope="module")
def compile_struct(tmp_path_factory: pytest.TempPathFactory):
    """Compiles the kernel's model around a spec's struct, once for each struct."""
    compiler = next(filter(shutil.which, ("g++", "clang++")), None)
    if compiler is None:
        pytest.skip("needs a C++ compiler, and g++ and clang++ cannot be found")
    folder, built = tmp_path_factory.mktemp("structs"), {}

    def compiled(spec) -> ctypes.CDLL:
        made = cuda.arguments(spec, torch.bfloat16)
        if made.uri not in built:
            named = zip(made.tensor_types, made.tensor_names, strict=True)
            fields = [f"{c_type}* {name};" for c_type, name in named]
            fields += [f"{c_type} {name};" for c_type, name in zip(made.scalar_types, made.scalar_names, strict=True)]
            typed = enumerate(zip(made.tensor_types, made.tensor_names, strict=True))
            sets = [f"params.{name} = static_cast<{c_type}*>(tensors[{i}]);" for i, (c_type, name) in typed]
            sets += [f"params.{name} = scalars[{i}];" for i, name in enumerate(made.scalar_names)]
            source, library = folder / f"{made.uri}.cpp", folder / f"{made.uri}.so"
            text = KERNEL.replace("PARAMS", "\n  ".join(fields)).replace("SETTER", "\n  ".join(sets))
            source.write_text(text.replace("STRUCT", made.struct).replace("NAME", made.struct_name))
            options = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Werror", "-Wno-unused"]
            ran = subprocess.run(
                [compiler, *options, source, "-o", library], capture_output=True, text=True, timeout=300
            )
            assert ran.returncode == 0, ran.stderr
            built[made.uri] = ctypes.CDLL(str(library))
        return built[made.uri]

    return compiled


def attended(library: ctypes.CDLL, rows: VariedRows, chunk: int) -> Tensor:
    spec = rows.spec
    scalars = cuda.scalars(spec)
    tensors = [x.float() if x.is_floating_point() else x for x in rows.tensors.values()]
    pointers = (ctypes.c_void_p * max(1, len(tensors)))(*(x.data_ptr() for x in tensors))
    numbers = (ctypes.c_double * len(scalars))(*scalars)
    outs = []
    for q, k, v in zip(rows.q, rows.k, rows.v, strict=True):
        out = torch.full_like(q, float("nan"))
        buffers = (ctypes.c_void_p(x.data_ptr()) for x in (q, k, v, out))
        sizes = (len(q), len(k), spec.num_heads, spec.num_kv_heads, spec.head_dim)
        window = -1 if spec.window is None else spec.window - 1
        library.attend(pointers, numbers, *buffers, *map(ctypes.c_uint32, sizes), window, ctypes.c_uint32(chunk))
        outs.append(out)
    return torch.cat(outs)


@pytest.mark.parametrize("options", [{}, {"window": 9}, {"softcap": 2.0, "window": 30, "scale": 0.5}], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_struct_computes_the_formula(compile_struct, name: str, options: dict) -> None:
    rows = rows_of(name, ([0, 21, 0, 40, 63], [1, 17, 33, 1, 7]), dtype=torch.float32, **options)
    library, right = compile_struct(rows.spec), rows.attend(torch.float64)
    for chunk in (1000, 16, 5):
        torch.testing.assert_close(attended(library, rows, chunk).double(), right, rtol=0, atol=2e-5)
