"""The memory of images that wait: counted, and given back by whoever lets go of it."""

from __future__ import annotations

import threading

import pytest

from jaxserve.errors import QueueFullError
from jaxserve.media.pixel_budget import PixelBudget


def test_what_is_held() -> None:
    budget = PixelBudget(10)
    first = budget.hold(6)
    with pytest.raises(
        QueueFullError, match="have 6 bytes, those of this one 5, and max_queued_image_bytes is 10"
    ):
        budget.hold(5)
    second = budget.hold(4)
    first.release()
    first.release()
    with pytest.raises(QueueFullError, match="have 4 bytes"):
        budget.hold(7)
    del second
    budget.hold(100)  # alone, and let go of


def test_garbage_that_is_collected_in_the_middle() -> None:
    budget = PixelBudget(20)
    held = [budget.hold(6)]

    class Collecting(int):
        def __radd__(self, other: int) -> int:
            held.clear()  # as the garbage collector may do in any line
            return int(self) + other

    thread = threading.Thread(target=lambda: budget.hold(Collecting(7)), daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "it waits for itself"
    kept = budget.hold(20)
    with pytest.raises(QueueFullError, match="have 20 bytes"):
        budget.hold(1)
    kept.release()
