"""Arrival times."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest

from jaxserve.bench.arrivals import poisson_arrivals


def gaps(rate: float, count: int, **kwargs: float) -> list[float]:
    times = list(poisson_arrivals(rate, count, seed=3, **kwargs))
    return [b - a for a, b in itertools.pairwise(times)]


def test_the_first_request_does_not_wait() -> None:
    assert next(poisson_arrivals(0.001, 5, seed=1)) == 0


def test_infinite_rate_sends_all_at_once() -> None:
    assert list(poisson_arrivals(math.inf, 4, seed=0)) == [0, 0, 0, 0]


def test_same_seed_same_times() -> None:
    first, again = (list(poisson_arrivals(5, 20, seed=9)) for _ in range(2))
    assert first == again
    assert first != list(poisson_arrivals(5, 20, seed=10))


def test_poisson_gaps_have_the_rates_mean_and_deviation() -> None:
    found = gaps(20, 20_000)
    assert statistics.mean(found) == pytest.approx(1 / 20, rel=0.05)
    assert statistics.stdev(found) == pytest.approx(1 / 20, rel=0.05)  # exponential: deviation = mean


@pytest.mark.parametrize("burstiness", [0.25, 4.0])
def test_burstiness_changes_the_deviation_only(burstiness: float) -> None:
    found = gaps(20, 20_000, burstiness=burstiness)
    assert statistics.mean(found) == pytest.approx(1 / 20, rel=0.05)
    assert statistics.stdev(found) == pytest.approx(1 / 20 / math.sqrt(burstiness), rel=0.05)
