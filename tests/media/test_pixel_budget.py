"""The memory of images that wait: counted, and given back by whoever lets go of it."""

from __future__ import annotations

import threading

import pytest

from jaxserve.errors import QueueFullError
from jaxserve.media.pixel_budget import PixelBudget, PixelHold
from tests.patience import PATIENCE


def hold(budget: PixelBudget, num_bytes: int) -> PixelHold:
    held = budget.hold()
    held.add(num_bytes)
    return held


def test_what_is_held() -> None:
    budget = PixelBudget(10)
    first = hold(budget, 6)
    second = hold(budget, 1)
    with pytest.raises(
        QueueFullError, match="have 6 bytes, those of this one 5, and max_queued_image_bytes is 10"
    ):
        second.add(4)
    second.add(3)
    first.give_back(2)
    second.add(2)
    first.release()
    first.release()
    with pytest.raises(QueueFullError, match="have 6 bytes"):
        hold(budget, 5)
    del second
    alone = hold(budget, 100)
    alone.add(100)  # and let go of


def test_garbage_that_is_collected_in_the_middle() -> None:
    budget = PixelBudget(20)
    held = [hold(budget, 6)]

    class Collecting(int):
        def __radd__(self, other: int) -> int:
            held.clear()  # as the garbage collector may do in any line
            return int(self) + other

    thread = threading.Thread(target=lambda: hold(budget, Collecting(7)), daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive(), "it waits for itself"
    kept = hold(budget, 20)
    with pytest.raises(QueueFullError, match="have 20 bytes"):
        hold(budget, 1)
    kept.release()
