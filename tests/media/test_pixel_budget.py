"""The memory of images that wait: counted, and given back by whoever lets go of it."""

from __future__ import annotations

import gc
import threading
from contextlib import suppress

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
    budget = PixelBudget(10)

    def refused_again_and_again() -> None:
        for num_objects in range(1, 40):  # until the next collection, which so comes at every place once
            hold = budget.hold(6)
            circle: list[object] = [hold]
            circle.append(circle)
            gc.set_threshold(num_objects)
            del hold, circle
            with suppress(QueueFullError):
                budget.hold(6)
            gc.set_threshold(100_000)
            gc.collect()

    before = gc.get_threshold()
    gc.set_threshold(100_000)
    try:
        thread = threading.Thread(target=refused_again_and_again, daemon=True)
        thread.start()
        thread.join(20)
        assert not thread.is_alive()
    finally:
        gc.set_threshold(*before)
