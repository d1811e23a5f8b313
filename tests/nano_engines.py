"""nano-vLLM's engines for the tests: the package where it can be imported, or the minimal one, behind one interface."""

from __future__ import annotations

import atexit
import importlib
import inspect
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import nano_cpu
import nano_minimal
import pytest
import torch
from tiny import tiny

COLD = 1e-5  # nano-vLLM refuses temperature 0; this draws the most likely token
NEEDED = ("nanovllm", "xxhash", "tqdm")


def why_no_package() -> str | None:
    """Why nano-vLLM cannot run here; None if it can."""
    lacking = [name for name in NEEDED if find_spec(name) is None]
    if not lacking:
        return None
    return (
        f"needs {', '.join(lacking)}: put the unpacked wheel of nano-vllm-fork, or nano-vLLM, and xxhash on PYTHONPATH"
    )


needs_package = pytest.mark.skipif(why_no_package() is not None, reason=str(why_no_package()))


def forget() -> None:
    """Has the next import of nano-vLLM begin anew."""
    for name in [name for name in sys.modules if name == "nanovllm" or name.startswith("nanovllm.")]:
        del sys.modules[name]


class Minimal:
    """Engines of `nano_minimal`, in float64."""

    chunks, is_package = True, False

    def __init__(self, monkeypatch):
        sys.modules.update(nano_minimal.modules())
        stand_in = nano_cpu.flash_attn()
        stand_in.attend = nano_cpu.attend
        monkeypatch.setitem(sys.modules, "flash_attn", stand_in)
        torch.manual_seed(0)
        self._state = nano_minimal.Model().state_dict()

    def engine(self, *, blocks: int = 24, **options):
        model = nano_minimal.Model()
        model.load_state_dict(self._state)
        options = {"max_num_seqs": 16, "num_kvcache_blocks": blocks} | options
        return sys.modules["nanovllm"].LLM(model.double().eval(), **options)

    def generate(self, engine, prompts: list[list[int]], counts: list[int]) -> list[list[int]]:
        return engine.generate(prompts, counts)


class Package:
    """Engines of nano-vLLM as it is installed, over a tiny random Qwen 3 in a folder."""

    is_package = True

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32, **config):
        self.folder = str(folder)
        self.config = config = {"max_position_embeddings": 1024, "attention_bias": False} | config
        self.reference = tiny("qwen3", dtype=torch.float32, **config)
        tiny("qwen3", dtype=dtype, **config).save_pretrained(folder)
        save_tokenizer(folder)

    @property
    def chunks(self) -> bool:
        """Whether this version computes prompts in parts."""
        sequence = importlib.import_module("nanovllm.engine.sequence").Sequence
        return "num_scheduled_tokens" in sequence.__init__.__code__.co_names

    def engine(self, *, blocks: int = 24, **options):
        self._adapt()
        sizes = {"max_num_batched_tokens": 1024, "max_num_seqs": 16, "max_model_len": 1024}
        if not torch.cuda.is_initialized():  # what `nano_cpu.Cuda` counts
            block_bytes = 2 * 2 * 256 * 2 * 16 * 4
            sizes["gpu_memory_utilization"] = (blocks + 0.5) * block_bytes / torch.cuda.mem_get_info()[1]
        engine = sys.modules["nanovllm"].LLM(self.folder, **sizes | options)
        atexit.unregister(engine.exit)
        return engine

    def generate(self, engine, prompts: list[list[int]], counts: list[int]) -> list[list[int]]:
        params = sys.modules["nanovllm"].SamplingParams
        asked = [params(temperature=COLD, max_tokens=count, ignore_eos=True) for count in counts]
        return [output["token_ids"] for output in engine.generate(prompts, asked, use_tqdm=False)]

    def _adapt(self) -> None:
        """Versions for transformers 4 do not know that 5 has every rope type in a dict."""
        importlib.import_module("nanovllm")
        get_rope = importlib.import_module("nanovllm.models.qwen3").get_rope
        if "rope_scaling" in inspect.signature(get_rope).parameters:
            from transformers import AutoConfig

            def from_pretrained(path):
                config = AutoConfig.from_pretrained(path)
                config.rope_theta, config.rope_scaling = config.rope_parameters["rope_theta"], None
                return config

            sys.modules["nanovllm.config"].AutoConfig = SimpleNamespace(from_pretrained=from_pretrained)


def save_tokenizer(folder: Path, vocab: int = 128) -> None:
    """One word per id: engines insist on a tokenizer."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f"<{token_id}>": token_id for token_id in range(vocab)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<0>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<0>", unk_token="<0>").save_pretrained(folder)


class Forced:
    """Has an engine continue texts as they are written, and keeps the logits it had.

    Attributes:
        logits: by text and place in it, of the token after that place; float32 on the CPU.
    """

    def __init__(self, engine, texts: list[list[int]]):
        self._texts, self._runner, self._rows = texts, engine.model_runner, []
        self._run, self.logits = self._runner.run, {}
        self._runner.run, self._runner.sampler = self._told, self._draw

    def _told(self, seqs, is_prefill):
        self._rows = seqs
        return self._run(seqs, is_prefill)

    def _draw(self, logits, *arguments, **options):
        drawn = []
        for seq, logits_V in zip(self._rows, logits, strict=True):
            text = next(index for index, text in enumerate(self._texts) if text[: len(seq)] == self._tokens(seq))
            self.logits[text, len(seq) - 1] = logits_V.float().cpu()
            drawn.append(self._texts[text][len(seq)])
        return torch.tensor(drawn, device=logits.device)

    @staticmethod
    def _tokens(seq) -> list[int]:
        return list(seq.token_ids)


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(1, 60, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def requests(seed: int = 0, lens=(5, 300, 250, 513, 600, 17, 1, 600, 255, 257)) -> tuple[list[list[int]], list[int]]:
    """Prompts of which some begin alike, and how many tokens are to follow each; ends around those of blocks."""
    prompts = [tokens(length, seed if length > 255 else seed + length) for length in lens]
    return prompts, [3 + 7 * index % 13 for index in range(len(lens))]


def answers(nano, asked=None, **options) -> list[list[int]]:
    engine = nano.engine(**options)
    try:
        return nano.generate(engine, *(asked or requests()))
    finally:
        engine.exit()
