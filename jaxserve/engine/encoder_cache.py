"""Which rows of the device's buffer hold which image's tokens: pages of rows, handed out again when least needed."""

from __future__ import annotations

from collections import OrderedDict

PAGE_ROWS = 32  # tokens of a page: an image takes whole ones, wherever they are


class EncoderCache:
    """Images by their content, the least recently used one first.

    An image is kept out of eviction by being held (a sequence has run some of its tokens and wants the others), or by
    having been asked for since `begin_step`: the step's forward pass reads it.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._pages: OrderedDict[str, tuple[int, ...]] = OrderedDict()
        self._holders: dict[str, set[int]] = {}
        self._asked: set[str] = set()

    def __contains__(self, content_hash: str) -> bool:
        return content_hash in self._pages

    def begin_step(self) -> None:
        """What was asked for so far has been read once the next step runs."""
        self._asked.clear()

    def find(self, content_hash: str) -> tuple[int, ...] | None:
        """The pages of an image, which stay its own during this step; None if it is not here."""
        pages = self._pages.get(content_hash)
        if pages is not None:
            self._pages.move_to_end(content_hash)
            self._asked.add(content_hash)
        return pages

    def make_room(self, content_hash: str, num_tokens: int) -> tuple[int, ...] | None:
        """Pages for a new image, during this step its own; None while too many others are in use."""
        assert content_hash not in self._pages
        needed = -(-num_tokens // PAGE_ROWS)
        spare = [key for key in self._pages if key not in self._asked and not self._holders.get(key)]
        if needed > len(self._free) + sum(len(self._pages[key]) for key in spare):
            return None
        for key in spare:
            if len(self._free) >= needed:
                break
            self._free += self._pages.pop(key)
        pages = tuple(self._free.pop() for _ in range(needed))
        self._pages[content_hash] = pages
        self._asked.add(content_hash)
        return pages

    def drop(self, content_hash: str) -> None:
        """Forget an image that nobody holds."""
        assert not self._holders.get(content_hash)
        self._free += self._pages.pop(content_hash)
        self._asked.discard(content_hash)

    def hold(self, content_hash: str, seq_id: int) -> None:
        """A sequence wants more of an image than this step reads."""
        self._holders.setdefault(content_hash, set()).add(seq_id)

    def let_go(self, content_hash: str, seq_id: int) -> None:
        """The opposite of `hold`, and nothing if the sequence holds none."""
        holders = self._holders.get(content_hash)
        if holders is None:
            return
        holders.discard(seq_id)
        if not holders:
            del self._holders[content_hash]
