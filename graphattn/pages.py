"""Pages of the KV cache: who holds which, and which hold a prefix to reuse. Host integers only, no torch."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence

from .errors import GraphattnError, InvalidArgumentError, OutOfPagesError

NULL_PAGE = 0
"""Never allocated: the padded rows of a captured batch write and read here."""


class PagePool:
    """Counts references to pages and remembers what full pages contain.

    A page is used (referenced), cached (unreferenced, its content registered for reuse) or free. Content is keyed by
    (serial of the content before it, its token ids), exactly. A serial belongs to one registration and never comes
    back, so what followed an evicted page cannot be found any more and leaves by age.

    Args:
        num_pages: Pages of the cache, the null page included; at least 2.
        page_size: Tokens in a page; at least 1.
        prefix_cache: Whether full pages are registered for reuse.

    Attributes:
        num_hits: Tokens reused so far.
        num_evictions: Cached pages whose content was given up for an allocation so far.

    Raises:
        InvalidArgumentError: num_pages or page_size is too small.

    Example:
        >>> pool = PagePool(num_pages=8, page_size=2)
        >>> table = BlockTable(pool)
        >>> table.grow(5)
        >>> table.pages, pool.num_free
        ([1, 2, 3], 4)
        >>> table.commit([7, 8, 9, 10, 11])
        >>> table.release()
        >>> pool.num_free, pool.num_cached
        (7, 2)
        >>> table.reuse_prefix([7, 8, 9, 10])  # one token must remain to compute
        2
    """

    def __init__(self, num_pages: int, page_size: int = 16, *, prefix_cache: bool = True) -> None:
        if num_pages < 2:
            raise InvalidArgumentError(f"num_pages must be at least 2 (page 0 is the null page), got {num_pages}")
        if page_size < 1:
            raise InvalidArgumentError(f"page_size must be at least 1, got {page_size}")
        self.num_pages = num_pages
        self.page_size = page_size
        self.num_hits = 0
        self.num_evictions = 0
        self._prefix_cache = prefix_cache
        self._refs = [0] * num_pages
        self._free = list(range(num_pages - 1, NULL_PAGE, -1))  # taken from the end
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._contents: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}  # key -> (page, serial)
        self._keys: list[tuple[int, tuple[int, ...]] | None] = [None] * num_pages  # the inverse, by page
        self._root = self._last_serial = 0
        self._starts: dict[int, int] = {}  # serial before the first page, by what else prefixes have in common

    @property
    def num_usable(self) -> int:
        """Pages that can be allocated at all: every page but the null page."""
        return self.num_pages - 1

    @property
    def num_free(self) -> int:
        """Pages that can be allocated now, cached ones included."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Pages that nobody references and whose content is still registered."""
        return len(self._cached)

    @property
    def num_used(self) -> int:
        """Pages that somebody references."""
        return self.num_usable - self.num_free

    @property
    def capacity_tokens(self) -> int:
        """Tokens that fit into all usable pages."""
        return self.num_usable * self.page_size

    def pages_for(self, num_tokens: int) -> int:
        """Pages that num_tokens tokens need."""
        return -(-num_tokens // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """Take count pages, one reference each, content undefined; cached pages go last, least recently used first.

        Raises:
            InvalidArgumentError: count is negative.
            OutOfPagesError: Fewer than count pages are free; none was taken.
        """
        if count < 0:
            raise InvalidArgumentError(f"count of pages to allocate must be at least 0, got {count}")
        if count > self.num_free:
            raise OutOfPagesError(
                f"{count} {'page' if count == 1 else 'pages'} needed, {self.num_free} of {self.num_usable} free "
                f"(page_size={self.page_size}); finish a request, lower max_seq_len or raise num_pages"
            )
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._cached.popitem(last=False)
                self._forget(page)
                self.num_evictions += 1
            self._refs[page] = 1
            pages.append(page)
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """Drop one reference per page listed; of those that become cached the first is evicted first.

        Raises:
            InvalidArgumentError: A page is the null page, not of this pool or listed more often than it is referenced;
                no reference was dropped.
        """
        for page, count in Counter(pages).items():
            if not NULL_PAGE < page < self.num_pages:
                what = "the null page" if page == NULL_PAGE else "not of this pool"
                raise InvalidArgumentError(f"page {page} is {what}; release only pages 1 to {self.num_usable}")
            if count > self._refs[page]:
                raise InvalidArgumentError(
                    f"{count} references to page {page} released, there are {self._refs[page]}; release each only once"
                )
        for page in pages:
            self._refs[page] -= 1
            if self._refs[page] == 0:
                if self._keys[page] is None:
                    self._free.append(page)
                else:
                    self._cached[page] = None

    def disown(self, token_ids: Sequence[int], key: int = 0) -> None:
        """Forget the page that token_ids begin with, and so all that follows: no serial comes back."""
        page, _ = self._contents.get((self._start(key), tuple(token_ids[: self.page_size])), (NULL_PAGE, 0))
        if page != NULL_PAGE:
            self._forget(page)
            if page in self._cached:
                del self._cached[page]
                self._free.append(page)

    def clear_prefixes(self) -> None:
        """Forget every registered content, as after a change of weights.

        Tables keep their pages, but one that has any registers nothing until it was emptied: part of it is outdated.
        """
        for page in [page for page, _ in self._contents.values()]:
            self._forget(page)
        self._free.extend(self._cached)
        self._cached.clear()
        self._root = self._next_serial()
        self._starts.clear()

    def grow(self, num_pages: int) -> None:
        """Raise the pool to num_pages pages, the null page included; InvalidArgumentError if it has more already."""
        if num_pages < self.num_pages:
            raise InvalidArgumentError(f"num_pages={num_pages} asked, the pool has {self.num_pages} and only grows")
        added = num_pages - self.num_pages
        self._refs.extend([0] * added)
        self._keys.extend([None] * added)
        self._free[:0] = range(num_pages - 1, self.num_pages - 1, -1)
        self.num_pages = num_pages

    def check(self) -> None:
        """Verify the books, reading every page; GraphattnError says what does not add up."""
        free, cached, used = len(self._free), len(self._cached), sum(refs != 0 for refs in self._refs)
        if free + cached + used != self.num_usable:
            raise GraphattnError(f"free {free} + cached {cached} + used {used} != usable {self.num_usable} pages")
        idle = [*self._free, *self._cached]
        unheld = {NULL_PAGE, *idle}
        wrong = [page for page, refs in enumerate(self._refs) if refs < 0 or (refs and page in unheld)]
        if wrong or len(unheld) != free + cached + 1:
            raise GraphattnError(f"references disagree with free or cached; pages {wrong}, free or cached {idle}")
        listed = {(page, key) for page, key in enumerate(self._keys) if key is not None}
        wrong = [p for p in self._free if self._keys[p] is not None] + [p for p in self._cached if not self._keys[p]]
        if wrong or listed != {(page, key) for key, (page, _) in self._contents.items()}:
            raise GraphattnError(f"registered contents disagree with the pages that hold them; free or cached {wrong}")

    def _start(self, key: int) -> int:
        if key == 0:
            return self._root
        if key not in self._starts:
            self._starts[key] = self._next_serial()
        return self._starts[key]

    def _next_serial(self) -> int:
        self._last_serial += 1
        return self._last_serial

    def _forget(self, page: int) -> None:
        key = self._keys[page]
        assert key is not None, f"page {page} has no registered content"
        del self._contents[key]
        self._keys[page] = None

    def _take(self, parent: int, tokens: tuple[int, ...]) -> tuple[int, int] | None:
        """Reference the page that holds tokens after parent; returns (page, serial)."""
        found = self._contents.get((parent, tokens))
        if found is not None:
            page = found[0]
            if self._refs[page] == 0:
                del self._cached[page]
            self._refs[page] += 1
        return found

    def _register(self, page: int, parent: int, tokens: tuple[int, ...]) -> int:
        """Note that page holds tokens after parent, unless another page does already; returns the content's serial."""
        key = (parent, tokens)
        found = self._contents.get(key)
        if found is None:
            found = self._contents[key] = (page, self._next_serial())
            self._keys[page] = key
        return found[1]


class BlockTable:
    """The pages of one request in order: token i lies in slot `i % page_size` of `pages[i // page_size]`.

    Attributes:
        pool: Where the pages come from.
        pages: Page numbers; to be read, not changed.
    """

    __slots__ = ("_fills_at", "_key", "_page_size", "_root", "_serials", "pages", "pool")

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.pages: list[int] = []
        self._page_size = pool.page_size
        self._root, self._key = pool._root, 0
        self._serials: list[int] = []  # of the content of each committed full page
        self._fills_at = pool.page_size  # number of tokens at which commit has a page to register

    @property
    def num_slots(self) -> int:
        """Tokens that fit into the pages held."""
        return len(self.pages) * self._page_size

    def reuse_prefix(self, token_ids: Sequence[int], key: int = 0) -> int:
        """Take the longest chain of registered pages that token_ids (from position 0) begin with, but never all tokens.

        Args:
            token_ids: Tokens of the request.
            key: What keys and values depend on besides tokens; only requests of one key share pages.

        Returns:
            Number of tokens whose keys and values need not be computed: a multiple of page_size.

        Raises:
            InvalidArgumentError: The table has pages.
        """
        if self.pages:
            raise InvalidArgumentError(f"reuse_prefix needs an empty table, got {len(self.pages)} pages; release first")
        pool, size = self.pool, self._page_size
        self._root, self._key = pool._root, key
        serial = pool._start(key)
        for start in range(0, (len(token_ids) - 1) // size * size, size):
            found = pool._take(serial, tuple(token_ids[start : start + size]))
            if found is None:
                break
            page, serial = found
            self.pages.append(page)
            self._serials.append(serial)
        self._fills_at = self.num_slots + size
        pool.num_hits += self.num_slots
        return self.num_slots

    def grow(self, num_tokens: int) -> None:
        """Make room for num_tokens tokens in total, if there is not already.

        Raises:
            OutOfPagesError: The pool has too few pages; the table is as it was.
        """
        if num_tokens <= len(self.pages) * self._page_size:
            return
        if not self.pages:
            self._root = self.pool._root
        self.pages += self.pool.allocate(self.pool.pages_for(num_tokens) - len(self.pages))

    def commit(self, token_ids: Sequence[int], count: int | None = None) -> None:
        """Say that keys and values of token_ids are written, and so register the pages that became full.

        Only the tokens of those pages are read; a call that fills no page costs one comparison and checks nothing.

        Args:
            token_ids: Tokens of the request from position 0, as ints.
            count: How many of them are written; None for all.

        Raises:
            InvalidArgumentError: There are more tokens than slots.
        """
        count = len(token_ids) if count is None else count
        if count < self._fills_at:
            return
        if count > self.num_slots:
            raise InvalidArgumentError(
                f"{count} tokens committed, the table has {self.num_slots} slots; call grow before writing"
            )
        pool, size = self.pool, self._page_size
        end = count // size * size
        # After clear_prefixes an older table must not register: part of it was computed with the weights of before.
        if pool._prefix_cache and self._root == pool._root:
            serial = self._serials[-1] if self._serials else pool._start(self._key)
            for start in range(self._fills_at - size, end, size):
                serial = pool._register(self.pages[start // size], serial, tuple(token_ids[start : start + size]))
                self._serials.append(serial)
        self._fills_at = end + size

    def truncate(self, num_tokens: int) -> None:
        """Keep room for num_tokens tokens and give back the pages after; does nothing where there is no more room.

        Raises:
            InvalidArgumentError: num_tokens is negative, or ends inside a page that is shared or registered (what is
                written to its tail would reach other requests); the table is as it was.
        """
        if num_tokens < 0:
            raise InvalidArgumentError(f"num_tokens to keep must be at least 0, got {num_tokens}")
        if num_tokens >= self.num_slots:
            return
        pool, size = self.pool, self._page_size
        num_full, tail = divmod(num_tokens, size)
        page = self.pages[num_full]
        if tail and (pool._refs[page] > 1 or pool._keys[page] is not None):
            raise InvalidArgumentError(
                f"truncate to {num_tokens} tokens cuts page {page}, which is shared or registered as a prefix; "
                f"truncate to {num_full * size} tokens and compute the rest again"
            )
        keep = num_full + (tail > 0)
        pool.release(self.pages[keep:][::-1])
        del self.pages[keep:], self._serials[num_full:]
        self._fills_at = min(self._fills_at, (num_full + 1) * size)

    def disown(self, token_ids: Sequence[int]) -> None:
        """Have nobody find what its request computed of token_ids, held or not, since it is not to be trusted."""
        self.pool.disown(token_ids, self._key)

    def release(self) -> None:
        """Give every page back, the last one to be evicted first; the table is empty and can be used again."""
        self.truncate(0)
