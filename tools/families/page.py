"""The page of models, docs/models.md, written from the JSON files beside it; no result is typed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tools.benchmark.markdown import documents_of, table

from .measure import CAPTURED, KINDS
from .sweep import BY_ATTACH, NOT_BUILT, REFUSED, SERVED, VERDICTS, WRONG

FOLDER = "models"
INTRO = """# Models

Written by `python tools/models.py page` from the JSON files in [models](models). Every model here is tiny and random,
made from transformers' own classes; what is compared are logits, and what is right is transformers' eager attention.
Models are compared once more when you attach them (`graphattn.hf.attach`, `graphattn.LLM`): a few tokens, every layer.
"""


def write_page(path: Path) -> None:
    """Writes the page from the documents in the folder `models` beside it."""
    path.write_text(render(path.parent / FOLDER))


def render(folder: Path) -> str:
    """The page's text."""
    parts = [INTRO]
    for workload, title, documents in documents_of(folder, TITLES):
        parts.append(f"## {title}\n")
        for stem, document in documents.items():
            parts += [_origin(stem, document), BODIES[workload](document)]
    return "\n".join(parts)


def _origin(stem: str, document: dict) -> str:
    environment = document["environment"]
    names = {"torch": "torch", "transformers": "transformers", "flashinfer": "FlashInfer", "triton": "Triton"}
    names |= {"torchao": "torchao", "bitsandbytes": "bitsandbytes"}
    versions = [f"{title} {environment[name]}" for name, title in names.items() if environment.get(name)]
    return (
        f"{environment['device']}, {', '.join(versions)}; commit {str(environment['commit'])[:7]}; "
        f"[JSON]({FOLDER}/{stem}.json):\n\n```\n{environment['command']}\n```\n"
    )


def _families(document: dict) -> str:
    text = (
        f"In {document['dtype'].removeprefix('torch.')}: the root mean square error of logits, and in brackets how "
        "many times plain torch's in the same dtype that is, both against plain torch in a wider one. At most twice is "
        "allowed, of the root mean square and of the largest, and a rounding of the logits themselves. *Captured* is a "
        "replay of a CUDA graph; the same step as a plain call is *decode*.\n"
    )
    head = ["family", "`model_type`", *KINDS, "replays", "compiled graphs", "layers"]
    served, refused = [], []
    for row in document["rows"]:
        if row["refused"] is not None:
            refused.append([row["title"], f"`{row['kind']}`", row["refused"]])
            continue
        graphs = "-" if row["compiles"] is None else str(row["compiles"])
        layers = "; ".join(each.removeprefix("AttentionSpec") for each in row["layers"])
        shown = [kind for kind in KINDS if kind != CAPTURED or row["replays"]]
        figures = [_figure(row["errors"][kind]) if kind in shown else "-" for kind in KINDS]
        served.append([row["title"], f"`{row['kind']}`", *figures, str(row["replays"] or "-"), graphs, layers])
    parts = [text, table(head, served)]
    if refused:
        parts += ["Refused:\n", table(["family", "`model_type`", "reason"], refused)]
    return "\n".join(parts)


def _figure(errors: dict) -> str:
    ratio = errors["ours_rms"] / errors["plain_rms"] if errors["plain_rms"] else 0.0
    text = f"{errors['ours_rms'] / errors['logits_rms']:.1e} ({ratio:.2f})"
    return text if errors["is_right"] else f"**wrong**: {text}"


def _sweep(document: dict) -> str:
    rows = document["rows"]
    counts = Counter(row["verdict"] for row in rows)
    parts = [
        f"All {len(rows)} causal language models of transformers, each made tiny from the defaults of its config, in "
        f"float32: {', '.join(f'{counts[verdict]} {verdict}' for verdict in VERDICTS)}. *Wrong* would be logits that "
        f"differ by more than {document['allowed']:g} of their size, an error that is not graphattn's own, or no end.\n"
    ]
    for verdict, title in (
        (WRONG, "Wrong"),
        (SERVED, "Served, by `LLM` and by `attach`"),
        (BY_ATTACH, "Served by `attach` alone, since `LLM` packs requests into one row"),
        (REFUSED, "Refused"),
        (NOT_BUILT, "Not built: transformers makes no tiny model of the defaults, so nothing is known"),
    ):
        found = [row for row in rows if row["verdict"] == verdict]
        if not found:
            continue
        parts.append(f"### {title}\n")
        if verdict == SERVED:
            worst = max(row["error"] for row in found)
            parts.append(", ".join(f"`{row['kind']}`" for row in found) + f". The largest error is {worst:.1e}.\n")
        else:
            parts.append(table(["`model_type`", "reason"], [[f"`{row['kind']}`", row["reason"]] for row in found]))
    return "\n".join(parts)


def _quantised(document: dict) -> str:
    text = (
        "Linears with quantised weights are left to their own kernels: they are not merged with their siblings, and "
        "nothing is folded into them. `LLM` refuses to capture or compile a model whose quantiser says of itself that "
        "it is not compileable, bitsandbytes among them; `enforce_eager=True, compile=False` runs it. A GGUF file is "
        "dequantised where `LLM` is given its path; one whose blocks stay packed needs a kernel that transformers "
        "loads from its hub at run time, and so does fp8 in blocks. torchao's int8 activations run eagerly alone on "
        "CUDA: captured, torchao prints a tensor, and compiled, torch's int8 product takes no fewer than 17 rows.\n"
    )
    rows = [
        [row["name"], "not run", row["reason"], "-", "-"]
        if row["reason"] is not None
        else [row["name"], "run", row["linear"], _replays(row), f"{row['error']:.1e}"]
        for row in document["rows"]
    ]
    head = ["weights", "", "", "replays", "error of logits, of their size"]
    return "\n".join([text, table(head, rows)])


def _replays(row: dict) -> str:
    return "refused: run eager" if row["uncapturable"] else str(row["replays"] or "-")


TITLES = {"families": "Families", "quantised": "Quantised weights", "sweep": "Every model type of transformers"}
BODIES: dict[str, Callable[[dict], str]] = {"families": _families, "quantised": _quantised, "sweep": _sweep}
