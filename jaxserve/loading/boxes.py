"""Boxes of arrays: which part of a stored parameter goes where in the shards of the array that it becomes.

An array over devices may be larger than the parameter that fills it, have parts of it twice, and hold zeros elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np
from jax.sharding import SingleDeviceSharding

from jaxserve.models.layout import Box, Move

if TYPE_CHECKING:
    import jax


@dataclass(frozen=True, slots=True)
class Piece:
    """A Move into one shard: `target` begins at the shard's own corner."""

    source: Box
    target: Box


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """A part of an array, what fills it, and the devices that want it; None is the default device, uncommitted."""

    box: Box
    pieces: tuple[Piece, ...]
    targets: tuple[SingleDeviceSharding | None, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return box_shape(self.box)

    @property
    def is_covered(self) -> bool:
        """Whether the pieces leave nothing that must be zero."""
        return sum(prod(box_shape(piece.target)) for piece in self.pieces) == prod(self.shape)


def plan_shards(wanted: jax.ShapeDtypeStruct, moves: Sequence[Move] | None = None) -> list[ShardPlan]:
    """The different shards of an array on the devices of this process; without `moves` it is the parameter itself."""
    whole = whole_box(wanted.shape)
    if moves is None:
        moves = [Move(whole, whole)]
    targets: dict[tuple[tuple[int, int], ...], list[SingleDeviceSharding | None]] = {}
    if (sharding := wanted.sharding) is None:
        targets[_bounds(whole)] = [None]
    else:
        for device, index in sharding.addressable_devices_indices_map(wanted.shape).items():
            assert index is not None, "a process reads for its own devices alone"
            bounds = tuple(part.indices(size)[:2] for part, size in zip(index, wanted.shape, strict=True))
            target = SingleDeviceSharding(device, memory_kind=sharding.memory_kind)
            targets.setdefault(bounds, []).append(target)
    plans = []
    for bounds, found in targets.items():
        box = tuple(slice(*bound) for bound in bounds)
        plans.append(ShardPlan(box, tuple(_pieces(box, moves)), tuple(found)))
    return plans


def whole_box(shape: Sequence[int]) -> Box:
    """The box that is all of an array."""
    return tuple(slice(0, size) for size in shape)


def box_shape(box: Box) -> tuple[int, ...]:
    """Sizes of a box."""
    return tuple(part.stop - part.start for part in box)


def box_bytes(box: Box, dtype: np.dtype) -> int:
    """What the numbers of a box take."""
    return prod(box_shape(box)) * np.dtype(dtype).itemsize


def overlap(first: Box, second: Box) -> Box | None:
    """What two boxes have in common, None if that is nothing."""
    common = tuple(
        slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(first, second, strict=True)
    )
    return common if all(part.start < part.stop for part in common) else None


def relative(box: Box, origin: Box) -> Box:
    """A box as seen from the corner of another."""
    return tuple(
        slice(part.start - base.start, part.stop - base.start) for part, base in zip(box, origin, strict=True)
    )


def moved(box: Box, source: Box, target: Box) -> Box:
    """Where a box within `source` comes to lie when that is moved to `target`."""
    return tuple(
        slice(part.start - a.start + b.start, part.stop - a.start + b.start)
        for part, a, b in zip(box, source, target, strict=True)
    )


def _pieces(box: Box, moves: Sequence[Move]) -> list[Piece]:
    found = []
    for move in moves:
        if (common := overlap(move.target, box)) is not None:
            found.append(Piece(moved(common, move.target, move.source), relative(common, box)))
    return found


def _bounds(box: Box) -> tuple[tuple[int, int], ...]:
    return tuple((part.start, part.stop) for part in box)
