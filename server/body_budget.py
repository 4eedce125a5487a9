"""How many bytes the bodies of requests may have together, from their first one until the answer's end."""

from __future__ import annotations

import asyncio
from typing import Any

from quart import Request

from jaxserve.server.errors import ApiError, unavailable
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

    def _check(self, num_bytes: int) -> None:
        """Raise ApiError 503 where there is no room for so many bytes more."""
        if self._held + num_bytes > self._limit:
            raise unavailable(
                f"The bodies of unanswered requests have {self._held} bytes together, and max_total_body_bytes is "
                f"{self._limit}; try again later."
            )

    def _take(self, num_bytes: int, *, is_small: bool) -> None:
        if not is_small:
            self._check(num_bytes)
        self._held += num_bytes

    def _give_back(self, num_bytes: int) -> None:
        self._held -= num_bytes


class BodyShare:
    """What one request has of the budget: room for what has come of its body, from the half on for the whole.

    A body that was only announced has none, or it would cost nothing to hold up all others.  Of many that are too large
    together, each that finds no room leaves its own to the others: some come to their ends.

    Attributes:
        num_bytes: of its body, as far as it has come.
    """

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self._held = 0
        self._num_announced = 0
        self.num_bytes = 0

    def announce(self, num_bytes: int) -> None:
        """A body of so many bytes is to come.  Raises ApiError 503 where there is no room for it even now."""
        if num_bytes > SMALL_BODY:
            self._budget._check(num_bytes)
        self._num_announced = num_bytes

    def add(self, num_bytes: int) -> None:
        """More of the body has come.  Raises ApiError 503 where there is no room for it, and it is not small."""
        self.num_bytes += num_bytes
        wanted = self.num_bytes
        if 2 * wanted >= self._num_announced:
            wanted = max(wanted, self._num_announced)
        if wanted <= self._held:
            return
        try:
            self._budget._take(wanted - self._held, is_small=wanted <= SMALL_BODY)
        except ApiError:
            self.release()
            raise
        self._held = wanted

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
