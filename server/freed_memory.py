"""Memory that large requests had goes back to the system, which C's allocator would keep for the next ones."""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable

ENOUGH = 64 * 2**20  # bytes that are worth a look through the allocator's memory
PAUSE = 1.0  # seconds until whatever refers to them is gone, and more has come together


class FreedMemory:
    """Counts what was freed, and now and then gives it back.  For one event loop; does nothing without glibc."""

    def __init__(self) -> None:
        self._give_back: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._num_bytes = 0
        self._timer: asyncio.TimerHandle | None = None

    def add(self, num_bytes: int) -> None:
        """So many bytes are no longer used."""
        self._num_bytes += num_bytes
        if self._num_bytes >= ENOUGH and self._timer is None and self._give_back is not None:
            self._timer = asyncio.get_running_loop().call_later(PAUSE, self._end_pause, self._give_back)

    def _end_pause(self, give_back: Callable[[int], int]) -> None:
        self._num_bytes, self._timer = 0, None
        asyncio.get_running_loop().run_in_executor(None, give_back, 0)
