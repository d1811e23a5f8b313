"""Loads a model and its tokenizer from a folder, a hub name or a GGUF file."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ModelFileError

GGUF_MAGIC = b"GGUF"
TOKENIZER_FILES = ("*token*", "vocab*", "merges*", "*.model", "*.tiktoken")
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "graphattn"


def load_model(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    with_tokenizer: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Loads a decoder in eval mode and its tokenizer; None for that where the folder has none.

    A GGUF file is dequantised and converted once into `~/.cache/graphattn`, then read from there.

    Args:
        source: a folder with `config.json`, a `.gguf` file, or a name on the hub.
        dtype: of the weights; None for what the file holds (a GGUF: float32 on the CPU, bfloat16 elsewhere).
        device: where the weights go.
        with_tokenizer: whether to load the tokenizer.

    Raises:
        ModelFileError: no model can be read there; says what was found.
    """
    path, device = Path(source), torch.device(device)
    if path.suffix == ".gguf":
        if dtype is None:
            dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        path = convert_gguf(path, dtype)
    elif path.exists() and not (path / "config.json").is_file():
        raise ModelFileError(f"{path} is neither a folder with config.json nor a .gguf file")
    elif not path.exists() and (path.is_absolute() or str(source).startswith(".")):
        raise ModelFileError(f"{path} does not exist: give a model folder, a .gguf file or a name on the hub")
    target = str(path) if path.exists() else str(source)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(target, dtype=dtype or "auto", output_loading_info=True)
        has_tokenizer = not path.is_dir() or any(list(path.glob(pattern)) for pattern in TOKENIZER_FILES)
        tokenizer = AutoTokenizer.from_pretrained(target) if with_tokenizer and has_tokenizer else None
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelFileError(f"{target} cannot be loaded: {type(error).__name__}: {error}") from error
    if missing := sorted(info["missing_keys"]):
        raise ModelFileError(
            f"{target} lacks {len(missing)} weights that its config asks for ({', '.join(missing[:3])}, ...), which "
            "would be random: the folder is incomplete, or its config.json is another model's"
        )
    return model.to(device).eval(), tokenizer


def convert_gguf(path: Path, dtype: torch.dtype) -> Path:
    """Converts a GGUF file to a safetensors folder in the cache, once per content and dtype; returns the folder.

    Raises:
        ModelFileError: the file is missing or not a GGUF that transformers can read.
    """
    if not path.is_file():
        raise ModelFileError(f"{path} does not exist: give the path of a GGUF file")
    with path.open("rb") as file:
        if file.read(4) != GGUF_MAGIC:
            raise ModelFileError(f"{path} is not a GGUF file: it does not start with the bytes 'GGUF'")
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    folder = CACHE / f"{path.stem}-{digest}-{str(dtype).removeprefix('torch.')}"
    if (folder / "config.json").is_file():
        return folder
    partial = folder.with_name(f"{folder.name}.{os.getpid()}")
    try:
        options = {"gguf_file": path.name, "dtype": dtype, "quantization_config": GgufConfig(dequantize=True)}
        model = AutoModelForCausalLM.from_pretrained(str(path.parent), **options)
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        end = model.generation_config.eos_token_id
        if isinstance(end, int):
            # transformers 5.17 reads the wrong end token from some GGUF vocabularies; the model's own is right.
            tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(end)
        partial.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if not (folder / "config.json").is_file():
            partial.rename(folder)
    except Exception as error:
        raise ModelFileError(f"{path} could not be converted from GGUF: {type(error).__name__}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def max_positions(model: PreTrainedModel) -> int | None:
    """The longest sequence that the model's positions were made for; None if its config does not say."""
    config = model.config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_sequence_length")
    found = next((getattr(config, name) for name in names if getattr(config, name, None)), None)
    rope = getattr(config, "rope_parameters", None) or {}
    if found is not None and rope.get("rope_type") == "dynamic":  # there it is the length from which they are scaled
        return int(found * rope["factor"])
    return found


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    """Ids that end a text: the model's generation config says, or else its config, or else the tokenizer."""
    sources = (model.generation_config, model.config.get_text_config(), tokenizer)
    ids = next((found for source in sources if (found := getattr(source, "eos_token_id", None)) is not None), ())
    return (ids,) if isinstance(ids, int) else tuple(ids)
