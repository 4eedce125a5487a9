"""How much memory the images of waiting requests may have together."""

from __future__ import annotations

import threading

from jaxserve.errors import QueueFullError


class PixelBudget:
    """Counts the bytes of images that wait for the engine: of their files, and then of their pixels.

    Safe on any thread.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        # Holds are garbage, too: one may be collected, and so released, by the very thread that has the lock.
        self._lock = threading.RLock()

    def hold(self) -> PixelHold:
        """The share of a request, with nothing yet."""
        return PixelHold(self)

    def _take(self, num_bytes: int, own: int) -> None:
        with self._lock:
            others = self._held - own
            if others and self._held + num_bytes > self._limit:
                raise QueueFullError(
                    f"images of waiting requests have {others} bytes, those of this one {own + num_bytes}, and "
                    f"max_queued_image_bytes is {self._limit}; try again later"
                )
            self._held += num_bytes

    def _give_back(self, num_bytes: int) -> None:
        with self._lock:
            self._held -= num_bytes


class PixelHold:
    """One request's share, until it is released or nobody knows of it any more."""

    def __init__(self, budget: PixelBudget) -> None:
        self._budget = budget
        self._num_bytes = 0

    def add(self, num_bytes: int) -> None:
        """Make room for more.

        Raises QueueFullError where the limit would be passed.  A request alone may pass it: it would never fit.
        """
        self._budget._take(num_bytes, self._num_bytes)
        self._num_bytes += num_bytes

    def give_back(self, num_bytes: int) -> None:
        """The request needs so much less."""
        self._num_bytes -= num_bytes
        self._budget._give_back(num_bytes)

    def release(self) -> None:
        """The request waits no longer.  Releasing twice is fine."""
        if self._num_bytes:
            self.give_back(self._num_bytes)

    def __del__(self) -> None:
        self.release()
