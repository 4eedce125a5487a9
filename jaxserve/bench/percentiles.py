"""Mean, median and percentiles of a list of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

REPORTED = (90, 99)


@dataclass(frozen=True, slots=True)
class Summary:
    """What is reported of a measured quantity, in its own unit."""

    mean: float
    median: float
    std: float
    percentiles: dict[int, float]

    @classmethod
    def of(cls, values: Sequence[float], percentiles: Sequence[int] = REPORTED) -> Summary | None:
        """Summary of `values`, None if there are none."""
        if not values:
            return None
        ordered = sorted(values)
        mean = math.fsum(ordered) / len(ordered)
        variance = math.fsum((v - mean) ** 2 for v in ordered) / len(ordered)
        return cls(
            mean=mean,
            median=percentile(ordered, 50),
            std=math.sqrt(variance),
            percentiles={p: percentile(ordered, p) for p in percentiles},
        )


def percentile(ordered: Sequence[float], p: float) -> float:
    """The `p`-th percentile (0 to 100) of an ascending sequence, linear between neighbours as in numpy."""
    position = (len(ordered) - 1) * p / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)
