"""An event loop's time under a test's hand: what waits for long comes when the test says, on busy machines too."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from tests.patience import PATIENCE

T = TypeVar("T")


class Hourglass:
    """The running loop's time, which passes as ever, and on top of that as the test says."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self._passed = loop.time
        self._ahead = 0.0
        loop.time = self._time  # type: ignore[method-assign]  # timers are set and looked at by it

    def turn(self, seconds: float) -> None:
        """So much time has passed."""
        self._ahead += seconds

    async def outlast(self, waiting: asyncio.Future[T], seconds: float) -> T:
        """Let so many seconds pass, again and again, until `waiting` is done; its result."""
        end = self._passed() + PATIENCE
        while not waiting.done():
            assert self._passed() < end, "it waits for something else"
            self.turn(seconds)
            await asyncio.sleep(0)
        return waiting.result()

    def _time(self) -> float:
        return self._passed() + self._ahead
