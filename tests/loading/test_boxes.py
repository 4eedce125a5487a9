"""What fills which part of which shard, against an array built number by number."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import jax
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.loading.boxes import Piece, plan_shards, whole_box
from jaxserve.models.layout import Box, Move


@dataclass
class Sharding:
    """Anything that says which device has which box of an array."""

    boxes: list[Box]
    memory_kind: str | None = None

    def addressable_devices_indices_map(self, shape: tuple[int, ...]) -> dict[Any, Box]:
        del shape
        devices = [FakeDevice(i) for i in range(len(self.boxes))]
        return dict(zip(devices, self.boxes, strict=True))


class FakeDevice:
    def __init__(self, index: int) -> None:
        self.id = index

    def __hash__(self) -> int:
        return self.id


@dataclass(frozen=True)
class Spec:
    shape: tuple[int, ...]
    sharding: Sharding


def cut(data: st.DataObject, size: int) -> list[slice]:
    """A dimension in parts, none of them empty."""
    at = sorted(data.draw(st.sets(st.integers(1, size - 1), max_size=2))) if size > 1 else []
    return [slice(a, b) for a, b in zip([0, *at], [*at, size], strict=True)]


@given(st.data())
def test_pieces_fill_every_shard_as_the_moves_say(data: st.DataObject) -> None:
    num_axes = data.draw(st.integers(1, 3))
    stored = np.arange(1, 1 + 5**num_axes).reshape((5,) * num_axes)
    shape = tuple(data.draw(st.integers(1, 8)) for _ in range(num_axes))
    expected, moves = np.zeros(shape, int), []
    for target in product(*(cut(data, size) for size in shape)):  # disjoint, as those of a layout are
        sizes = [min(part.stop - part.start, 5) for part in target]
        if data.draw(st.booleans()):
            starts = [data.draw(st.integers(0, 5 - size)) for size in sizes]
            source = tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))
            target = tuple(
                slice(part.start, part.start + size) for part, size in zip(target, sizes, strict=True)
            )
            moves.append(Move(source, target))
            expected[target] = stored[source]
    boxes = list(product(*(cut(data, size) for size in shape)))
    boxes += data.draw(st.lists(st.sampled_from(boxes), max_size=2))  # on several devices
    spec: Any = Spec(shape, Sharding(boxes))
    plans = plan_shards(spec, moves)
    assert sum(len(plan.targets) for plan in plans) == len(boxes)
    assert len({str(plan.box) for plan in plans}) == len(plans) == len({str(box) for box in boxes})
    for plan in plans:
        shard = np.zeros(plan.shape, int)
        for piece in plan.pieces:
            shard[piece.target] = stored[piece.source]
        assert (shard == expected[plan.box]).all()
        assert plan.is_covered == bool((shard != 0).all())


def test_without_moves_an_array_is_the_parameter() -> None:
    (plan,) = plan_shards(jax.ShapeDtypeStruct((3, 4), np.float32))
    assert plan.box == whole_box((3, 4))
    assert plan.pieces == (Piece(plan.box, plan.box),)
    assert plan.targets == (None,)
