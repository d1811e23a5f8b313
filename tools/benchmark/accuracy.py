"""Whether what will be measured is right."""

from __future__ import annotations

from pathlib import Path

import torch

from graphattn import LLM, SamplingParams

from .shape import random_model


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
            for kind, value in (("rms", rms(found)), ("max", max(found)))
        },
    }


def rms(errors: list[float]) -> float:
    return (sum(error * error for error in errors) / len(errors)) ** 0.5


def is_wrong(checked: dict, floor: float = 1e-3) -> bool:
    """Whether our error is more than twice plain torch's in the same dtype, and a floor."""
    return not checked["ours_rms"] <= 2 * checked["plain_rms"] + floor
