"""Pages in Markdown: tables, and the documents that they are written from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path


def documents_of(folder: Path, titles: Mapping[str, str]) -> Iterator[tuple[str, str, dict[str, dict]]]:
    """Each workload that a folder has JSON documents of, in the order of `titles`: its name, title and documents."""
    documents = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    for workload, title in titles.items():
        found = {stem: each for stem, each in documents.items() if each.get("workload", "capture") == workload}
        if found:
            yield workload, title, found


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table, and a line after it."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines) + "\n"
