"""Percentiles against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.bench.percentiles import Summary, percentile


@settings(max_examples=100)
@given(values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), p=st.floats(0, 100))
def test_percentile_is_numpys(values: list[float], p: float) -> None:
    assert percentile(sorted(values), p) == pytest.approx(np.percentile(values, p), rel=1e-9, abs=1e-6)


def test_summary() -> None:
    summary = Summary.of([4.0, 1.0, 3.0, 2.0])
    assert summary is not None
    assert summary.mean == 2.5
    assert summary.median == 2.5
    assert summary.std == pytest.approx(np.std([1, 2, 3, 4]))
    assert summary.percentiles == {90: pytest.approx(3.7), 99: pytest.approx(3.97)}


def test_nothing_has_no_summary() -> None:
    assert Summary.of([]) is None
