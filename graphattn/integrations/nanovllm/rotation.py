"""Norm and rotation of queries and keys, taken over from a model whose own are found to be the same."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ...rope import Rotary

BASES = (1e6, 1e4)  # of frequencies, tried after the config's: nano-vLLM has 1e6 where it does not find that


class Passed(nn.Module):
    """Stands where a norm or a rotation stood."""

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """What it was given, positions left out."""
        return inputs[0] if len(inputs) == 1 else inputs[1:]


def take_over(model: nn.Module, attention: type[nn.Module], config) -> None:
    """Gives each attention layer the norm and rotation before it as its `rotary`, and puts `Passed` in their places.

    A module that has `attn`, `rotary_emb` and perhaps `q_norm` and `k_norm` has them tried on random queries and keys
    at positions up to the last. They are taken over if `Rotary` makes the same of those but for rounding; else the
    layer's `rotary` is None, and the model goes on doing it by itself.

    Args:
        model: nano-vLLM's, with its weights.
        attention: nano-vLLM's attention.
        config: the model's, of transformers.
    """
    for module in model.modules():
        if isinstance(module, attention):
            module.rotary = None
    for owner in list(model.modules()):
        if not isinstance(getattr(owner, "attn", None), attention) or not hasattr(owner, "rotary_emb"):
            continue
        candidates = _candidates(owner, config)
        owner.attn.rotary = next((each for each in candidates if _is_same(owner, each, config)), None)
        if owner.attn.rotary is not None:
            owner.rotary_emb = Passed()
            if owner.attn.rotary.q_weight is not None:
                owner.q_norm, owner.k_norm = Passed(), Passed()


def _norms(owner: nn.Module) -> list[nn.Module | None]:
    return [getattr(owner, name, None) for name in ("q_norm", "k_norm")]


def _candidates(owner: nn.Module, config) -> Iterator[Rotary]:
    norms, head_dim, device = _norms(owner), owner.attn.head_dim, next(owner.parameters()).device
    weights, eps = ([getattr(norm, name, None) for norm in norms] for name in ("weight", "eps"))
    if eps[0] != eps[1] or len({norm is None for norm in norms} | {weight is None for weight in weights}) != 1:
        return
    weights = [None if weight is None else weight.detach() for weight in weights]
    stated = (config, getattr(config, "rope_parameters", None) or {})
    bases = [getattr(stated[0], "rope_theta", None), stated[1].get("rope_theta"), *BASES]
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    for base in dict.fromkeys(filter(None, bases)):
        yield Rotary(1.0 / base**exponents, 1.0, *weights, eps[0] or 0.0)


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def _is_same(owner: nn.Module, rotary: Rotary, config) -> bool:
    """In float32, where scales show; angles are of float32 anyhow, and the less sure the farther a token is."""
    layer, device, generator = owner.attn, rotary.inv_freq.device, torch.Generator("cpu").manual_seed(0)
    last = config.max_position_embeddings - 1
    positions = torch.tensor([*(2**bit for bit in range(last.bit_length())), 0, last], device=device)
    heads = (layer.num_heads, layer.num_kv_heads)
    drawn = {"generator": generator, "dtype": torch.float32, "device": "cpu"}  # the default dtype is the model's
    q, k = (torch.randn(len(positions), count, layer.head_dim, **drawn).to(device) for count in heads)
    normed = [x.clone() if norm is None else norm(x.clone()) for x, norm in zip((q, k), _norms(owner), strict=True)]
    try:
        own = owner.rotary_emb(positions, *normed)
    except TypeError:
        return False  # it takes other arguments
    ours = rotary.rotate(q, k, positions)
    if [x.shape for x in own] != [x.shape for x in ours]:
        return False
    allowed_N = 1e-5 + 4 * torch.finfo(torch.float32).eps * positions.double()
    sizes = [(_size(mine - theirs), _size(theirs)) for mine, theirs in zip(ours, own, strict=True)]
    return all(bool((error_N <= allowed_N * size_N).all()) for error_N, size_N in sizes)


def _size(x_NHD: Tensor) -> Tensor:
    return x_NHD.double().flatten(1).norm(dim=1)
