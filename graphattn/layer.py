"""The attention layer: packed queries, keys and values in, attention over the paged cache out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import ops  # noqa: F401  registers torch.ops.graphattn
from .cache import all_pages, first_page
from .errors import InvalidArgumentError
from .rope import Rotary
from .scales import checked_scale
from .spec import DTYPES, FP8, AttentionSpec
from .variants import Variant


class Attention(nn.Module):
    """Causal attention over a paged cache, one op whatever the backend; traceable by `torch.compile(fullgraph=True)`.

    The rows of a step and their pages come from the active plan (`DecodeRunner` and `LLM` set it), not from arguments,
    so a compiled or captured layer serves every step.

    Args:
        num_heads: query heads.
        head_dim: width of a head.
        scale: multiplies q.k before the softmax; None for `1/sqrt(head_dim)`.
        num_kv_heads: key and value heads; None for `num_heads`.
        window: latest keys a query sees, itself included; None for all.
        softcap: `softcap * tanh(logits / softcap)`; None for none.
        group: index of the layer group whose plan this layer runs under.
        rotary: how queries and keys are normed and rotated before they attend; None if they come as they are to be.
        pos_encoding: "rope_llama" to turn queries and keys while they attend, and cache keys that were not turned.
        rope_theta, rope_scale: of that.
        variant: what is computed beyond that; the layer keeps its tensors, each as `variant_NAME`: a parameter if it
            was one, else a buffer, which moves with the layer and keeps its dtype. Write into them in place.
        k_scale, v_scale: what a stored key or value of 1.0 stands for in an fp8 cache: a float, or `[num_kv_heads]`; 1
            where one is not given. None for both with a cache that is not fp8.

    Attributes:
        kv_scales: `[2, num_kv_heads]` float32, of keys and of values; None without an fp8 cache. Compiled and captured
            steps read it where it lies, so `set_scales` writes into it.

    Raises:
        InvalidArgumentError: heads that do not divide, a count below 1, more rotary frequencies than pairs, a variant
            for other heads, or scales of another shape or that are not positive and finite.

    Example:
        >>> layer = Attention(num_heads=8, head_dim=64, num_kv_heads=2)
        >>> layer.bind(*KVCache(1, layer.spec, CacheSpec(num_pages=64), "cpu").layers[0])
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        scale: float | None = None,
        num_kv_heads: int | None = None,
        *,
        window: int | None = None,
        softcap: float | None = None,
        group: int = 0,
        rotary: Rotary | None = None,
        pos_encoding: str = "none",
        rope_theta: float = 10000.0,
        rope_scale: float = 1.0,
        variant: Variant | None = None,
        k_scale: float | Tensor | None = None,
        v_scale: float | Tensor | None = None,
    ):
        super().__init__()
        self.spec = AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
            head_dim=head_dim,
            scale=scale,
            window=window,
            softcap=softcap,
            pos_encoding=pos_encoding,
            rope_theta=rope_theta,
            rope_scale=rope_scale,
            variant=variant,
        )
        self._told = self.spec.told  # here, since the compiler would trace how it is made
        if rotary is not None and pos_encoding != "none":
            raise InvalidArgumentError(f"rotary= and pos_encoding={pos_encoding!r} would turn twice: give one of them")
        if rotary is not None and (rotary.inv_freq.dim() not in (1, 2) or 2 * rotary.num_turned > head_dim):
            raise InvalidArgumentError(
                f"inv_freq is {tuple(rotary.inv_freq.shape)}: needed is [pairs] or [lengths, pairs], of the "
                f"{head_dim // 2} pairs of a head at most"
            )
        weights = (None, None) if rotary is None else (rotary.q_weight, rotary.k_weight)
        shapes = [None if weight is None else tuple(weight.shape) for weight in weights]
        if shapes not in ([None, None], [(head_dim,)] * 2):
            raise InvalidArgumentError(f"norm weights are {shapes}: needed are two of [{head_dim}], or none")
        self.group, self.rotary = group, rotary
        self.register_buffer("k_cache", torch.empty(0), persistent=False)
        self.register_buffer("v_cache", torch.empty(0), persistent=False)
        self._values = () if variant is None else tuple(f"variant_{name}" for name in variant.tensors)
        for name, tensor in zip(self._values, () if variant is None else variant.tensors.values(), strict=True):
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor, persistent=False)
        self.register_buffer("kv_scales", None, persistent=False)
        if k_scale is not None or v_scale is not None:
            self.set_scales(k_scale, v_scale)

    @torch.no_grad()
    def set_scales(self, k_scale: float | Tensor | None = None, v_scale: float | Tensor | None = None) -> None:
        """Changes scales of an fp8 cache in place; what it holds already was stored over the old ones.

        Args:
            k_scale, v_scale: as in the constructor; None leaves one as it is.

        Raises:
            InvalidArgumentError: another shape, or not positive and finite; nothing was changed.
        """
        heads, given = self.spec.num_kv_heads, (("k_scale", k_scale), ("v_scale", v_scale))
        checked = [None if scale is None else checked_scale(name, scale, heads) for name, scale in given]
        if self.kv_scales is None:
            with torch.inference_mode(False):
                self.kv_scales = torch.ones(2, heads, dtype=torch.float32, device=self.k_cache.device)
        for own_K, scale_K in zip(self.kv_scales, checked, strict=True):
            if scale_K is not None:
                own_K.copy_(scale_K)

    def bind(self, k_cache: Tensor, v_cache: Tensor) -> None:
        """Gives the layer its pages: `KVCache.layers[i]`, in the layout that the plans it runs under were made for.

        Raises:
            InvalidArgumentError: the heads or width differ from the layer's, or it has scales and they are not fp8.
        """
        heads, head_dim = self.spec.num_kv_heads, self.spec.head_dim
        for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
            if cache.dim() != 4 or heads not in cache.shape[1:3] or cache.shape[3] != head_dim:
                raise InvalidArgumentError(
                    f"{name} is {tuple(cache.shape)}: needed is [pages, page_size, {heads}, {head_dim}] (NHD) or "
                    f"[pages, {heads}, page_size, {head_dim}] (HND)"
                )
        if k_cache.shape != v_cache.shape:
            raise InvalidArgumentError(
                f"k_cache is {tuple(k_cache.shape)}, v_cache {tuple(v_cache.shape)}: make them equal"
            )
        if k_cache.stride() != v_cache.stride() or k_cache.stride(3) != 1:
            raise InvalidArgumentError(
                f"k_cache has strides {k_cache.stride()}, v_cache {v_cache.stride()}: make them equal, the last one 1"
            )
        if k_cache.dtype not in DTYPES or k_cache.device != v_cache.device:
            raise InvalidArgumentError(
                f"k_cache is {k_cache.dtype} on {k_cache.device}, v_cache on {v_cache.device}: one device holds both, "
                f"as one of {', '.join(map(str, DTYPES))}"
            )
        if k_cache.dtype != v_cache.dtype or (self.kv_scales is not None and k_cache.dtype != FP8):
            raise InvalidArgumentError(
                f"k_cache is {k_cache.dtype}, v_cache {v_cache.dtype}, the layer has "
                f"{'no' if self.kv_scales is None else 'fp8'} scales: both caches are alike, and scales for {FP8} alone"
            )
        self.k_cache, self.v_cache = first_page(k_cache), first_page(v_cache)
        if k_cache.dtype == FP8 and self.kv_scales is None:
            self.set_scales()

    def _apply(self, fn, recurse: bool = True) -> Attention:
        """What moves or casts a module moves all of its pages; torch would take the first for all there are."""
        pages = [all_pages(page) for page in (self.k_cache, self.v_cache) if page.dim() == 4]
        if pages and self.kv_scales is not None and fn(pages[0][:0]).dtype != FP8:
            raise InvalidArgumentError(f"a layer with a cache of {FP8} was cast: unbind it first, or only move it")
        kept = (*self._values, "kv_scales")
        buffers = {name: getattr(self, name) for name in kept if self._buffers.get(name) is not None}
        super()._apply(fn, recurse)
        if pages:
            self.bind(*map(fn, pages))
        for name, buffer in buffers.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:  # kernels are compiled for the dtype that is declared
                setattr(self, name, buffer.to(moved.device))
        return self

    def unbind(self) -> None:
        """Lets go of its pages."""
        self.k_cache, self.v_cache = (torch.empty(0, device=self.k_cache.device) for _ in "kv")

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Appends `k` and `v` to the cache and attends.

        Args:
            q: `[N, num_heads, head_dim]`, N tokens of all rows packed; rotated already where the model has RoPE and
                the layer no `rotary`.
            k: `[N, num_kv_heads, head_dim]`, likewise.
            v: `[N, num_kv_heads, head_dim]`.

        Returns:
            `[N, num_heads, head_dim]`.

        Raises:
            InvalidArgumentError: a shape or dtype does not fit.
            NoActivePlanError: called outside a planned step, or before `bind`.
        """
        spec = self.spec
        for name, tensor, heads in (("q", q, spec.num_heads), ("k", k, spec.num_kv_heads), ("v", v, spec.num_kv_heads)):
            if tensor.dim() != 3 or tensor.shape[1] != heads or tensor.shape[2] != spec.head_dim:
                raise InvalidArgumentError(
                    f"{name} is {tuple(tensor.shape)}: the layer takes [tokens, {heads}, {spec.head_dim}]"
                )
        if not q.shape[0] == k.shape[0] == v.shape[0]:
            raise InvalidArgumentError(f"q has {q.shape[0]} tokens, k {k.shape[0]}, v {v.shape[0]}: make them equal")
        tensors, rotary = (q, k, v, self.k_cache, self.v_cache), self.rotary
        turn = ()
        if rotary is not None:
            norms = (rotary.q_weight, rotary.k_weight, rotary.eps)
            turn = (rotary.inv_freq, rotary.scaling, *norms, rotary.threshold)
        options = {"scales": self.kv_scales, "layer": self._told}
        if spec.variant is not None:
            values = [getattr(self, name) for name in self._values]
            return torch.ops.graphattn.variant_attend(
                *tensors, self.group, spec.variant.digest, values, *turn, **options
            )
        if rotary is None:
            return torch.ops.graphattn.attend(*tensors, self.group, **options)
        return torch.ops.graphattn.rotary_attend(*tensors, self.group, *turn, **options)

    def extra_repr(self) -> str:
        return f"{self.spec}, group={self.group}"
