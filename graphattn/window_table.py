"""The pages of a request of whose tokens the next one sees only the latest. Host integers only, no torch."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import InvalidArgumentError
from .pages import NULL_PAGE, BlockTable, PagePool


class WindowTable(BlockTable):
    """A block table that gives back the pages that no later token sees; the null page takes their places.

    A token sees `window` tokens, itself included. So pages stay where they were, and kernels find token i as ever;
    whoever reads them must begin at the window. What was given back stays registered until its page is needed.

    To go on behind a prefix takes its last window alone. Which content comes before that, the pages themselves need not
    tell if the table of another group, that keeps what this one gives back, knows it: its keeper.

    Args:
        pool: where the pages come from.
        window: tokens that each token sees, itself included; at least 1.
        keeper: the same request's table in another group, over pages of one size; each `commit` here comes after the
            keeper's. None to tell prefixes by pages of this group alone, from the first one on.

    Attributes:
        num_dropped: pages given back, all of them at the front.

    Example:
        >>> table = WindowTable(PagePool(num_pages=8, page_size=2), window=3)
        >>> table.grow(6)
        >>> table.commit([5, 6, 7, 8, 9])  # token 5, the next, sees tokens 3 to 5
        >>> table.pages, table.pool.num_used
        ([0, 2, 3], 2)
    """

    __slots__ = ("_drops_at", "_keeper", "num_dropped", "window")

    def __init__(self, pool: PagePool, window: int, keeper: BlockTable | None = None) -> None:
        super().__init__(pool)
        if window < 1:
            raise InvalidArgumentError(f"window={window}: it counts the token itself, so it is at least 1")
        self.window, self._keeper = window, keeper
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
        # The first of a release is evicted first: with a keeper what lies farthest behind, else what is found last.
        self.pool.release(self.pages[first:last][:: 1 if self._keeper is not None else -1])
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
        if self._keeper is None:
            super().commit(token_ids, count)
        elif count >= self._fills_at:
            self._follow(token_ids, count)
        self.drop_behind(count)

    def findable(self, token_ids: Sequence[int], num_tokens: int) -> int:
        """The longest prefix of at most so many tokens, all held by the keeper, behind which a token sees pages that
        are registered here; a multiple of page_size."""
        size, last = self._page_size, num_tokens // self._page_size
        while last > 0:
            at, first = last - 1, self._first_seen(last * size)
            while at >= first and self._content(at, token_ids) in self.pool._contents:
                at -= 1
            if at < first:
                break
            last = at  # whatever ends behind that page sees it
        return last * size

    def take(self, token_ids: Sequence[int], num_tokens: int) -> None:
        """Takes what a token behind a prefix sees, which is `findable`; the table must be empty."""
        size, pool, last = self._page_size, self.pool, num_tokens // self._page_size
        self._root, first = pool._root, self._first_seen(num_tokens)
        found = [pool._take(*self._content(at, token_ids)) for at in range(first, last)]
        self.pages += [NULL_PAGE] * first + [page for page, _ in found]
        self.num_dropped, self._drops_at = first, (first + 1) * size + self.window - 1
        self._fills_at = num_tokens + size
        pool.num_hits += num_tokens

    def _follow(self, token_ids: Sequence[int], count: int) -> None:
        """Registers pages that became full, each as what the keeper has registered there."""
        size, end = self._page_size, count // self._page_size * self._page_size
        for at in range(self._fills_at // size - 1, end // size):
            if at < len(self._keeper._serials):
                self.pool._register(self.pages[at], *self._content(at, token_ids))
        self._fills_at = end + size

    def _content(self, at: int, token_ids: Sequence[int]) -> tuple[int, tuple[int, ...]]:
        """What a page holds, as pools name it."""
        keeper, size = self._keeper, self._page_size
        parent = keeper._serials[at - 1] if at else keeper.pool._start(keeper._key)
        return parent, tuple(token_ids[at * size : (at + 1) * size])

    def _first_seen(self, num_tokens: int) -> int:
        """The first page that the token at that position sees."""
        return max(0, num_tokens - self.window + 1) // self._page_size

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
