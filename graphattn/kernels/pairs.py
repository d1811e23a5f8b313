"""8-bit operands of products on tensor cores, which are read from shared memory two numbers at a time.

Shared memory is read in the pattern of an operand by 16 bits (`ldmatrix`), by 8 bits only byte by byte. Pairs of
neighbours are therefore one integer there, and give two operands: the first ones of the pairs and the second ones.
Both are float16, which holds every e4m3 number exactly and is one instruction away; bfloat16 is three.

Suffix letters: G rows, D columns.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

_EXPONENT = gl.constexpr(0x7F800000)
_INVERSE = gl.constexpr(0x7F000000)  # less the exponent of a power of two, it is that of its inverse


@gluon.jit
def operands(held, layout: gl.constexpr, FP8: gl.constexpr):
    """What is held in shared memory in that layout: as it is, or of pairs the first ones and the second ones."""
    x = held.load(layout)
    if FP8:
        first, second = x.to(gl.int8), (x >> 8).to(gl.int8)
        first, second = first.to(gl.float8e4nv, bitcast=True), second.to(gl.float8e4nv, bitcast=True)
        return first.to(gl.float16), second.to(gl.float16)
    else:
        return (x,)


@gluon.jit
def normal(x_GD):
    """Rows as float16 whatever their magnitude, and the power of two that each is to be multiplied by again.

    The largest of a row lies in [1, 2) then; what is less than 2^-17 of it loses bits, up to 2^-25 of the largest.
    """
    wide_GD = x_GD.to(gl.float32)
    exponent_G = gl.max(gl.abs(wide_GD), 1).to(gl.int32, bitcast=True) & _EXPONENT
    inverse_G = (_INVERSE - exponent_G).to(gl.float32, bitcast=True)
    return (wide_GD * gl.expand_dims(inverse_G, 1)).to(gl.float16), exponent_G.to(gl.float32, bitcast=True)
