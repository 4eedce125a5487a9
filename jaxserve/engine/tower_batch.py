"""A call of the tower as arrays: pixels, and one integer vector that is taken apart inside jit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxserve.config import VisionConfig
from jaxserve.engine import packed_vector
from jaxserve.engine.image_batch import cache_rows
from jaxserve.engine.plan import Encode
from jaxserve.engine.tower_lattice import TowerShape
from jaxserve.kernels_pallas.bidirectional import Windows


@dataclass(frozen=True, slots=True)
class TowerBatch:
    """Inputs of a call beside the pixels, inside jit."""

    positions: jax.Array  # [B, P, 2] int32, row and column of each patch
    lengths: jax.Array  # [B] int32
    destinations: jax.Array  # [B, P / M] int32, the row of the cache that each token goes to
    windows: Windows | None


def _layout(shape: TowerShape, merged: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of each part of the vector, in order; `merged` patches make one token."""
    images, patches = shape.num_images, shape.num_patches
    parts: dict[str, tuple[int, ...]] = {
        "positions": (images, patches, 2),
        "lengths": (images,),
        "destinations": (images, patches // merged),
    }
    if shape.num_blocks:
        parts |= {
            "patches": (shape.num_blocks, shape.block_size),
            "windows": (shape.num_blocks, shape.block_size),
            "slots": (images * patches,),
        }
    return parts


def vector_length(shape: TowerShape, merged: int) -> int:
    """Length of the packed vector."""
    return packed_vector.length(_layout(shape, merged))


def pack(
    encodes: Sequence[Encode], shape: TowerShape, vision: VisionConfig, dummy_row: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [B, P, C * patch_size ** 2] uint8, and the vector; tokens of padding go to the cache's `dummy_row`."""
    pixels = np.zeros((shape.num_images, shape.num_patches, vision.frame_values), np.uint8)
    vector = np.zeros(vector_length(shape, vision.merged_patches), np.int32)
    part = packed_vector.views(vector, _layout(shape, vision.merged_patches))
    part["destinations"][:] = dummy_row
    window_of: list[np.ndarray] = []  # of each image's patches, numbered through
    num_windows = 0
    for index, encode in enumerate(encodes):
        image = encode.image
        _, rows, columns = image.grid_thw
        count = rows * columns
        pixels[index, :count] = np.frombuffer(image.pixels, np.uint8).reshape(count, -1)
        positions = _positions(rows, columns, vision.merge_size)
        part["positions"][index, :count] = positions
        part["lengths"][index] = count
        part["destinations"][index, : image.num_tokens] = cache_rows(encode.pages)[: image.num_tokens]
        if vision.window_size is not None:
            down, across = (positions // vision.window_size).T
            windows_across = -(-columns // vision.window_size)
            window_of.append(down * windows_across + across + num_windows)
            num_windows += -(-rows // vision.window_size) * windows_across
    if vision.window_size is not None:
        part["windows"][:] = -1
        starts = [index * shape.num_patches for index in range(len(encodes))]
        _fill_windows(part, window_of, starts, shape)
    return pixels, vector


def unpack(vector: jax.Array, shape: TowerShape, merged: int) -> TowerBatch:
    """Inside jit: the vector's parts, as slices that cost nothing."""
    part = packed_vector.views(vector, _layout(shape, merged))
    windows = Windows(part["patches"], part["windows"], part["slots"]) if shape.num_blocks else None
    return TowerBatch(part["positions"], part["lengths"], part["destinations"], windows)


def _positions(rows: int, columns: int, merge: int) -> np.ndarray:
    """Row and column of each patch [P, 2], in the order in which those that make one token stand together."""
    grid = np.moveaxis(np.indices((rows, columns)), 0, -1)
    groups = grid.reshape(rows // merge, merge, columns // merge, merge, 2)
    return groups.swapaxes(1, 2).reshape(-1, 2)


def _fill_windows(
    part: dict[str, Any], window_of: Sequence[np.ndarray], starts: Sequence[int], shape: TowerShape
) -> None:
    """Put whole windows into blocks, one after the other, the large ones first.  `starts`: where images begin."""
    if not window_of:
        return
    windows = np.concatenate(window_of)
    patches = np.concatenate(
        [start + np.arange(len(own)) for start, own in zip(starts, window_of, strict=True)]
    )
    sizes = np.bincount(windows)
    first_slot = np.zeros(len(sizes), np.int64)
    block = fill = 0
    for window in np.argsort(-sizes, kind="stable"):
        size = int(sizes[window])
        if fill + size > shape.block_size:
            block, fill = block + 1, 0
        first_slot[window] = block * shape.block_size + fill
        fill += size
    assert block < shape.num_blocks, "two neighbouring blocks hold more than one block's worth"
    order = np.argsort(windows, kind="stable")
    ends = np.cumsum(sizes)
    rank = np.arange(len(windows)) - (ends - sizes)[windows[order]]
    slots = first_slot[windows[order]] + rank
    part["patches"].reshape(-1)[slots] = patches[order]
    part["windows"].reshape(-1)[slots] = windows[order]
    part["slots"][patches[order]] = slots
