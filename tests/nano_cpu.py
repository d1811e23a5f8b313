"""A CPU for nano-vLLM, which asks for CUDA by name: what it calls there is faked here, and its faults are not.

Faked: `torch.cuda` as far as it uses it, with a count of bytes that the tests set; `.cuda()` as a copy; pinned memory
as plain; NCCL as gloo in one process; `torch.compile` as nothing; `flash_attn` and its one Triton kernel in plain torch
as ops of their own; and CUDA graphs by a recorder that, as they do, runs the same operations on the same tensors again.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OPS = torch.library.Library("nano_cpu", "DEF")
OPS.define("store(Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, Tensor slots) -> ()")
OPS.define("decode(Tensor q, Tensor keys, Tensor values, Tensor lens, Tensor tables, float scale) -> Tensor")


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The last T of L tokens over all of them, causally: q `[T, H, D]`, k and v `[L, K, D]`."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1).double() for x in (k, v))
    scores = torch.einsum("thd,lhd->htl", q.double(), k) * scale
    place = torch.arange(len(k) - len(q), len(k), device="cpu")
    scores.masked_fill_(torch.arange(len(k), device="cpu") > place[:, None], float("-inf"))
    return torch.einsum("htl,lhd->thd", scores.softmax(-1), v).to(q.dtype)


def store(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    for token, slot in enumerate(slots.tolist()):
        if slot != -1:
            keys.flatten(0, 1)[slot], values.flatten(0, 1)[slot] = key[token], value[token]


def gathered(pages: Tensor, table: Tensor, length: int) -> Tensor:
    return pages[table[: -(-length // pages.shape[1])].long()].flatten(0, 1)[:length]


def decode(q: Tensor, keys: Tensor, values: Tensor, lens: Tensor, tables: Tensor, scale: float) -> Tensor:
    out = torch.zeros_like(q)
    for row, length in enumerate(lens.tolist()):
        if length:
            k, v = (gathered(pages, tables[row], length) for pages in (keys, values))
            out[row] = attend(q[row], k, v, scale)
    return out


OPS.impl("store", store, "CPU")
OPS.impl("decode", decode, "CPU")


def flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens, block_table, softmax_scale, causal):
    return torch.ops.nano_cpu.decode(q, k_cache, v_cache, cache_seqlens, block_table, softmax_scale)


def flash_attn_varlen_func(
    q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, cu_seqlens_k, softmax_scale, causal, block_table
):
    out, ends_q, ends_k = torch.empty_like(q), cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for row, (start, end) in enumerate(zip(ends_q[:-1], ends_q[1:], strict=True)):
        if block_table is None:
            keys, values = (x[ends_k[row] : ends_k[row + 1]] for x in (k, v))
        else:
            length = ends_k[row + 1] - ends_k[row]
            keys, values = (gathered(pages, block_table[row], length) for pages in (k, v))
        out[start:end] = attend(q[start:end], keys, values, softmax_scale)
    return out


class Kernel:
    """nano-vLLM's one Triton kernel, by what it is called with."""

    def __init__(self, function):
        assert function.__name__ == "store_kvcache_kernel"

    def __getitem__(self, grid):
        def launch(key, key_stride, value, value_stride, k_cache, v_cache, slots, width):
            torch.ops.nano_cpu.store(key, value, k_cache, v_cache, slots)

        return launch


def module(name: str, **names) -> ModuleType:
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None)
    vars(made).update(names)
    return made


class Graph(TorchDispatchMode):
    """Operations that ran while it was entered, to be run again on the tensors that they ran on."""

    def __init__(self):
        super().__init__()
        self.calls, self.num_replays = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, outputs))
        return outputs

    def pool(self):
        return (0, 1)

    def replay(self):
        self.num_replays += 1
        for func, args, kwargs, outputs in self.calls:
            inputs = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            for was, now in zip(tree_leaves(outputs), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(was, Tensor) and was.untyped_storage().data_ptr() not in inputs:
                    was.copy_(now)


class Cuda:
    """The fakes, in force until monkeypatch undoes them.

    Attributes:
        total: bytes of the device.
        used: of them, as the tests count.
        per_graph: bytes that capturing a graph takes from now on.
        num_uploads: calls of `.cuda()`.
    """

    def __init__(self, monkeypatch, folder):
        self.total, self.used, self.per_graph, self.num_uploads = 1 << 26, 0, 0, 0
        self._stores, self._folder = 0, folder
        self.graphs: list[Graph] = []
        cuda = {
            "set_device": lambda rank: None,
            "empty_cache": lambda: None,
            "synchronize": lambda device=None: None,
            "reset_peak_memory_stats": lambda: None,
            "mem_get_info": lambda: (self.total - self.used, self.total),
            "memory_stats": lambda: {"allocated_bytes.all.peak": 0, "allocated_bytes.all.current": 0},
            "CUDAGraph": Graph,
            "graph": self._capture,
        }
        for name, fake in cuda.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        for name in ("tensor", "zeros"):
            monkeypatch.setattr(torch, name, unpinned(getattr(torch, name)))
        monkeypatch.setattr(torch, "compile", torch.inference_mode())
        monkeypatch.setattr(torch, "set_default_device", lambda device: None)
        monkeypatch.setattr(Tensor, "cuda", lambda tensor, non_blocking=False: self._upload(tensor))
        monkeypatch.setattr(dist, "init_process_group", self._gloo(dist.init_process_group))
        jit = {"jit": Kernel, "language": module("triton.language", constexpr=int)}
        monkeypatch.setitem(sys.modules, "triton", module("triton", **jit))
        monkeypatch.setitem(sys.modules, "triton.language", jit["language"])

    def _upload(self, tensor: Tensor) -> Tensor:
        self.num_uploads += 1
        return tensor.clone()

    @contextmanager
    def _capture(self, graph: Graph, pool):
        self.used += self.per_graph
        self.graphs.append(graph)
        with graph:
            yield

    def _gloo(self, start):
        def init_process_group(backend, address, world_size, rank):
            self._stores += 1
            file = f"file://{self._folder}/store{self._stores}"
            start("gloo", init_method=file, world_size=world_size, rank=rank)

        return init_process_group


def unpinned(make):
    def made(*arguments, pin_memory=False, **options):
        return make(*arguments, **options)

    return made


def flash_attn() -> ModuleType:
    """flash-attn in plain torch."""
    return module(
        "flash_attn",
        flash_attn_varlen_func=flash_attn_varlen_func,
        flash_attn_with_kvcache=flash_attn_with_kvcache,
    )
