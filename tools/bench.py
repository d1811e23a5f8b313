"""Measures decoding as a user gets it, through `LLM`: the ceiling first, then correctness, then speed.

    python tools/bench.py --shape tools/shapes/qwen3-0.6b.json --batches 1,8,32 --context 1024
    python tools/bench.py --shape tools/shapes/qwen3-0.6b.json --workload nano

Prints a table, and one JSON document as the last line (and into `--json PATH`).
"""

from __future__ import annotations

import json
import platform
import random
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from graphattn import LLM, SamplingParams

SCHEMA_VERSION = 1
PREFILL_TOKENS = 8192  # prompt tokens a step, LLM's default
WARM_TOKENS = 16  # tokens of each row before timing starts
console = Console(highlight=False, stderr=True)


def random_model(shape: Path, dtype: torch.dtype, device: str):
    """A transformers decoder of the config in `shape`, with random weights; the same weights in every dtype."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = json.loads(shape.read_text())
    torch.manual_seed(0)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.to(dtype).eval()


def copy_rate(device: str) -> float:
    """Bytes per second of a large copy within the device, read and written bytes counted."""
    source = torch.empty(2**30 if device == "cuda" else 2**27, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    times = []
    for _ in range(12):
        _wait(device)
        started = time.perf_counter()
        target.copy_(source)
        _wait(device)
        times.append(time.perf_counter() - started)
    return 2 * source.nbytes / quantile(times[2:], 0.5)


def step_bytes(model, batch: int, context: int) -> int:
    """The fewest bytes a decode step reads: every weight once (of the embedding only rows), every row's keys and
    values once."""
    config = model.config.get_text_config()
    weights = sum(weight.nbytes for weight in model.parameters())
    if not config.tie_word_embeddings:
        weights -= model.get_input_embeddings().weight.nbytes
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * model.dtype.itemsize
    return weights + batch * context * token


def accuracy(shape: Path, dtype: torch.dtype, device: str, options: dict) -> dict:
    """Log-probabilities of drawn tokens against a float32 forward over the same tokens, plain torch's error beside."""
    generator = torch.Generator().manual_seed(1)
    lens = torch.randint(1, 200, (8,), generator=generator).tolist()
    model = random_model(shape, dtype, device)
    vocab = model.config.get_text_config().vocab_size
    prompts = [torch.randint(0, vocab, (length,), generator=generator).tolist() for length in lens]
    with LLM(model, max_batch=len(prompts), max_seq_len=256, **options) as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=48, logprobs=0, ignore_eos=True))
    exact = random_model(shape, torch.float32, device)
    errors: dict[str, list[float]] = {"ours": [], "plain": []}
    for output in outputs:
        ids = torch.tensor([[*output.prompt_token_ids, *output.token_ids]], device=device)
        drawn = torch.tensor(output.token_ids, device=device)[:, None]
        forced = []
        for each in (model, exact):
            with torch.no_grad():
                logits = each(ids).logits[0, len(output.prompt_token_ids) - 1 : -1].float()
            forced.append(logits.log_softmax(-1).gather(1, drawn)[:, 0].tolist())
        ours = [row[token] for row, token in zip(output.logprobs, output.token_ids, strict=True)]
        errors["ours"] += [abs(a - b) for a, b in zip(ours, forced[1], strict=True)]
        errors["plain"] += [abs(a - b) for a, b in zip(forced[0], forced[1], strict=True)]
    return {
        "what": f"log-probability of {len(errors['ours'])} drawn tokens against a float32 forward",
        **{
            f"{name}_{kind}": value
            for name, found in errors.items()
            for kind, value in (("rms", (sum(e * e for e in found) / len(found)) ** 0.5), ("max", max(found)))
        },
    }


