"""Parameters as programs take them: many in few arrays, and in the order in which products read them.

Every argument of a program costs the host time in every step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jaxserve.kernels_pallas.matmul import from_rows, rows_order, to_rows
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
            _to_rows(_spec(leaf), contracted[i]) if i in contracted else _spec(leaf)
            for i, leaf in enumerate(leaves)
        ]
        alike: dict[tuple[tuple[int, ...], str, Sharding | None], list[int]] = defaultdict(list)
        for index, leaf in enumerate(leaves):
            is_small = prod(leaf.shape) * leaf.dtype.itemsize <= _SMALL
            alike[leaf.shape, leaf.dtype.name if is_small else f"{index}", leaf.sharding].append(index)
        specs: list[jax.ShapeDtypeStruct] = []
        places: list[tuple[int, int | None]] = [(0, None)] * len(leaves)
        for group in alike.values():
            first = leaves[group[0]]
            stacked = len(group) > 1
            for row, index in enumerate(group):
                places[index] = (len(specs), row if stacked else None)
            specs.append(_stack(first, len(group)) if stacked else first)
        return cls(tuple(specs), tuple(places), contracted)

    def pack(self, leaves: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """The arguments; leaves that stand alone are not copied."""
        rows: list[list[jax.Array]] = [[] for _ in self.specs]
        for index, (leaf, (argument, _)) in enumerate(zip(leaves, self.places, strict=True)):
            axes = self.contracted.get(index)
            rows[argument].append(leaf if axes is None else to_rows(leaf, *axes))
        packed = [jnp.stack(group) if len(group) > 1 else group[0] for group in rows]
        return tuple(
            array if spec.sharding is None else jax.device_put(array, spec.sharding)
            for array, spec in zip(packed, self.specs, strict=True)
        )

    def leaf(self, arguments: Sequence[jax.Array], index: int) -> jax.Array:
        """Leaf `index` as it is stored: output by output if it is in `contracted`."""
        argument, row = self.places[index]
        return arguments[argument] if row is None else arguments[argument][row]

    def leaf_spec(self, index: int) -> jax.ShapeDtypeStruct:
        """Shape, dtype and sharding of `leaf`."""
        argument, row = self.places[index]
        return self.specs[argument] if row is None else _row(self.specs[argument])

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
    """The leaf's shape, dtype and, of an abstract one, sharding."""
    sharding = leaf.sharding if isinstance(leaf, jax.ShapeDtypeStruct) else None
    return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(leaf.dtype), sharding=sharding)


def _to_rows(spec: jax.ShapeDtypeStruct, axes: tuple[int, int]) -> jax.ShapeDtypeStruct:
    """What matmul.to_rows makes of an array, and where that lies."""
    order = rows_order(len(spec.shape), *axes)
    return _laid(
        spec, tuple(spec.shape[axis] for axis in order), lambda places: [places[axis] for axis in order]
    )


def _stack(spec: jax.ShapeDtypeStruct, count: int) -> jax.ShapeDtypeStruct:
    """`count` such arrays as one."""
    return _laid(spec, (count, *spec.shape), lambda places: [None, *places])


def _row(spec: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """One of a stack's."""
    return _laid(spec, spec.shape[1:], lambda places: places[1:])


def _laid(
    spec: jax.ShapeDtypeStruct, shape: tuple[int, ...], move: Callable[[list[Any]], list[Any]]
) -> jax.ShapeDtypeStruct:
    """An array of another shape, over the same devices; `move` gives its dimensions' places from those of `spec`."""
    sharding = spec.sharding
    if isinstance(sharding, NamedSharding):
        places = [*sharding.spec, *[None] * (len(spec.shape) - len(sharding.spec))]
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*move(places)))
    return jax.ShapeDtypeStruct(shape, spec.dtype, sharding=sharding)
