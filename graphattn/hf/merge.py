"""Linear layers of one model that read the same input, computed by one GEMM: q, k, v and gate, up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InvalidArgumentError

# Siblings by name, in the order in which models call them.
KINDS = {"qkv": ("q_proj", "k_proj", "v_proj"), "gate_up": ("gate_proj", "up_proj")}
SHARE = "graphattn_share"  # attribute of each merged linear: its `_Group` and its slot, an attribute of the input


class MergedProjections:
    """Makes sibling linears of a loaded model share one weight, and takes them apart again.

    The first sibling that a step calls computes all of them and leaves the others their columns on the input itself, so
    that nothing outlives the input and no other input is mistaken for it. Each part is handed out once. A sibling that
    finds none computes its own, as all do where grad is enabled. An input that is changed in place between siblings is
    noticed in eager mode, not in a compiled step.

    Parameters stay the objects they were, under their names: each becomes a view of its rows, and may be updated in
    place. While merging, one group's weights are held twice.

    Args:
        model: any module; siblings are merged where `kept` has nothing against it.

    Attributes:
        num_merged: groups merged, by kind ("qkv", "gate_up").
        kept: groups left as they were and why, by name ("model.layers.0.self_attn.qkv").

    Example:
        >>> merged = MergedProjections(model)
        >>> merged.num_merged
        {'qkv': 28, 'gate_up': 28}
        >>> merged.detach()
    """

    def __init__(self, model: nn.Module):
        self.num_merged = dict.fromkeys(KINDS, 0)
        self.kept: dict[str, str] = {}
        self._groups: list[_Group] = []
        owners = Counter(_storage(tensor) for tensor in _tensors(model))
        try:
            for parent, module in list(model.named_modules()):
                for kind, names in KINDS.items():
                    linears = [module._modules.get(name) for name in names]
                    if None in linears:
                        continue
                    if reason := _why_not(dict(zip(names, linears, strict=True)), owners):
                        self.kept[f"{parent}.{kind}".lstrip(".")] = reason
                        continue
                    self._groups.append(_Group(names, linears))
                    self.num_merged[kind] += 1
        except BaseException:
            self.detach()
            raise

    def check(self) -> None:
        """Raises InvalidArgumentError if a weight no longer lies where the merged GEMM reads it."""
        for group in self._groups:
            group.check()

    def detach(self) -> None:
        """Restores the model, each parameter with a tensor of its own; does nothing the second time."""
        while self._groups:
            self._groups.pop().detach()
        self.num_merged = dict.fromkeys(KINDS, 0)


class _Group:
    """Linears whose parameters are rows of one weight and one bias."""

    def __init__(self, names: tuple[str, ...], linears: list[nn.Linear]):
        self.names, self.linears = names, linears
        self.sizes = [len(linear.weight) for linear in linears]
        self.slots = [f"graphattn_{name}" for name in names]
        # In inference mode parameters would become inference tensors, which keep no count of their changes.
        with torch.inference_mode(False), torch.no_grad():
            self.weight = _joined([linear.weight for linear in linears])
            self.bias = None if linears[0].bias is None else _joined([linear.bias for linear in linears])
            for parameter, rows in self._rows():
                parameter.data = rows
        for index, linear in enumerate(linears):
            vars(linear)[SHARE] = (self, self.slots[index])
            linear.forward = MethodType(_next if index else _first, linear)
        if self.weight.is_cuda:
            torch.cuda.empty_cache()  # what was freed is in pieces too small for the next group

    def check(self) -> None:
        for index, (parameter, rows) in enumerate(self._rows()):
            if parameter.data_ptr() != rows.data_ptr() or parameter.dtype != rows.dtype:
                name = self.names[index % len(self.names)]
                raise InvalidArgumentError(
                    f"a {name}'s {'bias' if parameter.dim() == 1 else 'weight'} {tuple(parameter.shape)} was moved, "
                    "cast or reassigned after it was merged: update it in place, or detach first and merge again"
                )

    def detach(self) -> None:
        for linear in self.linears:
            vars(linear).pop("forward", None)
            vars(linear).pop(SHARE, None)
        with torch.inference_mode(False), torch.no_grad():
            for parameter, rows in self._rows():
                if _storage(parameter) == _storage(rows):
                    parameter.data = rows.clone()

    def _rows(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter and its part of what was joined, weights first."""
        yield from zip((linear.weight for linear in self.linears), self.weight.data.split(self.sizes), strict=True)
        if self.bias is not None:
            yield from zip((linear.bias for linear in self.linears), self.bias.data.split(self.sizes), strict=True)

    def __reduce__(self):
        return type(None), ()  # a copy of the model has weights of its own, which no group joins


