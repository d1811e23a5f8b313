"""Which attention op torch really ran."""

from __future__ import annotations

from collections.abc import Callable

from torch.utils._python_dispatch import TorchDispatchMode

MARKS = ("attention", "attn", "graphattn")


class AttentionOps(TorchDispatchMode):
    """Collects the names of the attention ops that run inside it, in the order in which they first did."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if any(mark in name for mark in MARKS) and name not in self.names:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def attention_ops(call: Callable[[], object]) -> str:
    """The attention ops of a call, joined; says so where torch saw none (a library that launches its own kernels)."""
    with AttentionOps() as seen:
        call()
    return ", ".join(seen.names) or "no op that torch sees"
