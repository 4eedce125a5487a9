"""How many bytes several threads may hold at once."""

from __future__ import annotations

import threading


class ByteBudget:
    """A limit on bytes in use.  Whoever asks for more than the limit waits until nobody else holds any."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._stopped = False
        self._changed = threading.Condition()

    def take(self, num_bytes: int) -> bool:
        """Wait until so many bytes are free; False, and none taken, once `stop` was called."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._stopped or not self._used or self._used + num_bytes <= self._limit
            )
            if not self._stopped:
                self._used += num_bytes
            return not self._stopped

    def give(self, num_bytes: int) -> None:
        """Give back what was taken."""
        with self._changed:
            self._used -= num_bytes
            self._changed.notify_all()

    def stop(self) -> None:
        """Let nobody have any more: those who hold bytes may never give them back."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
