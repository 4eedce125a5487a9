"""What hosts take for the time: it passes when a test says so, or a busy machine would lose them."""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from typing import TypeVar

from jaxserve.engine.hosts.link import BEAT_SECONDS, LOST_SECONDS
from tests.patience import PATIENCE

T = TypeVar("T")


class HostsClock:
    """Stands in for the `time` of links."""

    def __init__(self) -> None:
        self._now = 0.0
        self._looks: Counter[str] = Counter()  # at it, by thread
        self._changed = threading.Condition()

    def monotonic(self) -> float:
        """As time.monotonic."""
        with self._changed:
            self._looks[threading.current_thread().name] += 1
            self._changed.notify_all()
            return self._now

    def turn(self, seconds: float) -> None:
        """So much time has passed."""
        with self._changed:
            self._now += seconds

    def wait_until_seen(self, thread: str) -> None:
        """Until a thread that waits for the other side has looked at the time, and has gone on waiting."""
        with self._changed:
            wanted = self._looks[thread] + 2
            assert self._changed.wait_for(lambda: self._looks[thread] >= wanted, PATIENCE)

    def outlast(self, lost: queue.SimpleQueue[T]) -> T:
        """Let time pass until somebody is lost; what is said of them."""
        end = time.monotonic() + PATIENCE
        while True:
            self.turn(LOST_SECONDS + 1)
            try:
                return lost.get(timeout=BEAT_SECONDS / 10)
            except queue.Empty:  # whoever waits has not looked yet, or got a last beat
                assert time.monotonic() < end, "nobody is missed"
