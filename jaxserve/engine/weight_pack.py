"""Parameters as programs take them: many in few arrays, and in the order in which products read them.

Every argument of a program costs the host time in every step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxserve.kernels_pallas.matmul import from_rows, to_rows
from jaxserve.kernels_pallas.residual import StackedRow

_SMALL = 32 * 1024  # bytes; larger ones feed matrix products, which want arrays of their own


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
    # leaves stored output by output: what matmul.to_rows is told of their axes
    contracted: Mapping[int, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def plan(
        cls, leaves: Sequence[_HasShape], contracted: Mapping[int, tuple[int, int]] | None = None
    ) -> WeightPack:
        """Decide from the leaves' shapes and dtypes alone.

        `contracted` names leaves to store output by output, with what matmul.to_rows is to be told of their axes.
        """
        contracted = contracted or {}
        leaves = [
            jax.eval_shape(lambda x, axes=contracted[i]: to_rows(x, *axes), _spec(leaf))
            if i in contracted
            else leaf
            for i, leaf in enumerate(leaves)
        ]
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
        return cls(tuple(specs), tuple(places), contracted)

    def pack(self, leaves: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """The arguments; leaves that stand alone are not copied."""
        rows: list[list[jax.Array]] = [[] for _ in self.specs]
        for index, (leaf, (argument, _)) in enumerate(zip(leaves, self.places, strict=True)):
            axes = self.contracted.get(index)
            rows[argument].append(leaf if axes is None else to_rows(leaf, *axes))
        return tuple(jnp.stack(group) if len(group) > 1 else group[0] for group in rows)

    def leaf(self, arguments: Sequence[jax.Array], index: int) -> jax.Array:
        """Leaf `index` as it is stored: output by output if it is in `contracted`."""
        argument, row = self.places[index]
        return arguments[argument] if row is None else arguments[argument][row]

    def unpack(
        self, arguments: Sequence[jax.Array], *, keep_stacks: bool = False
    ) -> list[jax.Array | StackedRow]:
        """Inside a program: the leaves, stacked vectors as StackedRow if `keep_stacks`."""
        leaves: list[Any] = [self.leaf(arguments, index) for index in range(len(self.places))]
        for index, (argument, row) in enumerate(self.places):
            if keep_stacks and row is not None and leaves[index].ndim == 1:
                leaves[index] = StackedRow(arguments[argument], jnp.full((1,), row, jnp.int32))
        for index, axes in self.contracted.items():
            leaves[index] = from_rows(leaves[index], *axes)
        return leaves


def _spec(leaf: _HasShape) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(leaf.dtype))
