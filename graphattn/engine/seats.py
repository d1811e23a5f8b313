"""Which row of a decode step is whose."""

from __future__ import annotations

from collections.abc import Sequence

from .request import Request


def seated(before: list[Request], requests: Sequence[Request]) -> list[Request]:
    """The requests in an order in which as few as possible have another place than before.

    Who stays keeps its place. Where one has left, a new one takes its place, or else the last of all moves there.

    Example:
        >>> seated(["a", "b", "c", "d"], ["a", "c", "d"]), seated(["a", "b"], ["b", "c", "d"])
        (['a', 'd', 'c'], ['c', 'b', 'd'])
    """
    staying, known = set(requests), set(before)
    if staying == known:
        return before
    new = (request for request in requests if request not in known)
    rows = [request if request in staying else next(new, None) for request in before]
    rows += new
    while None in rows:
        last = rows.pop()
        if last is not None:
            rows[rows.index(None)] = last
    return rows
