"""When requests are sent: all at once, or at random times of a given rate."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator


def poisson_arrivals(rate: float, count: int, *, seed: int, burstiness: float = 1.0) -> Iterator[float]:
    """Seconds from the start at which each of `count` requests is sent; the first one at 0.

    Gaps are gamma distributed with mean 1 / `rate`: burstiness 1 is a Poisson process, below 1 requests come
    in bursts, above 1 more evenly.  An infinite rate sends all at 0.
    """
    rng = random.Random(seed)
    now = 0.0
    for _ in range(count):
        yield now
        if not math.isinf(rate):
            now += rng.gammavariate(burstiness, 1 / (rate * burstiness))
