"""Many parameters in few arrays: every argument of a program costs the host time in every step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import jax
import jax.numpy as jnp

_SMALL = 256 * 1024  # bytes; larger ones feed matrix products, which want arrays of their own


class _HasShape(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...


@dataclass(frozen=True)
class WeightPack:
    """How a model's leaves stand in the arguments of programs: large ones alone, small ones stacked by shape.

    Inside a program a small leaf is a static slice of its stack, which XLA fuses into whatever reads it.
    """

    specs: tuple[jax.ShapeDtypeStruct, ...]  # of the arguments
    places: tuple[tuple[int, int | None], ...]  # of each leaf: its argument, and its row there

    @classmethod
    def plan(cls, leaves: Sequence[_HasShape]) -> WeightPack:
        """Decide from the leaves' shapes and dtypes alone."""
        alike: dict[tuple[tuple[int, ...], str], list[int]] = defaultdict(list)
        for index, leaf in enumerate(leaves):
            dtype = jnp.dtype(leaf.dtype)
            is_small = prod(leaf.shape) * dtype.itemsize <= _SMALL
            alike[leaf.shape, dtype.name if is_small else f"{index}"].append(index)
        specs: list[jax.ShapeDtypeStruct] = []
        places: list[tuple[int, int | None]] = [(0, None)] * len(leaves)
        for group in alike.values():
            first = leaves[group[0]]
            stacked = len(group) > 1
            for row, index in enumerate(group):
                places[index] = (len(specs), row if stacked else None)
            shape = (len(group), *first.shape) if stacked else first.shape
            specs.append(jax.ShapeDtypeStruct(shape, jnp.dtype(first.dtype)))
        return cls(tuple(specs), tuple(places))

    def pack(self, leaves: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """The arguments; leaves that stand alone are not copied."""
        rows: list[list[jax.Array]] = [[] for _ in self.specs]
        for leaf, (argument, _) in zip(leaves, self.places, strict=True):
            rows[argument].append(leaf)
        return tuple(jnp.stack(group) if len(group) > 1 else group[0] for group in rows)

    def unpack(self, arguments: Sequence[jax.Array]) -> list[jax.Array]:
        """Inside a program: the leaves."""
        return [
            arguments[argument] if row is None else arguments[argument][row] for argument, row in self.places
        ]
