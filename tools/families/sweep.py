"""Every causal language model of transformers, tiny and random: served, refused with the reason, or wrong.

Each is tried in a child process, whose time is limited.
"""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection

import torch
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from graphattn import LLM, BackendError, UnsupportedModelError
from graphattn.hf import attach

from .measure import DECODED, PROMPTS, logits_of, steps
from .shrink import NotBuilt, first_line, tiny
from .table import eager

SERVED, BY_ATTACH, REFUSED, WRONG, NOT_BUILT = "served", "by attach alone", "refused", "wrong", "not built"
VERDICTS = (SERVED, BY_ATTACH, REFUSED, WRONG, NOT_BUILT)
ALLOWED = 1e-3  # largest error of a logit in float32, as a share of the root mean square logit
SECONDS = 120.0


@dataclass(frozen=True)
class Verdict:
    """What became of one entry.

    Attributes:
        kind: its `model_type`.
        verdict: one of `VERDICTS`. "wrong" is whatever is neither right nor refused by an error of graphattn's own.
        reason: why it is not served, or not by `LLM`; or what is wrong.
        error: largest error of a logit, as a share of the root mean square logit; None if none was computed.
    """

    kind: str
    verdict: str
    reason: str | None = None
    error: float | None = None


def entries() -> list[str]:
    """The model types that transformers has a causal language model of."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def sweep(kinds: Sequence[str], seconds: float = SECONDS) -> Iterator[Verdict]:
    """The verdict of each model type, in a process of its own."""
    context = multiprocessing.get_context("fork")  # transformers takes seconds to import
    for kind in kinds:
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_tried, args=(kind, theirs))
        child.start()
        theirs.close()
        try:
            yield Verdict(**ours.recv()) if ours.poll(seconds) else Verdict(kind, WRONG, f"not done in {seconds:g} s")
        except EOFError:
            child.join()
            yield Verdict(kind, WRONG, f"its process ended with {child.exitcode}")
        finally:
            child.kill()
            child.join()


def _tried(kind: str, out: Connection) -> None:
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    out.send(asdict(judge(kind)))


def judge(kind: str) -> Verdict:
    """Tries one model type in `LLM`, and in `attach` if that refuses it."""
    try:
        model = tiny(kind)
    except NotBuilt as error:
        return Verdict(kind, NOT_BUILT, str(error))
    reason, plain = None, eager(model, torch.float32)
    for verdict, compare in ((SERVED, _in_llm), (BY_ATTACH, _attached)):
        try:
            error = compare(model, plain)
        except (UnsupportedModelError, BackendError) as refusal:
            reason = reason or first_line(refusal)
            continue
        except Exception as failure:
            return Verdict(kind, WRONG, f"{type(failure).__name__}: {first_line(failure)}")
        if not error <= ALLOWED:
            return Verdict(kind, WRONG, f"logits differ ({verdict})", error)
        return Verdict(kind, verdict, reason, error)
    return Verdict(kind, REFUSED, reason)


def _rows() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, 128, (length + DECODED,), generator=generator).tolist() for length in PROMPTS]


def _in_llm(model: PreTrainedModel, plain: PreTrainedModel) -> float:
    rows = _rows()
    with LLM(model, max_batch=len(rows), max_seq_len=64, num_pages=40) as llm:
        right = [logits_of(plain, row) for row in rows]
        scale = torch.cat(right).square().mean().sqrt()
        errors = [(ours - right[row][columns]).abs().max() / scale for _, row, columns, ours in steps(llm, rows)]
    return torch.stack(errors).max().item()


@torch.no_grad()
def _attached(model: PreTrainedModel, plain: PreTrainedModel) -> float:
    """All rows in one batch, padded on the left, and then token by token; transformers is given the same."""
    rows, longest = _rows(), max(PROMPTS)
    with attach(model):
        mask = torch.tensor([[0] * (longest - length) + [1] * length for length in PROMPTS])
        ids = torch.tensor([[0] * (longest - n) + row[:n] for n, row in zip(PROMPTS, rows, strict=True)])
        caches, errors, right = {model: None, plain: None}, [], []
        for step in range(DECODED):
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            options = {"attention_mask": mask, "position_ids": positions, "use_cache": True}
            found = {}
            for each, past in caches.items():
                out = each(input_ids=ids, past_key_values=past, **options)
                found[each], caches[each] = out.logits[mask[:, -ids.shape[1] :].bool()], out.past_key_values
            right.append(found[plain])
            errors.append((found[model] - found[plain]).abs().max())
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
            ids = torch.tensor([[row[length + step]] for length, row in zip(PROMPTS, rows, strict=True)])
    return (torch.stack(errors).max() / torch.cat(right).square().mean().sqrt()).item()
