"""How far the logits of a family are from transformers' eager attention, in prefill and in decode."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from graphattn import LLM, UnsupportedModelError
from graphattn.batch import ragged_batch

from .table import FAMILIES, build, eager, to_every_expert

PROMPTS = (1, 5, 16, 17, 40)  # tokens of each row before it decodes, a page of 16 more and less
DECODED = 6  # steps, in which a row grows into another page
WIDER = {torch.float32: torch.float64, torch.bfloat16: torch.float32, torch.float16: torch.float32}
FLOOR = 4  # units in the last place of the root mean square logit, and of the largest
CAPTURED = "captured decode"  # a plain call too where there are no graphs
KINDS = ("prefill", "decode", CAPTURED, "batch of 1")


class Figures:
    """Errors of ours and of plain torch's in the same dtype, both against plain torch in a wider one."""

    def __init__(self):
        self._ours: dict[str, list[Tensor]] = {}
        self._plain: dict[str, list[Tensor]] = {}
        self._exact: dict[str, list[Tensor]] = {}

    def add(self, kind: str, ours: Tensor, plain: Tensor, exact: Tensor) -> None:
        """Logits `[tokens, vocabulary]` of the same tokens."""
        for all_of, logits in ((self._ours, ours), (self._plain, plain), (self._exact, exact)):
            all_of.setdefault(kind, []).append(logits.detach().double().cpu())

    def of(self, kind: str, dtype: torch.dtype) -> dict:
        """Root mean square and largest error, of ours and of plain torch, the size of logits, and what is allowed."""
        exact = torch.cat(self._exact[kind])
        found = {"logits_rms": _rms(exact), "logits_max": exact.abs().max().item()}
        for name, all_of in (("ours", self._ours), ("plain", self._plain)):
            difference = torch.cat(all_of[kind]) - exact
            found |= {f"{name}_rms": _rms(difference), f"{name}_max": difference.abs().max().item()}
        eps = torch.finfo(dtype).eps
        for name in ("rms", "max"):
            found[f"allowed_{name}"] = 2 * found[f"plain_{name}"] + FLOOR * eps * found[f"logits_{name}"]
        found["is_right"] = all(found[f"ours_{name}"] <= found[f"allowed_{name}"] for name in ("rms", "max"))
        return found


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def measure(
    name: str,
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    compile: bool = False,
    seed: int = 0,
    backend: str = "auto",
) -> dict:
    """What is to be said of a family: refused and why, or the figures of each kind of step.

    Args:
        name: of `FAMILIES`.
        dtype: of weights and activations; plain torch is measured in it, and in the one above. In half types tokens
            go to all experts.
        device: "cpu" or "cuda"; only there a decode step is captured, elsewhere it is the plain call.
        compile: whether the step is compiled.
        seed: of weights and tokens.
        backend: as `LLM` takes it.
    """
    family = FAMILIES[name] if dtype.itemsize > 2 else to_every_expert(FAMILIES[name])
    model = build(family, dtype=dtype, device=device, seed=seed)
    plain, exact = eager(model, dtype), eager(model, WIDER[dtype])
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(2, 128, (length + DECODED,), generator=generator).tolist() for length in PROMPTS]
    right = {each: [logits_of(each, row) for row in rows] for each in (plain, exact)}
    figures, said = Figures(), {"title": family.title, "kind": family.kind, "dtype": str(dtype)}
    options = {"max_batch": len(rows), "max_seq_len": 64, "num_pages": 40, "compile": compile, "backend": backend}
    try:
        llm = LLM(model, **options)
    except UnsupportedModelError as error:
        return said | {"refused": str(error)}
    with llm:
        for kind, row, columns, ours in steps(llm, rows):
            figures.add(kind, ours, *(right[each][row][columns] for each in (plain, exact)))
        runner, binding = llm._executor.runner, llm._executor.binding
        said |= {
            "refused": None,
            "layers": [str(spec) for spec in binding.groups],
            "backend": llm._executor.planner.backends[0].name,
            "compiles": llm._executor.step.num_compiles if compile else None,
            "replays": runner.counts["replay"],
            "errors": {kind: figures.of(kind, dtype) for kind in KINDS},
        }
    return said


