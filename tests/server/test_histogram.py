"""The bulk histogram against prometheus_client's own."""

from __future__ import annotations

import random

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from jaxserve.server.histogram import BulkHistogram

BOUNDS = (0.001, 0.5, 1.0, 7.5)


@pytest.mark.parametrize("seed", range(5))
def test_it_says_what_the_usual_one_says(seed: int):
    rng = random.Random(seed)
    values = [rng.choice([0.0, 0.001, 0.5, 7.5, 8.0, rng.uniform(0, 9)]) for _ in range(rng.randrange(50))]
    usual, bulk = CollectorRegistry(), CollectorRegistry()
    theirs = Histogram("h", "What.", ["l"], registry=usual, buckets=BOUNDS).labels(l="v")
    ours = BulkHistogram("h", "What.", {"l": "v"}, BOUNDS)
    bulk.register(ours)
    for value in values:
        theirs.observe(value)
    ours.observe(values[:7])
    ours.observe(values[7:])

    def lines(registry: CollectorRegistry) -> list[str]:
        return [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]

    assert lines(bulk) == lines(usual)