# The state is in attributes of the linear and the forward is a bound method, which Dynamo guards by its code: an object
# or a partial is guarded by its identity, and layers compiled one by one would each be compiled anew.


def _first(linear: nn.Linear, x: Tensor) -> Tensor:
    group, _ = linear.graphattn_share
    if group is None or torch.is_grad_enabled():
        return F.linear(x, linear.weight, linear.bias)
    first, *others = F.linear(x, group.weight, group.bias).split(group.sizes, -1)
    for sibling, slot, part in zip(group.linears[1:], group.slots[1:], others, strict=True):
        setattr(x, slot, (part, group.weight, _versions(x, sibling)))
    return first


def _next(linear: nn.Linear, x: Tensor) -> Tensor:
    group, slot = linear.graphattn_share
    left = getattr(x, slot, None)
    if group is None or left is None or torch.is_grad_enabled():
        return F.linear(x, linear.weight, linear.bias)
    part, weight, versions = left
    if weight is not group.weight or versions != _versions(x, linear):
        return F.linear(x, linear.weight, linear.bias)
    setattr(x, slot, None)  # not delattr, which Dynamo does not trace
    return part


_first.__name__ = _next.__name__ = "forward"  # pickle looks methods up by it, and finds that of nn.Linear


def _versions(x: Tensor, linear: nn.Linear) -> tuple[int, ...]:
    """Changes in place so far, where they are counted."""
    if torch.compiler.is_compiling():
        return ()
    parameters = (parameter for parameter in linear._parameters.values() if parameter is not None)
    return tuple(tensor._version for tensor in (x, *parameters) if not tensor.is_inference())


def _joined(parameters: list[nn.Parameter]) -> nn.Parameter:
    # A parameter, since Dynamo may take the sizes of a plain tensor for dynamic.
    return nn.Parameter(torch.cat([parameter.data for parameter in parameters]), requires_grad=False)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, one that several modules hold as often as they do."""
    yield from (parameter for _, parameter in model.named_parameters(remove_duplicate=False))
    yield from (buffer for _, buffer in model.named_buffers(remove_duplicate=False))


def _storage(tensor: Tensor) -> tuple[torch.device, int] | None:
    """What tells one storage from another; None for a tensor that has not one, such as a quantized or sparse one."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
        return None
    return tensor.device, tensor.untyped_storage().data_ptr()


def _why_not(linears: dict[str, nn.Module], owners: Counter) -> str | None:
    """Why siblings cannot be merged; None if they can."""
    for name, linear in linears.items():
        if type(linear) is not nn.Linear:
            return f"{name} is a {type(linear).__name__}"
        if "forward" in vars(linear):
            return f"{name} has a forward of its own"
        if linear._forward_hooks or linear._forward_pre_hooks:
            return f"{name} has forward hooks"
        for parameter in (linear.weight, linear.bias):
            if parameter is not None and (_storage(parameter) is None or owners[_storage(parameter)] != 1):
                return f"{name} has a weight that is tied, quantized or not in memory"
    for what, traits in {
        "input width": lambda linear: linear.weight.shape[1],
        "bias": lambda linear: linear.bias is not None,
        "dtype": lambda linear: [parameter.dtype for parameter in linear.parameters()],
        "device": lambda linear: [parameter.device for parameter in linear.parameters()],
    }.items():
        found = [traits(linear) for linear in linears.values()]
        if found.count(found[0]) < len(found):
            return f"{', '.join(linears)} differ in {what}: {', '.join(map(str, found))}"
    return None
