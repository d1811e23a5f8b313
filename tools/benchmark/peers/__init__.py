"""Peers: other ways to run the same model, one per file; `peer.py` says what one is."""

from __future__ import annotations

from .continuous import TransformersContinuous
from .loop import FlashAttention, Sdpa
from .naive import Naive
from .nano_vllm import NanoVllm, NanoVllmOnGraphattn
from .peer import Peer
from .static import TransformersStatic
from .vllm import Vllm

PEERS: dict[str, type[Peer]] = {
    peer.name: peer
    for peer in (
        TransformersContinuous,
        TransformersStatic,
        Sdpa,
        FlashAttention,
        Naive,
        Vllm,
        NanoVllm,
        NanoVllmOnGraphattn,
    )
}
