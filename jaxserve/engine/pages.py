"""KV pages: who owns them, which prefixes they hold, which one to reuse next."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

DUMMY_PAGE = 0  # padding tokens write here; never allocated

PageHash = bytes


def hash_page(parent: PageHash, token_ids: Sequence[int]) -> PageHash:
    """Name of a full page: its tokens and everything before them.

    A cryptographic hash, because a collision would let one request read another's prefix.
    """
    return hashlib.blake2b(parent + array("I", token_ids).tobytes(), digest_size=16).digest()


def root_hash(cache_salt: str | None) -> PageHash:
    """Parent of a sequence's first page: sequences of different salts share nothing."""
    return b"" if cache_salt is None else hashlib.blake2b(cache_salt.encode(), digest_size=16).digest()


class PageAllocator:
    """Reference-counted pages 1..num_pages-1 with a prefix cache over the full ones.

    A page nobody refers to is free.  If it is full and registered its content stays findable until the page is
    handed out again; pages without a name go first, then the least recently used.
    """

    def __init__(self, num_pages: int, *, enable_prefix_caching: bool) -> None:
        assert num_pages >= 2, "one is the dummy"
        self.num_pages = num_pages - 1  # pages that can be allocated
        self._enable_prefix_caching = enable_prefix_caching
        self._ref_counts = [0] * num_pages
        self._hash_of: list[PageHash | None] = [None] * num_pages
        self._page_of: dict[PageHash, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(DUMMY_PAGE + 1, num_pages))

    @property
    def num_free(self) -> int:
        """Pages that can be allocated now, those with cached content included."""
        return len(self._free)

    def match_prefix(self, hashes: Iterable[PageHash]) -> list[int]:
        """Pages that hold the longest known prefix of the chain `hashes`.  Takes no reference."""
        pages: list[int] = []
        for page_hash in hashes:
            page = self._page_of.get(page_hash)
            if page is None:
                break
            pages.append(page)
        return pages

    def acquire(self, pages: Iterable[int]) -> None:
        """Take one more reference to each page."""
        for page in pages:
            if self._ref_counts[page] == 0:
                del self._free[page]
            self._ref_counts[page] += 1

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages with one reference each and no content, or None if there are too few."""
        if count > len(self._free):
            return None
        pages = []
        for _ in range(count):
            page, _ = self._free.popitem(last=False)
            self._forget(page)
            self._ref_counts[page] = 1
            pages.append(page)
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """Give back one reference to each page of a sequence, listed in sequence order.

        The tail becomes reusable before the head: a long prefix is worth more than its end.
        """
        for page in reversed(pages):
            self._ref_counts[page] -= 1
            assert self._ref_counts[page] >= 0, f"page {page} released twice"
            if self._ref_counts[page] == 0:
                self._free[page] = None
                if self._hash_of[page] is None:
                    self._free.move_to_end(page, last=False)

    def register(self, page: int, page_hash: PageHash) -> None:
        """Make a full page findable.  The first page of a given content keeps the name."""
        if self._enable_prefix_caching and self._hash_of[page] is None and page_hash not in self._page_of:
            self._hash_of[page] = page_hash
            self._page_of[page_hash] = page

    def reset_prefix_cache(self) -> bool:
        """Forget all cached content.  False, and nothing done, while any page is in use."""
        if len(self._free) != self.num_pages:
            return False
        for page in list(self._page_of.values()):
            self._forget(page)
        return True

    def _forget(self, page: int) -> None:
        page_hash = self._hash_of[page]
        if page_hash is not None:
            del self._page_of[page_hash]
            self._hash_of[page] = None
