"""Our kernels, in Triton and in Gluon, its language with layouts."""

from functools import cache
from importlib.util import find_spec


@cache
def has_gluon() -> bool:
    """Whether Triton is there and has Gluon."""
    return find_spec("triton") is not None and find_spec("triton.experimental.gluon") is not None
