"""Folds norms, gates and residuals of a traced step into the linear layers beside them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import functional as F


class Norm(NamedTuple):
    """An RMS norm found in a graph: what it norms, its weight and its epsilon."""

    x: Node
    weight: Node
    eps: float


def fold(module: GraphModule, suits: Callable[[Tensor], bool]) -> int:
    """Makes linear layers of a graph that Dynamo traced calls of `torch.ops.graphattn.linear`, and folds in what fits.

    What fits: an RMS norm before (of the kind of Llama's, weight times normed), `silu(a) * b` after where a and b are
    the halves of the output, and a residual that is added after. A norm or an output that others read too stays for
    them. Whatever is written in another way stays as it is.

    Args:
        module: changed in place.
        suits: whether a linear of a weight, given its fake tensor, is to be replaced.

    Returns:
        How many were replaced.
    """
    count = 0
    for node in list(module.graph.nodes):
        if node.target is not F.linear or len(node.args) < 2 or not suits(_value(node.args[1])):
            continue
        x, weight, *bias = node.args
        bias = bias[0] if bias else node.kwargs.get("bias")
        norm, gated, residual, last = _norm(x), False, None, node
        if (product := _gate(node)) is not None:
            gated, last = True, product
        if (total := _only_user(last, operator.add)) is not None:
            other = next((arg for arg in total.args if arg is not last), None)
            if isinstance(other, Node) and _alike(other, total) and _alike(last, total):
                residual, last = other, total
        eps = 0.0
        if norm is not None and _value(norm.weight).dtype == _value(x).dtype == _value(norm.x).dtype:
            x, norm_weight, eps = norm
        else:
            norm_weight = None
        with module.graph.inserting_before(last):
            folded = module.graph.call_function(
                torch.ops.graphattn.linear.default, (x, weight, bias, norm_weight, eps, gated, residual)
            )
        folded.meta = dict(last.meta)
        last.replace_all_uses_with(folded)
        count += 1
    module.graph.eliminate_dead_code()
    module.recompile()
    return count


def _value(node: Node) -> Tensor:
    return node.meta["example_value"]


def _alike(node: Node, other: Node) -> bool:
    return _value(node).shape == _value(other).shape and _value(node).dtype == _value(other).dtype


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
    if not _calls(mean.args[0], "pow", 2) or mean.args[0].args[0] is not wide or _value(weight).dim() != 1:
        return None
    return Norm(wide.args[0], weight, eps)


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
