"""Numbers as people write them on a command line: 8k tokens, 2G of memory, lists of sizes."""

from __future__ import annotations

import argparse
import re

# As vLLM reads them: a small letter is decimal, a capital one binary. `8k` is 8000 and `8K` is 8192.
_FACTORS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "K": 2**10,
    "M": 2**20,
    "G": 2**30,
    "T": 2**40,
}
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)([kmgtKMGT]?)")
_BYTES = re.compile(r"(\d+(?:\.\d+)?)([kmgtKMGT]?)(iB|B)?")


def count(text: str) -> int:
    """A number of tokens, sequences or requests: `8192`, `8k` (8000), `8K` (8192), `1.5k`."""
    match = _QUANTITY.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a count; write 8192, 8k (8000) or 8K (8192)")
    return _scaled(text, match.group(1), _FACTORS[match.group(2)])


def num_bytes(text: str) -> int:
    """A memory size in bytes: `2147483648`, `2G` or `2GiB` (2 * 2**30), `512M`, `2GB` or `2g` (2 * 10**9)."""
    match = _BYTES.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a memory size; write bytes, 512M, 2G (binary) or 2GB (decimal)"
        )
    letter, unit = match.group(2), match.group(3)
    if unit == "B":
        letter = letter.lower()
    elif unit == "iB":
        letter = letter.upper()
    return _scaled(text, match.group(1), _FACTORS[letter])


def counts(text: str) -> list[int]:
    """A comma-separated list of counts, each at least 1: `1,8,32`."""
    values = [count(part) for part in text.split(",") if part.strip()]
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of counts; write for example 1,8")
    return values


def positive(text: str) -> int:
    """A count of at least 1."""
    value = count(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be at least 1")
    return value


def rate(text: str) -> float:
    """Something per second, above 0; `inf` for as fast as possible."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a rate; write a number above 0, or inf")
    return value


def _scaled(text: str, number: str, factor: int) -> int:
    value = float(number) * factor if "." in number else int(number) * factor
    if value != int(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(value)
