"""Where a model's weights lie and which modules it is made of: what captured steps hold it to."""

from __future__ import annotations

from operator import is_

from torch import Tensor, nn

from ..layer import Attention
from ..ledger import plain_tensors, wraps_others


class Placement:
    """Notices that a weight was moved or reassigned, or a module put in another's place.

    A step asks before each launch, of hundreds of weights: so it is `map` that walks them, and no line of Python.

    Args:
        model: its weights and buffers, but for what our layers hold, and its modules are those of now.
    """

    def __init__(self, model: nn.Module):
        held = [
            (tensors, name)
            for module in model.modules()
            if not isinstance(module, Attention)
            for tensors in (module._parameters, module._buffers)
            for name, tensor in tensors.items()
            if tensor is not None
        ]
        self._wrapping = [(tensors, name) for tensors, name in held if wraps_others(tensors[name])]
        plain = [(tensors, name) for tensors, name in held if not wraps_others(tensors[name])]
        self._holders, self._names = [tensors for tensors, _ in plain], [name for _, name in plain]
        parts = [(each._modules, name, part) for each in model.modules() for name, part in each._modules.items()]
        self._parents, self._places = [parent for parent, _, _ in parts], [name for _, name, _ in parts]
        self._parts = [part for _, _, part in parts]
        self._addresses = self._now()

    @property
    def tensors(self) -> list[Tensor]:
        """The weights and buffers."""
        return [holder[name] for holder, name in (*zip(self._holders, self._names, strict=True), *self._wrapping)]

    @property
    def is_intact(self) -> bool:
        """Whether all is where it was."""
        if not all(map(is_, map(dict.get, self._parents, self._places), self._parts)):
            return False
        try:
            return self._now() == self._addresses
        except (TypeError, KeyError):
            return False  # one is gone

    def _now(self) -> list[int]:
        plain = list(map(Tensor.data_ptr, map(dict.get, self._holders, self._names)))
        return plain + [each.data_ptr() for holder, name in self._wrapping for each in plain_tensors(holder[name])]
