"""Runs a Gluon kernel on a CPU by its values: what it loads, computes and stores, without layouts and without warps.

Layouts say who holds a number and not what it is, so a kernel's Python is run as it is, with torch in the place of the
language. What this cannot see: layouts that the compiler would refuse, races, copies that are waited for too late, and
how the device rounds where torch does not.
"""

from __future__ import annotations

import builtins
import itertools
from collections.abc import Callable
from types import FunctionType, SimpleNamespace

import torch


class Values(torch.Tensor):
    """A tensor as kernels know it."""

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Values:
        return self.view(dtype) if bitcast else super().to(dtype)

    @property
    def type(self) -> SimpleNamespace:
        return SimpleNamespace(layout=None)


class Pointer:
    """Places in a flat tensor; `+` moves them on."""

    def __init__(self, base: torch.Tensor, at: torch.Tensor | int = 0):
        self.base, self.at, self.dtype = base, at, SimpleNamespace(element_ty=base.dtype)

    def __add__(self, by) -> Pointer:
        return Pointer(self.base, self.at + by)

    def to(self, dtype: torch.dtype, bitcast: bool) -> Pointer:
        other = self.base.view(dtype)
        return Pointer(other, self.at * self.base.itemsize // other.itemsize)


class Shared:
    """Shared memory; every view is of the same bytes."""

    def __init__(self, held: torch.Tensor):
        self._held = held

    def index(self, at) -> Shared:
        return Shared(self._held[int(at)])

    def slice(self, start: int, count: int, dim: int) -> Shared:
        return Shared(self._held.narrow(dim, start, count))

    def permute(self, order: list[int]) -> Shared:
        return Shared(self._held.permute(order))

    def _reinterpret(self, dtype: torch.dtype, shape: list[int], layout) -> Shared:
        count = torch.Size(shape).numel() * dtype.itemsize
        flat = self._held.view(-1).view(torch.uint8)
        assert count <= len(flat), f"{count} bytes of {len(flat)}"
        return Shared(flat[:count].view(dtype).view(shape))

    def load(self, layout) -> Values:
        return self._held.clone().as_subclass(Values)

    def store(self, x: torch.Tensor) -> None:
        self._held.copy_(x)


def _tensor(x) -> torch.Tensor:
    return x if isinstance(x, torch.Tensor) else torch.tensor(x)


def _load(pointer: Pointer, mask=None, other=0.0) -> Values:
    at = _tensor(pointer.at).long()
    if mask is None:
        return pointer.base[at].as_subclass(Values)
    at, mask = torch.broadcast_tensors(at, _tensor(mask))
    found = torch.full(at.shape, other).to(pointer.base.dtype)
    found[mask] = pointer.base[at[mask]]
    return found.as_subclass(Values)


def _store(pointer: Pointer, x, mask=True) -> None:
    at, x, mask = torch.broadcast_tensors(_tensor(pointer.at).long(), _tensor(x), _tensor(mask))
    pointer.base[at[mask]] = x[mask].to(pointer.base.dtype)


def _atomic_add(pointer: Pointer, by: int, sem: str) -> int:
    before = int(pointer.base[int(pointer.at)])
    pointer.base[int(pointer.at)] += by
    return before


def _copy(shared: Shared, pointer: Pointer, mask) -> None:
    shared.store(_load(pointer, mask, 0))


def _mma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    assert a.dtype == b.dtype and a.itemsize == 2, (a.dtype, b.dtype)
    return a.float() @ b.float() + c


def _language(program: list[int], grid: tuple[int, ...], num_warps: int) -> SimpleNamespace:
    made = {
        name: (lambda *args, **kwargs: None)
        for name in (
            "NVMMADistributedLayout SliceLayout DotOperandLayout BlockedLayout SwizzledSharedLayout "
            "DistributedLinearLayout thread_barrier"
        ).split()
    }

    def values(function: Callable) -> Callable:
        return lambda *args, **kwargs: function(*args, **kwargs).as_subclass(Values)

    def one_dtype(function: Callable) -> Callable:
        def applied(a, b):
            like = next(each for each in (a, b) if isinstance(each, torch.Tensor))
            return function(
                *(each if torch.is_tensor(each) else torch.tensor(each, dtype=like.dtype) for each in (a, b))
            )

        return values(applied)

    return SimpleNamespace(
        **made,
        float8e4nv=torch.float8_e4m3fn,
        **{name: getattr(torch, name) for name in ("float16", "float32", "int8", "int16", "int32", "int64")},
        constexpr=lambda x: x,
        static_range=range,
        program_id=lambda axis: program[axis],
        num_programs=lambda axis: grid[axis],
        num_warps=lambda: num_warps,
        pointer_type=lambda dtype: dtype,
        load=_load,
        store=_store,
        atomic_add=_atomic_add,
        allocate_shared_memory=lambda dtype, shape, layout: Shared(torch.zeros(shape, dtype=dtype)),
        arange=values(lambda start, end, layout=None: torch.arange(start, end, dtype=torch.int32)),
        zeros=values(lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype)),
        full=values(lambda shape, value, dtype, layout=None: torch.full(shape, value, dtype=dtype)),
        full_like=values(torch.full_like),
        convert_layout=lambda x, layout: x,
        expand_dims=lambda x, dim: x.unsqueeze(dim),
        reshape=lambda x, shape: x.reshape(shape),
        permute=lambda x, order: x.permute(order),
        join=lambda a, b: torch.stack((a, b), -1),
        split=lambda x: (x[..., 0], x[..., 1]),
        broadcast=torch.broadcast_tensors,
        where=values(lambda condition, a, b: torch.where(_tensor(condition), a, b)),
        maximum=one_dtype(torch.maximum),
        minimum=one_dtype(torch.minimum),
        max=lambda x, dim: x.amax(dim),
        sum=lambda x, dim: x.sum(dim),
        abs=torch.abs,
        exp=torch.exp,
        rsqrt=torch.rsqrt,
        floor=torch.floor,
        cos=torch.cos,
        sin=torch.sin,
        fma=lambda a, b, c: a * b + c,
        cdiv=lambda a, b: (a + b - 1) // b,
        div_rn=lambda a, b: a / b,
    )


