"""How many bytes the bodies of requests may have together, from their first one until the answer's end."""

from __future__ import annotations

import asyncio
from typing import Any

from quart import Request

from jaxserve.server.errors import unavailable
from jaxserve.server.freed_memory import FreedMemory
from jaxserve.server.root_path import AsgiApp

SMALL_BODY = 2**16  # bytes that a body may have whatever others have: most requests are no larger

_SHARE = "jaxserve.body"  # in a request's ASGI scope


class BodyBudget:
    """Counts the bodies of requests that are being received, read, prepared or answered.  For one event loop.

    Attributes:
        turn: held by who reads a huge body, of which there is a second copy meanwhile.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._freed = FreedMemory()
        self.turn = asyncio.Lock()

    def counted(self, app: AsgiApp) -> AsgiApp:
        """`app`, whose every request has a share of the budget until it is answered or its client has left."""

        async def with_share(scope: Any, receive: Any, send: Any) -> None:
            share = BodyShare(self)
            try:
                await app({**scope, _SHARE: share}, receive, send)
            finally:
                share.release()
                self._freed.after(share.num_bytes)

        return with_share

    def _take(self, num_bytes: int, *, is_small: bool) -> None:
        if not is_small and self._held + num_bytes > self._limit:
            raise unavailable(
                f"The bodies of unanswered requests have {self._held} bytes together, and max_total_body_bytes is "
                f"{self._limit}; try again later."
            )
        self._held += num_bytes

    def _give_back(self, num_bytes: int) -> None:
        self._held -= num_bytes


class BodyShare:
    """What one request has of the budget.

    Attributes:
        num_bytes: of its body, as far as it has come.
    """

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self._held = 0
        self.num_bytes = 0

    def expect(self, num_bytes: int) -> None:
        """Make room for a body of so many bytes: of many that come together, some must have it until their ends.

        Raises ApiError 503 where all are too large together, and this one is not small.
        """
        more = num_bytes - self._held
        if more > 0:
            self._budget._take(more, is_small=num_bytes <= SMALL_BODY)
            self._held += more

    def add(self, num_bytes: int) -> None:
        """More of the body has come.  Raises ApiError 503 as `expect` does, where it was not expected."""
        self.num_bytes += num_bytes
        self.expect(self.num_bytes)

    def release(self) -> None:
        """Nothing is left of the body."""
        self.give_back(self._held)

    def give_back(self, num_bytes: int) -> None:
        """So much of the body has been let go of."""
        num_bytes = min(num_bytes, self._held)
        self._held -= num_bytes
        self._budget._give_back(num_bytes)


def share_of(request: Request) -> BodyShare:
    """The share that a request has of the budget of its application."""
    return request.scope[_SHARE]  # pyright: ignore[reportGeneralTypeIssues]  # put there by `counted`
