"""How much memory the images of waiting requests may have together."""

from __future__ import annotations

import threading

from jaxserve.errors import QueueFullError


class PixelBudget:
    """Counts the bytes of decoded images that wait for the engine.  Safe on any thread."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        # Holds are garbage, too: one may be collected, and so released, by the very thread that has the lock.
        self._lock = threading.RLock()

    def hold(self, num_bytes: int) -> PixelHold:
        """Make room for the images of a request, before they are decoded.

        Raises QueueFullError where the limit would be passed.  A request alone may pass it: it would never fit.
        """
        with self._lock:
            if self._held and self._held + num_bytes > self._limit:
                raise QueueFullError(
                    f"images of waiting requests have {self._held} bytes, those of this one {num_bytes}, and "
                    f"max_queued_image_bytes is {self._limit}; try again later"
                )
            self._held += num_bytes
        return PixelHold(self, num_bytes)

    def _give_back(self, num_bytes: int) -> None:
        with self._lock:
            self._held -= num_bytes


class PixelHold:
    """One request's share, until it is released or nobody knows of it any more."""

    def __init__(self, budget: PixelBudget, num_bytes: int) -> None:
        self._budget = budget
        self._num_bytes = num_bytes

    def release(self) -> None:
        """The request waits no longer.  Releasing twice is fine."""
        num_bytes, self._num_bytes = self._num_bytes, 0
        if num_bytes:
            self._budget._give_back(num_bytes)

    def __del__(self) -> None:
        self.release()