class Valued:
    """Stands for a kernel: `Valued(kernel)[grid](*args, **constants)` runs its programs one after the other."""

    def __init__(self, kernel):
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args, num_warps: int, launch_pdl: bool, **constants) -> None:
            program = [0] * len(grid)
            language = _language(program, grid, num_warps)
            function = _python(self._kernel, language, {})
            given = [Pointer(_flat(each)) if isinstance(each, torch.Tensor) else each for each in args]
            for program[:] in itertools.product(*map(range, grid)):
                function(*given, **constants)

        return launch


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """All that lies in a tensor's storage from its first element on."""
    storage, size = tensor.untyped_storage(), tensor.itemsize
    count = storage.nbytes() // size - tensor.storage_offset()
    return tensor.as_strided((count,), (1,))


def _python(jitted, language: SimpleNamespace, made: dict) -> FunctionType:
    """The Python of a kernel or of what it calls, with values for the language."""
    function = jitted.fn
    if function in made:
        return made[function]
    names = dict(function.__globals__)
    found = made[function] = FunctionType(function.__code__, names, function.__name__, function.__defaults__)
    copies = SimpleNamespace(
        async_copy_global_to_shared=lambda shared, pointer, mask: _copy(shared, pointer, mask),
        commit_group=lambda: None,
        wait_group=lambda count: None,
    )
    names |= {"gl": language, "tl": language, "async_copy": copies, "mma_v2": _mma, "min": builtins.min}
    for name in function.__code__.co_names:
        each = names.get(name)
        if type(each).__name__ == "constexpr":
            names[name] = each.value
        elif type(each).__name__ == "ConstexprFunction":
            names[name] = lambda *args: None
        elif hasattr(each, "fn"):
            names[name] = _python(each, language, made)
    return found
