"""The random model as a folder, for engines that load their own."""

from __future__ import annotations

import gc
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from .peer import Setting


def save_model(setting: Setting, *, with_tokenizer: bool) -> TemporaryDirectory:
    """Weights and config; with a tokenizer of one word per id if the engine insists on one."""
    folder = TemporaryDirectory(prefix="graphattn-bench-")
    model = setting.model()
    model.save_pretrained(folder.name)
    if with_tokenizer:
        _save_tokenizer(Path(folder.name), model.config.get_text_config().vocab_size)
    del model
    gc.collect()
    if setting.device == "cuda":
        torch.cuda.empty_cache()
    return folder


def _save_tokenizer(folder: Path, vocab_size: int) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f"<{token_id}>": token_id for token_id in range(vocab_size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<0>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<0>", unk_token="<0>").save_pretrained(folder)
