"""The pages of a request of whose tokens the next one sees only the latest. Host integers only, no torch."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import InvalidArgumentError
from .pages import NULL_PAGE, BlockTable, PagePool


class WindowTable(BlockTable):
    """A block table that gives back the pages that no later token sees; the null page takes their places.

    A token sees `window` tokens, itself included. So pages stay where they were, and kernels find token i as ever;
    whoever reads them must begin at the window. What was given back stays registered until its page is needed.

    Args:
        pool: where the pages come from.
        window: tokens that each token sees, itself included; at least 1.

    Attributes:
        num_dropped: pages given back, all of them at the front.

    Example:
        >>> table = WindowTable(PagePool(num_pages=8, page_size=2), window=3)
        >>> table.grow(6)
        >>> table.commit([5, 6, 7, 8, 9])  # token 5, the next, sees tokens 3 to 5
        >>> table.pages, table.pool.num_used
        ([0, 2, 3], 2)
    """

    __slots__ = ("_drops_at", "num_dropped", "window")

    def __init__(self, pool: PagePool, window: int) -> None:
        super().__init__(pool)
        if window < 1:
            raise InvalidArgumentError(f"window={window}: it counts the token itself, so it is at least 1")
        self.window = window
        self._drop_none()

    def drop_behind(self, num_tokens: int) -> None:
        """Gives back the pages that no token from position num_tokens on sees; those not yet taken never will be.

        A call that drops none costs one comparison.
        """
        if num_tokens < self._drops_at:
            return
        size, first = self._page_size, self.num_dropped
        self.num_dropped = last = (num_tokens - self.window + 1) // size
        self._drops_at = (last + 1) * size + self.window - 1
        # The last of them to be evicted first: what comes before it can be found without it.
        self.pool.release(self.pages[first:last][::-1])
        self.pages[first:last] = [NULL_PAGE] * (last - first)

    def commit(self, token_ids: Sequence[int], count: int | None = None) -> None:
        """As `BlockTable.commit`, and gives back what no token after those sees.

        Raises:
            InvalidArgumentError: as there, or pages were given back before what they hold was committed.
        """
        count = len(token_ids) if count is None else count
        if self._fills_at <= self.num_dropped * self._page_size and count >= self._fills_at:
            raise InvalidArgumentError(
                f"{self.num_dropped} pages were given back, {self._fills_at // self._page_size - 1} committed: commit "
                "tokens before pages are dropped behind them"
            )
        super().commit(token_ids, count)
        self.drop_behind(count)

    def truncate(self, num_tokens: int) -> None:
        """As `BlockTable.truncate`.

        Raises:
            InvalidArgumentError: as there, or the next token would see pages that were given back.
        """
        if num_tokens == 0:
            del self.pages[: self.num_dropped]
            self._drop_none()
        elif num_tokens < self.num_slots and max(0, num_tokens - self.window + 1) < self.num_dropped * self._page_size:
            raise InvalidArgumentError(
                f"truncate to {num_tokens} tokens: the next one sees a window of {self.window}, pages of the first "
                f"{self.num_dropped * self._page_size} were given back; truncate to 0 and compute all again"
            )
        super().truncate(num_tokens)

    def _drop_none(self) -> None:
        self.num_dropped, self._drops_at = 0, self._page_size + self.window - 1
