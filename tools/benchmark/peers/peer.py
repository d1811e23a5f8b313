"""What a peer is: another way to run the same model on the same prompts, in a process of its own."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from ..rows import WARM_TOKENS
from ..shape import random_model
from ..timing import Timed


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What every peer is made for.

    Attributes:
        shape: path of the model's config.
        device: "cuda" or "cpu".
        max_batch: rows of its largest batch.
        max_len: tokens of its longest request, prompt and generated.
        compile: compile where the peer can; None for what its authors advise on this device.
    """

    shape: str
    device: str
    max_batch: int
    max_len: int
    compile: bool | None = None

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    def model(self, attention: str | None = None):
        """The random model, the same for all; `attention` as in `random_model`."""
        return random_model(Path(self.shape), self.dtype, self.device, attention)


class Peer:
    """One peer.

    Args:
        setting: what it is made for.

    Attributes:
        name: as `--against` takes it.
        packages: whose versions are recorded.
        even_rows_only: whether it needs prompts of one length.
        serves: whether it has `serve`, which takes requests that need not begin together.
        attention_path: what computes its attention, known once it ran.
    """

    name: str
    packages: tuple[str, ...] = ("transformers",)
    even_rows_only = False
    serves = False

    def __init__(self, setting: Setting):
        self.setting, self.attention_path = setting, None

    @classmethod
    def reason(cls, setting: Setting) -> str | None:
        """Why it cannot run here; None if it can. Imports nothing heavy to say so."""
        return None

    def steps(self, prompts: list[list[int]], tokens: int) -> Timed:
        """Times `tokens` greedy decode steps of all rows, each beyond its token `WARM_TOKENS`; a step ends when its
        tokens are on the host."""
        raise NotImplementedError(f"{self.name} times no decode steps")

    def serve(self, prompts: list[list[int]], counts: list[int], temperature: float) -> tuple[int, float]:
        """Generates `counts[i]` tokens for each prompt, all sent at once; returns how many came, and seconds."""
        raise NotImplementedError(f"{self.name} serves no queue of requests")

    def close(self) -> None:
        """Gives back what it holds."""


def missing(*modules: str) -> str | None:
    """ "not installed", unless one of the modules can be imported."""
    return None if any(find_spec(module) is not None for module in modules) else "not installed"


def timed_part(seconds: list[float], token_ids: list[int], tokens: int) -> Timed:
    """Of the steps behind a prefill, which gave each row its first token, those beyond token `WARM_TOKENS`."""
    return Timed(seconds=seconds[WARM_TOKENS - 1 : WARM_TOKENS - 1 + tokens], token_ids=token_ids)
