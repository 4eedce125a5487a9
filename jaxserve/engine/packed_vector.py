"""Several arrays of integers in one vector, for one transfer: its parts by name, on the host and inside jit."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

Layout = Mapping[str, tuple[int, ...]]  # name and shape of each part, in order


def length(layout: Layout) -> int:
    """Length of the vector."""
    return sum(map(prod, layout.values()))


def views(vector: Any, layout: Layout) -> dict[str, Any]:
    """Views (numpy) or slices that cost nothing (jax) of the vector's parts."""
    found, offset = {}, 0
    for name, shape in layout.items():
        size = prod(shape)
        found[name] = vector[offset : offset + size].reshape(shape)
        offset += size
    return found
