"""Folds norms, gates and residuals of a traced step into the linear layers beside them, and makes pairs of those."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_IN_PLACE = {getattr(operator, name) for name in dir(operator) if name.startswith("i") and name[1:] in dir(operator)}


class Norm(NamedTuple):
    """An RMS norm found in a graph: what it norms as float32, its weight and its epsilon."""

    wide: Node
    weight: Node
    eps: float

    @property
    def x(self) -> Node:
        """What it norms."""
        return self.wide.args[0]


def fold(module: GraphModule, suits: Callable[[Tensor], bool]) -> int:
    """Makes linear layers of a graph that Dynamo traced calls of `torch.ops.graphattn.linear`, and folds in what fits.

    What fits: an RMS norm before (of the kind of Llama's, weight times normed), `silu(a) * b` after where a and b are
    the halves of the output, and a residual that is added after. A norm or an output that others read too stays for
    them. Whatever is written in another way stays as it is, and so does what a change in place stands between: Dynamo's
    graphs have those, and a folded linear reads later than the nodes it replaces.

    Args:
        module: changed in place.
        suits: whether a linear of a weight, given its fake tensor, is to be replaced; only weights that are inputs of
            the graph are asked about.

    Returns:
        How many were replaced.
    """
    order = {node: index for index, node in enumerate(module.graph.nodes)}
    changes = [index for node, index in order.items() if _changes_in_place(node)]
    unread = {node for node in order if not node.users}
    count = 0
    for node in order:
        if node.target is not F.linear or len(node.args) < 2:
            continue
        x, weight, *bias = node.args
        if weight.op not in ("placeholder", "get_attr") or is_traceable_wrapper_subclass(_value(weight)):
            continue  # a wrapped weight is quantised or sharded, and has kernels of its own
        if not suits(_value(weight)):
            continue
        bias = bias[0] if bias else node.kwargs.get("bias")
        found = _neighbours(node)
        if any(order[found.first] < index < order[found.last] for index in changes):
            found = Neighbours(node, node)
        norm_weight, eps = None, 0.0
        if found.norm is not None:
            x, norm_weight, eps = found.norm.x, found.norm.weight, found.norm.eps
        with module.graph.inserting_before(found.last):
            folded = module.graph.call_function(
                torch.ops.graphattn.linear.default,
                (x, weight, bias, norm_weight, eps, found.gated, found.residual),
            )
        folded.meta = dict(found.last.meta)
        found.last.replace_all_uses_with(folded)
        count += 1
    # What nobody read before is there for what it does, and only what was read by what is replaced may go.
    module.graph.eliminate_dead_code(lambda node: node in unread or node.is_impure())
    _pair(module.graph)
    module.recompile()
    return count


def _pair(graph: Graph) -> None:
    """Makes two folded linears one call, where the second norms what the first gives with its residual."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    changes = [index for node, index in order.items() if _changes_in_place(node)]
    for node in order:
        if not _is_folded(node) or not _is_folded(node.args[0]):
            continue
        total, next_weight, next_bias, norm, eps, gated, residual = node.args
        x, weight, bias, norm_before, _, gated_before, residual_before = total.args
        is_plain = norm_before is None and not gated_before and residual is None
        if norm is None or residual_before is None or not is_plain:
            continue
        if any(order.get(user, -1) < order[node] for user in total.users):
            continue
        if any(order[total] < index < order[node] for index in changes):
            continue
        with graph.inserting_before(node):
            both = graph.call_function(
                torch.ops.graphattn.linear_pair.default,
                (x, residual_before, weight, bias, norm, eps, next_weight, next_bias, gated),
            )
            parts = [graph.call_function(operator.getitem, (both, index)) for index in (0, 1)]
        for replaced, part in zip((node, total), reversed(parts), strict=True):
            part.meta = dict(replaced.meta)
            replaced.replace_all_uses_with(part)
            graph.erase_node(replaced)
        both.meta["example_value"] = tuple(_value(part) for part in parts)


def _is_folded(node: object) -> bool:
    return isinstance(node, Node) and node.target is torch.ops.graphattn.linear.default


class Neighbours(NamedTuple):
    """What stands around a linear and fits: the first and the last node that it replaces, and what they compute."""

    first: Node
    last: Node
    norm: Norm | None = None
    gated: bool = False
    residual: Node | None = None


def _neighbours(node: Node) -> Neighbours:
    found = Neighbours(node, node)
    x = node.args[0]
    if (norm := _norm(x)) is not None and _value(norm.weight).dtype == _value(x).dtype == _value(norm.x).dtype:
        found = found._replace(first=norm.wide, norm=norm)
    if (product := _gate(node)) is not None:
        found = found._replace(last=product, gated=True)
    if (total := _only_user(found.last, operator.add)) is not None:
        other = next((arg for arg in total.args if arg is not found.last), None)
        if isinstance(other, Node) and _alike(other, total) and _alike(found.last, total):
            found = found._replace(last=total, residual=other)
    return found


def _changes_in_place(node: Node) -> bool:
    """Whether a node may change a tensor that others read; our attention changes its cache alone."""
    if node.kwargs.get("inplace") or "out" in node.kwargs or node.target is operator.setitem:
        return True
    if node.op == "call_method":
        return node.target.endswith("_") and not node.target.endswith("__")
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable and node.target.namespace != "graphattn"
    name = getattr(node.target, "__name__", "")
    return node.target in _IN_PLACE or (node.op == "call_function" and name.endswith("_") and not name.endswith("__"))


def _value(node: Node) -> Tensor:
    return node.meta["example_value"]


def _alike(node: Node, other: Node) -> bool:
    first, second = _value(node), _value(other)
    if not (isinstance(first, Tensor) and isinstance(second, Tensor)):
        return False
    return first.shape == second.shape and first.dtype == second.dtype


def _only_user(node: Node, target: object) -> Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target is target else None


def _norm(node: Node) -> Norm | None:
    """The RMS norm that a node ends: `weight * (x32 * rsqrt(mean(x32 ** 2) + eps)).to(dtype)`."""
    if not _calls(node, operator.mul):
        return None
    weight, rounded = node.args
    if not _calls(rounded, "to") or not _calls(rounded.args[0], operator.mul) or not isinstance(weight, Node):
        return None
    wide, unit = rounded.args[0].args
    if not _calls(wide, "to", torch.float32) or not _calls(unit, torch.rsqrt) or not _calls(unit.args[0], operator.add):
        return None
    mean, eps = unit.args[0].args
    if not _calls(mean, "mean", -1) or mean.kwargs != {"keepdim": True} or not isinstance(eps, float):
        return None
    if not _calls(mean.args[0], "pow", 2) or mean.args[0].args[0] is not wide:
        return None
    if _value(weight).shape != _value(node).shape[-1:]:
        return None
    return Norm(wide, weight, eps)


def _gate(node: Node) -> Node | None:
    """The product `silu(a) * b` where a and b are the halves of a linear's output, and nothing else reads it."""
    split = _only_user(node, "split")
    if split is None or len(split.users) != 2:
        return None
    sizes = split.args[1] if len(split.args) > 1 else None
    if not isinstance(sizes, list | tuple) or len(sizes) != 2 or sizes[0] != sizes[1] or split.args[2:] != (-1,):
        return None
    first, second = sorted(split.users, key=lambda half: half.args[1])
    silu = _only_user(first, F.silu)
    if silu is None or len(second.users) != 1:
        return None
    product = _only_user(silu, operator.mul)
    return product if product is not None and set(product.args) == {silu, second} else None


def _calls(node: object, target: object, *rest: object) -> bool:
    """Whether a node calls `target` with `rest` behind its first argument, where that is asked."""
    return isinstance(node, Node) and node.target == target and (not rest or node.args[1:] == rest)
