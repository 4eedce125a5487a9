"""Freed memory goes back to the system, which C's allocator would keep for the next large request."""

from __future__ import annotations

import asyncio
import ctypes

LARGE = 2**20  # bytes of a body; what becomes of it may have a hundred times as many
MANY = 2**26  # bytes of smaller ones together
PAUSE = 5.0  # seconds until all that refers to it is gone; more often would cost those who need it again

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)


def give_back() -> None:
    """Give back what is free now; does nothing without glibc.

    Takes a millisecond for each ten megabytes, once, in which threads that allocate beside it may have to wait.
    """
    if _trim is not None:
        _trim(0)


class FreedMemory:
    """Gives back, now and then, what large requests had.  For one event loop."""

    def __init__(self) -> None:
        self._num_bytes = 0
        self._timer: asyncio.TimerHandle | None = None

    def after(self, num_bytes: int) -> None:
        """A request with a body of so many bytes has ended."""
        self._num_bytes += num_bytes if num_bytes < LARGE else MANY
        if self._num_bytes >= MANY and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(PAUSE, self._end_pause)

    def _end_pause(self) -> None:
        self._num_bytes, self._timer = 0, None
        asyncio.get_running_loop().run_in_executor(None, give_back)