def tokens_each(batch: int, context: int, tokens: int) -> int:
    """Tokens that let every request decode on while others are prefilled, and then through all timed steps."""
    return WARM_TOKENS + tokens + -(-batch * context // PREFILL_TOKENS) + 8


def decode(llm: LLM, batch: int, context: int, tokens: int) -> list[float]:
    """Seconds of `tokens` steps in which all of `batch` requests decode, each beyond its token `WARM_TOKENS`."""
    vocab = llm.model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(batch)
    params = SamplingParams(temperature=0, max_tokens=tokens_each(batch, context, tokens), ignore_eos=True)
    requests = [
        llm.add_request(torch.randint(0, vocab, (context,), generator=generator).tolist(), params) for _ in range(batch)
    ]
    counts: dict[int, int] = {}
    times = []
    while len(times) < tokens:
        started = time.perf_counter()
        deltas = llm.step()
        seconds = time.perf_counter() - started
        for delta in deltas:
            counts[delta.request_id] = counts.get(delta.request_id, 0) + len(delta.token_ids)
        if len(deltas) == batch and min(counts.values()) > WARM_TOKENS:
            times.append(seconds)
    for request_id in requests:
        llm.abort(request_id)
    llm.step()
    return times


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def environment(device: str, commit: str | None) -> dict:
    """What was measured on: device, driver, versions, commit and command."""
    found = {"command": " ".join(["python", *sys.argv]), "commit": commit or _git_commit()}
    found |= {"python": platform.python_version(), "torch": torch.__version__, "cpu": platform.processor()}
    for package in ("transformers", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    if device == "cuda":
        import flashinfer

        found["flashinfer"] = flashinfer.__version__
        found["device"], found["driver"] = torch.cuda.get_device_name(), _driver()
    else:
        found["device"] = f"CPU, {torch.get_num_threads()} threads"
    return found


def _driver() -> str | None:
    if find_spec("pynvml") is None:
        return None
    import pynvml

    pynvml.nvmlInit()
    return pynvml.nvmlSystemGetDriverVersion()


def _git_commit() -> str | None:
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def steps(llm: LLM, sizes: list[int], context: int, tokens: int, rate: float) -> list[dict]:
    """Time per decode step at each batch size, beside what its bytes take at the copy rate."""
    rows = []
    table = Table("batch", "step ms p20", "p50", "p80", "tokens/s", "bytes / copy rate, ms", "share of that rate")
    decode(llm, max(sizes), context, 1)
    for batch in sizes:
        times = decode(llm, batch, context, tokens)
        p20, p50, p80 = (quantile(times, share) * 1e3 for share in (0.2, 0.5, 0.8))
        floor = step_bytes(llm.model, batch, context + WARM_TOKENS + tokens // 2) / rate * 1e3
        rows.append(
            {
                "batch": batch,
                "context": context,
                "steps": len(times),
                "step_ms": {"p20": p20, "p50": p50, "p80": p80},
                "tokens_per_s": batch / p50 * 1e3,
                "floor_ms": floor,
            }
        )
        figures = (*(f"{value:.3f}" for value in (p20, p50, p80)), f"{batch / p50 * 1e3:.0f}", f"{floor:.3f}")
        table.add_row(str(batch), *figures, f"{floor / p50:.0%}")
    console.print(table)
    return rows


def mixed(llm: LLM, num_requests: int, longest: int) -> list[dict]:
    """Output tokens per second over requests of mixed lengths, drawn at temperature 0.6, all sent at once (the workload
    of nano-vLLM's bench: 256 requests, prompts and outputs of 100 to 1024 tokens, seed 0)."""
    shortest = min(100, longest)
    rng, vocab = random.Random(0), llm.model.config.get_text_config().vocab_size
    lens = (shortest, longest)
    prompts = [[rng.randint(0, min(10000, vocab - 1)) for _ in range(rng.randint(*lens))] for _ in range(num_requests)]
    params = [
        SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=rng.randint(*lens), seed=index)
        for index in range(num_requests)
    ]
    llm.generate(prompts[:8], SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=4))
    started = time.perf_counter()
    outputs = llm.generate(prompts, params)
    seconds = time.perf_counter() - started
    num_tokens = sum(len(output.token_ids) for output in outputs)
    console.print(f"{num_tokens} tokens in {seconds:.2f} s: {num_tokens / seconds:.0f} tokens/s")
    return [
        {
            "requests": num_requests,
            "prompt_tokens": sum(map(len, prompts)),
            "output_tokens": num_tokens,
            "seconds": seconds,
            "tokens_per_s": num_tokens / seconds,
        }
    ]


def main(
    workload: Annotated[str, typer.Option(help="decode: time per step. nano: tokens/s of mixed requests.")] = "decode",
    shape: Annotated[Path, typer.Option(help="Model config as JSON; weights are random.")] = Path(
        "tools/shapes/tiny.json"
    ),
    batches: Annotated[str, typer.Option(help="decode: batch sizes, with commas.")] = "1,4",
    context: Annotated[int, typer.Option(min=1, help="decode: prompt tokens of each request.")] = 64,
    tokens: Annotated[int, typer.Option(min=1, help="decode: timed steps.")] = 128,
    requests: Annotated[int, typer.Option(min=1, help="nano: how many.")] = 256,
    longest: Annotated[int, typer.Option(min=1, help="nano: tokens of a prompt, and of an answer, at most.")] = 1024,
    backend: Annotated[str, typer.Option(help="As LLM takes it.")] = "auto",
    compile: Annotated[bool | None, typer.Option(help="Compile the step; on CUDA by default.")] = None,
    enforce_eager: Annotated[bool, typer.Option(help="No CUDA graphs.")] = False,
    commit: Annotated[str | None, typer.Option(help="The commit, where there is no git to ask.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the document there too.")] = None,
) -> None:
    """Measures decoding through LLM, after its results were found right."""
    if workload not in ("decode", "nano"):
        raise typer.BadParameter(f"workload {workload!r}: choose decode or nano")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    sizes = [int(size) for size in batches.split(",")]
    options = {"backend": backend, "compile": "auto" if compile is None else compile, "enforce_eager": enforce_eager}
    rate = copy_rate(device)
    console.print(f"a copy within the device runs at {rate / 1e9:.0f} GB/s")
    checked = accuracy(shape, dtype, device, options)
    console.print(checked)
    if not checked["ours_rms"] <= 2 * checked["plain_rms"] + 1e-3:
        console.print("our error is more than twice plain torch's: not measuring a step that is wrong")
        raise typer.Exit(1)
    if workload == "decode":
        limit = context + tokens_each(max(sizes), context, tokens)
        options |= {"max_batch": max(sizes), "max_seq_len": limit, "buckets": sizes}
    else:
        options |= {"max_batch": min(256, requests), "max_seq_len": 2 * longest}
    model = random_model(shape, dtype, device)
    started = time.perf_counter()
    with LLM(model, max_prefill_tokens=PREFILL_TOKENS, prefix_cache=False, **options) as llm:
        start_seconds = time.perf_counter() - started
        if workload == "decode":
            rows = steps(llm, sizes, context, tokens, rate)
        else:
            rows = mixed(llm, requests, longest)
        explained, ledger = llm.explain(), llm.ledger().to_json()
    document = {
        "schema_version": SCHEMA_VERSION,
        "workload": workload,
        "environment": environment(device, commit),
        "model": {"shape": shape.stem, "dtype": str(dtype), "weights": "random"},
        "options": options,
        "copy_rate_gb_s": rate / 1e9,
        "accuracy": checked,
        "start_s": start_seconds,
        "rows": rows,
        "explain": explained.splitlines(),
        "ledger": ledger,
    }
    if json_path is not None:
        json_path.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    typer.run(main)
