"""What nano-vLLM must look like for its parts to be replaced."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from types import CodeType, ModuleType

from ...errors import GraphattnError

RUNNER, BLOCKS, SEQUENCE = "engine.model_runner", "engine.block_manager", "engine.sequence"
ENGINE, ATTENTION, CONTEXT = "engine.llm_engine", "layers.attention", "utils.context"

# Module, then what it has to have: a function, its parameters, and names it uses in the order of their first use.
FUNCTIONS: dict[str, tuple[tuple[str, str, str], ...]] = {
    ATTENTION: (
        ("Attention.__init__", "self num_heads head_dim scale num_kv_heads", "num_heads head_dim scale num_kv_heads"),
        ("Attention.forward", "self q k v", ""),
    ),
    RUNNER: (
        ("ModelRunner.__init__", "self config rank event", "warmup_model allocate_kv_cache capture_cudagraph"),
        ("ModelRunner.call", "self method_name", ""),
        ("ModelRunner.exit", "self", "graphs graph_pool"),
        ("ModelRunner.warmup_model", "self", "run"),
        ("ModelRunner.allocate_kv_cache", "self", "num_kvcache_blocks kv_cache k_cache v_cache"),
        ("ModelRunner.capture_cudagraph", "self", "graph_bs graphs graph_pool"),
        ("ModelRunner.prepare_prefill", "self seqs", "num_cached_tokens block_table"),
        ("ModelRunner.prepare_decode", "self seqs", "last_token block_table"),
        ("ModelRunner.run_model", "self input_ids positions is_prefill", "compute_logits model"),
        ("ModelRunner.run", "self seqs is_prefill", "prepare_prefill prepare_decode run_model reset_context"),
    ),
    BLOCKS: (("BlockManager.__init__", "self num_blocks block_size", "free_block_ids"),),
    SEQUENCE: (
        (
            "Sequence.__init__",
            "self token_ids sampling_params",
            "last_token num_cached_tokens num_prompt_tokens block_table",
        ),
        ("Sequence.__len__", "self", ""),
        ("Sequence.__getitem__", "self key", ""),
    ),
    CONTEXT: (("set_context", "is_prefill cu_seqlens_q", ""), ("reset_context", "", "")),
    ENGINE: (("LLMEngine.__init__", "self model kwargs", "ModelRunner"),),
}


class LayoutError(GraphattnError, RuntimeError):
    """nano-vLLM is not laid out as the versions that were read are; says what differs."""


@dataclass(frozen=True)
class Modules:
    """The modules of nano-vLLM whose parts are replaced or called."""

    runner: ModuleType
    blocks: ModuleType
    sequence: ModuleType
    attention: ModuleType
    context: ModuleType
    engine: ModuleType


def load() -> Modules:
    """Imports nano-vLLM, and reads whether it is laid out as is known.

    Raises:
        ModuleNotFoundError: it is not installed, or something that it imports.
        LayoutError: a function is not there, takes other parameters or does not use what it should.
    """
    package = importlib.import_module("nanovllm")
    modules, problems = {}, []
    for name, functions in FUNCTIONS.items():
        try:
            modules[name] = importlib.import_module(f"nanovllm.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"nanovllm.{name}":
                raise
            problems.append(f"there is no nanovllm.{name}")
            continue
        problems += [
            f"nanovllm.{name}.{path}: {problem}"
            for path, parameters, uses in functions
            if (problem := _difference(modules[name], path, parameters.split(), uses.split()))
        ]
    if problems:
        raise LayoutError(
            f"nano-vLLM at {getattr(package, '__file__', package)} is not laid out as is known (its head of April 2026 "
            "and nano-vllm-fork 20260210 are):\n  " + "\n  ".join(problems)
        )
    names = (RUNNER, BLOCKS, SEQUENCE, ATTENTION, CONTEXT, ENGINE)
    return Modules(*(modules[name] for name in names))


def names_of(code: CodeType) -> list[str]:
    """Names that a function uses, in the order of their first use; those of comprehensions in it last."""
    inner = (name for each in code.co_consts if isinstance(each, CodeType) for name in names_of(each))
    return [*dict.fromkeys([*code.co_names, *inner])]


def _difference(module: ModuleType, path: str, parameters: list[str], uses: list[str]) -> str | None:
    """What is wrong with a function; None if nothing is. More parameters than are needed may follow."""
    found = module
    for name in path.split("."):
        found = vars(found).get(name)
        if found is None:
            return "it is not there"
    code = getattr(inspect.unwrap(found), "__code__", None)
    if code is None:
        return f"it is {found!r}, and no function"
    count = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    taken = list(code.co_varnames[:count])
    if taken[: len(parameters)] != parameters:
        return f"it takes ({', '.join(taken)}), known is ({', '.join(parameters)})"
    if path.startswith("ModelRunner.") and len(taken) != len(parameters):
        return f"it takes ({', '.join(taken)}), known is ({', '.join(parameters)})"
    used = [name for name in names_of(code) if name in uses]
    if set(used) != set(uses):
        return f"it does not use {', '.join(name for name in uses if name not in used)}"
    if path == "ModelRunner.__init__" and used != uses:
        return f"it calls {', '.join(used)} in this order, known is {', '.join(uses)}"
    return None
