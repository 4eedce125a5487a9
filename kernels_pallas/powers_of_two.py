"""Powers of two, the only sizes that arrays in Triton's programs can have."""

from __future__ import annotations


def power_of_two_below(number: int) -> int:
    """The largest power of two up to `number`, which is 1 or more."""
    return 1 << (number.bit_length() - 1)


def power_of_two_parts(size: int) -> list[tuple[int, int]]:
    """0 : size cut into parts as long as powers of two, (start, length) each: 80 is 64 and 16."""
    parts, start = [], 0
    while start < size:
        length = power_of_two_below(size - start)
        parts.append((start, length))
        start += length
    return parts
