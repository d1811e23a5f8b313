"""One of three dimensions alone, and a vector put along one, for kernels in Gluon."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def only(layout, dim):
    """The layout of dimension `dim` alone."""
    for other in (2, 1, 0):
        if other != dim:
            layout = gl.SliceLayout(other, layout)
    return layout


@gluon.jit
def along(start: gl.constexpr, end: gl.constexpr, dim: gl.constexpr, layout: gl.constexpr):
    """The numbers from `start` to `end` along dimension `dim` of three; the others have one element."""
    x = gl.arange(start, end, only(layout, dim))
    for other in gl.static_range(3):
        if other != dim:
            x = gl.expand_dims(x, other)
    return x