@torch.no_grad()
def logits_of(model: PreTrainedModel, row: Sequence[int]) -> Tensor:
    """Logits of a row's tokens, `[tokens, vocabulary]`."""
    ids = torch.tensor([row], device=model.device)
    return model(input_ids=ids, use_cache=False).logits[0]


def steps(llm: LLM, rows: list[list[int]]) -> Iterator[tuple[str, int, slice, Tensor]]:
    """Runs rows of `PROMPTS` and `DECODED` tokens; for each step and row of it: the kind of step, the row, which of its
    tokens, and their logits `[tokens, vocabulary]`."""
    executor, size, everyone = llm._executor, llm.pools.page_size, range(len(rows))
    for pages in chain.from_iterable(pair for cache in executor.caches for pair in cache.layers):
        pages.fill_(float("nan"))
    held = [llm.pools.row() for _ in rows]

    def tables(chosen: Sequence[int]) -> list[list[list[int]]]:
        """By layer group."""
        return [list(group) for group in zip(*(held[row].pages for row in chosen), strict=True)]

    for first in (slice(0, 3), slice(3, 40)):  # in two chunks, the second over what the first has cached
        chosen = [row for row in everyone if PROMPTS[row] > first.start]
        starts, ends = [first.start for _ in chosen], [min(PROMPTS[row], first.stop) for row in chosen]
        for row, end in zip(chosen, ends, strict=True):
            held[row].grow(end)
        tokens = [rows[row][start:end] for row, start, end in zip(chosen, starts, ends, strict=True)]
        batch = ragged_batch(tokens, starts, tables(chosen), page_size=size, device=executor.device)
        logits = executor.logits(batch, torch.arange(len(batch.token_ids_N), device="cpu"))
        for row, start, part in zip(chosen, starts, logits.split([len(each) for each in tokens]), strict=True):
            yield "prefill", row, slice(start, start + len(part)), part
        for row, end in zip(chosen, ends, strict=True):
            held[row].commit(rows[row][:end])
    executor.draw_greedily(len(rows))
    for step in range(DECODED):
        lens = [length + step + 1 for length in PROMPTS]
        for each, length in zip(held, lens, strict=True):
            each.grow(length)
        alone = step % len(rows)
        chosen = [row for row in everyone if step % 2 == 0 or row != alone]  # a whole bucket, and one that is padded
        for kind, of_kind, is_eager in (
            ("decode", chosen, True),
            (CAPTURED, chosen, False),
            ("batch of 1", [alone], False),
        ):
            fed = [rows[row][lens[row] - 1] for row in of_kind]
            sizes = [lens[row] for row in of_kind]
            with torch.no_grad():
                logits, _ = executor.runner.run(fed, sizes, tables(of_kind), eager=is_eager)
            for row, part in zip(of_kind, logits.clone(), strict=True):
                yield kind, row, slice(lens[row] - 1, lens[row]), part[None]
        for each, row, length in zip(held, rows, lens, strict=True):
            each.commit(row[:length])
    for each in held:
        each.release()


def shows(name: str, change: Callable[[nn.Module, dict], None], *, seed: int = 0) -> float:
    """How much of its logits a family's attention moves where its arguments are changed, as a share of their size.

    Args:
        name: of `FAMILIES`.
        change: called with each attention module and its arguments, `query`, `key`, `value`, `attention_mask` and
            more; changes them in place.
    """
    model = build(FAMILIES[name], dtype=torch.float32, seed=seed)
    row = torch.randint(2, 128, (max(PROMPTS),), generator=torch.Generator().manual_seed(seed)).tolist()
    plain = eager(model, torch.float32)
    right = logits_of(plain, row)

    def attention(module, query, key, value, mask, **arguments):
        given = {"query": query, "key": key, "value": value, "attention_mask": mask, **arguments}
        change(module, given)
        return inspect.unwrap(type(module).forward).__globals__["eager_attention_forward"](module, **given)

    AttentionInterface.register("graphattn_changed", attention)
    AttentionMaskInterface.register("graphattn_changed", eager_mask)
    plain.set_attn_implementation("graphattn_changed")
    return _rms(logits_of(plain, row) - right) / _rms(right)
