"""How queries weigh keys, in one layer of a model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scoring:
    """Known when a program is traced.  A token sees its own sequence, up to its own position."""

    scale: float  # of a query's product with a key
    window: int | None = None  # how many positions it sees at most, its own included
    soft_cap: float | None = None  # c: a score s becomes c * tanh(s / c)
