"""How many bytes request bodies may have together while they come in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from jaxserve.server.errors import unavailable

MAX_BODIES = 2 * 2**30  # bytes; who sends slowly may take a minute, and there is no limit on connections
SMALL_BODY = 2**16  # bytes that a body may have whatever others have: most requests are no larger


class BodyBudget:
    """Counts the bodies that are being received or read.  For one event loop."""

    def __init__(self) -> None:
        self._held = 0

    @contextmanager
    def body(self) -> Iterator[BodyShare]:
        """One request's body, until it has been read."""
        share = BodyShare(self)
        try:
            yield share
        finally:
            self._held -= share.num_bytes

    def _take(self, num_bytes: int, *, is_small: bool) -> None:
        if not is_small and self._held + num_bytes > MAX_BODIES:
            raise unavailable("Too many large requests are being received; try again later.")
        self._held += num_bytes


class BodyShare:
    """What one body has of the budget."""

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self.num_bytes = 0

    def add(self, num_bytes: int) -> None:
        """More of the body has come.  Raises ApiError 503 where all are too large together, and this one not small."""
        self._budget._take(num_bytes, is_small=self.num_bytes + num_bytes <= SMALL_BODY)
        self.num_bytes += num_bytes
