"""Numbers as people write them."""

from __future__ import annotations

import argparse
import math

import pytest

from jaxserve.cli.quantities import count, counts, num_bytes, positive, rate


@pytest.mark.parametrize(
    ("text", "value"),
    [("8192", 8192), ("8k", 8000), ("8K", 8192), ("1.5k", 1500), ("25.6k", 25_600), ("1M", 2**20), ("0", 0)],
)
def test_count(text: str, value: int) -> None:
    assert count(text) == value


@pytest.mark.parametrize("text", ["", "k", "8kk", "-1", "8 k", "1.0001k", "eight", "8KB"])
def test_no_count(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"count|whole"):
        count(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1073741824", 2**30),
        ("2G", 2 * 2**30),
        ("512M", 512 * 2**20),
        ("2GiB", 2 * 2**30),
        ("2GB", 2 * 10**9),
        ("2g", 2 * 10**9),
        ("0.5G", 2**29),
    ],
)
def test_num_bytes(text: str, value: int) -> None:
    assert num_bytes(text) == value


@pytest.mark.parametrize("text", ["2X", "", "G", "-2G", "1.0000000001"])
def test_no_bytes(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        num_bytes(text)


def test_lists_of_counts() -> None:
    assert counts("1,8, 1k") == [1, 8, 1000]
    for wrong in ("", "0,1", "a"):
        with pytest.raises(argparse.ArgumentTypeError):
            counts(wrong)


def test_positive_and_rate() -> None:
    assert positive("3") == 3
    assert rate("0.5") == 0.5
    assert math.isinf(rate("inf"))
    for convert, wrong in ((positive, "0"), (rate, "0"), (rate, "-1"), (rate, "nan"), (rate, "fast")):
        with pytest.raises(argparse.ArgumentTypeError):
            convert(wrong)
