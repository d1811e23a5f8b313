"""How many decode steps ran with how many rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .document import read_document, write_document
from .errors import InvalidArgumentError

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Decode steps by their number of rows, as `LLM(record_batches=PATH)` writes them.

    Attributes:
        max_batch: the most rows a step could have had.
        steps: `steps[rows]`, how many steps had so many rows; by rows, those that never ran left out.

    Raises:
        InvalidArgumentError: rows outside 1 to `max_batch`, or a number of steps that is no count.

    Example:
        >>> Traffic(max_batch=8, steps={3: 120, 1: 40}).num_steps
        160
    """

    max_batch: int
    steps: Mapping[int, int]

    def __post_init__(self):
        if not _is_count(self.max_batch) or self.max_batch < 1:
            raise InvalidArgumentError(f"max_batch={self.max_batch!r}: it must be an int, at least 1")
        for rows, count in self.steps.items():
            if not _is_count(rows) or not 1 <= rows <= self.max_batch:
                raise InvalidArgumentError(
                    f"{count} steps of {rows!r} rows: rows go from 1 to max_batch={self.max_batch}; give the "
                    "max_batch that the steps ran under"
                )
            if not _is_count(count):
                raise InvalidArgumentError(f"{count!r} steps of {rows} rows: give an int, 0 or more")
        steps = {rows: count for rows, count in sorted(self.steps.items()) if count}
        object.__setattr__(self, "steps", steps)

    @property
    def num_steps(self) -> int:
        return sum(self.steps.values())

    def save(self, path: str | Path) -> None:
        """Writes it as JSON: `{"schema_version": 1, "max_batch": 8, "steps": {"3": 120, ...}}`."""
        write_document(path, SCHEMA_VERSION, {"max_batch": self.max_batch, "steps": self.steps})

    @classmethod
    def load(cls, path: str | Path) -> Traffic:
        """What `save` wrote.

        Raises:
            InvalidArgumentError: no such file, not JSON, another schema version, or what no traffic is.
        """
        fields = read_document(path, "recorded batches", SCHEMA_VERSION, ("max_batch", "steps"))
        steps = fields["steps"]
        if not isinstance(steps, dict) or not all(rows.isdecimal() for rows in steps):
            raise InvalidArgumentError(f'{path} has steps {steps!r}: they must be like {{"3": 120}}, rows to steps')
        try:
            return cls(max_batch=fields["max_batch"], steps={int(rows): count for rows, count in steps.items()})
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"{path}: {error}") from error


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
