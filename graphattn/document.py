"""Files of versioned JSON: written whole, and read with an error for whatever is not as it was written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import InvalidArgumentError


def write_document(path: str | Path, schema_version: int, fields: dict[str, Any]) -> None:
    """Writes the fields as one JSON object, the version in front."""
    Path(path).write_text(json.dumps({"schema_version": schema_version, **fields}) + "\n")


def may_be_written(path: str | Path) -> bool:
    """Whether its folder is there, and it is none itself."""
    return Path(path).absolute().parent.is_dir() and not Path(path).is_dir()


def read_document(path: str | Path, what: str, schema_version: int, fields: Sequence[str]) -> dict[str, Any]:
    """The fields of a file that `write_document` wrote.

    Args:
        path: the file.
        what: what it should be, for the errors ("a capture profile").
        schema_version: the only one that is read.
        fields: names that must be there; others are left out.

    Raises:
        InvalidArgumentError: no such file, not a JSON object, another schema version, or a field is missing.
    """
    try:
        document = json.loads(Path(path).read_text())
    except OSError as error:
        raise InvalidArgumentError(f"{path} cannot be read as {what}: {error.strerror}") from error
    except ValueError as error:
        raise InvalidArgumentError(f"{path} is not JSON ({error}): give {what}") from error
    if not isinstance(document, dict):
        raise InvalidArgumentError(f"{path} holds a JSON {type(document).__name__}, not an object: give {what}")
    found = document.get("schema_version")
    if found != schema_version:
        raise InvalidArgumentError(
            f"{path} has schema_version {found!r}, this version of graphattn reads {schema_version} of {what}: write "
            "the file anew with this version"
        )
    missing = [name for name in fields if name not in document]
    if missing:
        raise InvalidArgumentError(f"{path} lacks {', '.join(missing)}: it is not {what}, or was cut; write it anew")
    return {name: document[name] for name in fields}
