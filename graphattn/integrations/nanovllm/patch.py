"""Puts graphattn into nano-vLLM's classes, for this process and those it starts, and takes it out again."""

from __future__ import annotations

import gc
from collections.abc import Callable

from ...errors import InvalidArgumentError
from .flash import without_flash_attn
from .layout import Modules, load
from .serving import OPEN
from .steps import replacements

_installed: list[Modules] = []
_originals: list[tuple[object, str, object]] = []


class Ranks:
    """Makes the model runner of a rank; what `LLMEngine` knows as `ModelRunner`.

    A process that is spawned unpickles it before anything of nano-vLLM, and so has graphattn in it from the start.
    """

    def __init__(self, runner: Callable):
        self._runner = runner

    def __call__(self, config, rank, event):
        return self._runner(config, rank, event)

    def __reduce__(self):
        return installed_ranks, ()


def installed_ranks() -> Ranks:
    """`Ranks` of this process, once graphattn is installed in it."""
    return Ranks(install().runner.ModelRunner)


def install() -> Modules:
    """Has every engine of nano-vLLM that is made from now on run on graphattn; does nothing the second time.

    flash-attn need not be installed. `from nanovllm import LLM` may come before or after.

    Returns:
        Its modules that were changed.

    Raises:
        ModuleNotFoundError: nano-vLLM or something that it imports is not installed.
        LayoutError: a version that is laid out otherwise than those that were read; says what differs.
    """
    if _installed:
        return _installed[0]
    with without_flash_attn():
        nano = load()
    replaced = [*replacements(nano), (nano.engine, "ModelRunner", Ranks(nano.runner.ModelRunner))]
    for owner, name, new in replaced:
        _originals.append((owner, name, vars(owner)[name]))
        setattr(owner, name, new)
    _installed.append(nano)
    return nano


def uninstall() -> None:
    """Restores nano-vLLM; without flash-attn its own attention then raises when it is called.

    Raises:
        InvalidArgumentError: an engine that was made meanwhile is still there.
    """
    gc.collect()
    if OPEN:
        raise InvalidArgumentError(f"{len(OPEN)} engines of nano-vLLM run on graphattn: call exit() of each first")
    while _originals:
        setattr(*_originals.pop())
    _installed.clear()
