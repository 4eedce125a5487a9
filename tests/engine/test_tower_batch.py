"""Images as the tower's arrays: windows against their definition, positions, shapes that always suffice."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest

from jaxserve.config import VisionConfig
from jaxserve.engine.encoder_cache import PAGE_ROWS, EncoderCache
from jaxserve.engine.plan import Encode
from jaxserve.engine.protocol import ImageInput
from jaxserve.engine.tower_batch import pack, unpack
from jaxserve.engine.tower_lattice import build_tower_lattice, settle_tower
from tests.models.vision_cases import PROCESSOR

VISION = VisionConfig(
    num_layers=2,
    hidden_size=16,
    intermediate_size=16,
    num_heads=2,
    patch_size=2,
    temporal_patch_size=2,
    num_channels=3,
    merge_size=2,
    window_size=4,
    full_attention_layers=(1,),
    mrope_sections=(2, 3, 3),
    image_token_id=9,
    image_marker_ids=(8, 9, 10),
)


def encode(rows: int, columns: int, page: int) -> Encode:
    pixels = np.arange(rows * columns * VISION.frame_values).astype(np.uint8).tobytes()
    image = ImageInput(
        pixels=pixels,
        grid_thw=(1, rows, columns),
        content_hash="",
        offset=0,
        num_tokens=rows * columns // 4,
    )
    return Encode(image=image, pages=tuple(range(page, page - (-image.num_tokens // 32))))


def patch_positions(rows: int, columns: int) -> list[tuple[int, int]]:
    """Row and column of each patch, as transformers' processor orders them."""
    return [
        (2 * block_row + row, 2 * block_column + column)
        for block_row, block_column in itertools.product(range(rows // 2), range(columns // 2))
        for row, column in itertools.product(range(2), range(2))
    ]


@pytest.mark.parametrize("seed", range(12))
def test_patches_meet_those_of_their_window(seed: int) -> None:
    rng = random.Random(seed)
    lattice = build_tower_lattice(VISION, max_image_tokens=256, platform="cpu")
    grids = [(2 * rng.randint(1, 12), 2 * rng.randint(1, 12)) for _ in range(rng.choice([1, 1, 2, 4]))]
    if len(grids) > 1:
        grids = [(min(rows, 8), min(columns, 8)) for rows, columns in grids]
    shape = lattice.shape([rows * columns for rows, columns in grids])
    assert shape is not None
    pixels, vector = pack([encode(*grid, page=20 * i) for i, grid in enumerate(grids)], shape, VISION, 999)
    batch = unpack(vector, shape, VISION.merged_patches)  # type: ignore[arg-type]  # numpy does as well
    assert batch.windows is not None
    window_in_slot = np.asarray(batch.windows.windows).ravel()
    patch_in_slot = np.asarray(batch.windows.patches).ravel()
    neighbours: dict[tuple[int, int, int], set[int]] = {}
    for index, (rows, columns) in enumerate(grids):
        assert batch.lengths[index] == rows * columns
        for patch, (row, column) in enumerate(patch_positions(rows, columns)):
            assert tuple(batch.positions[index, patch]) == (row, column)
            own = index * shape.num_patches + patch
            slot = batch.windows.slots[own]
            assert patch_in_slot[slot] == own
            block = slot // shape.block_size * shape.block_size
            same = window_in_slot[block : block + shape.block_size] == window_in_slot[slot]
            meets = set(patch_in_slot[block : block + shape.block_size][same].tolist())
            assert neighbours.setdefault((index, row // 4, column // 4), meets) == meets
        tokens = rows * columns // 4
        destinations = np.asarray(batch.destinations[index])
        assert destinations[:tokens].tolist() == list(range(640 * index, 640 * index + tokens))
        assert set(destinations[tokens:].tolist()) <= {999}
        assert pixels[index, : rows * columns].tobytes() == encode(rows, columns, 0).image.pixels
    assert sum(len(meets) for meets in neighbours.values()) == sum(r * c for r, c in grids)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_there_is_a_call_for_every_image_up_to_the_largest(platform: str) -> None:
    lattice = build_tower_lattice(VISION, max_image_tokens=1500, platform=platform)
    for tokens in range(1, 1501):
        shape = lattice.shape([4 * tokens])
        assert shape is not None
        assert shape.num_images * shape.num_patches <= max(4 * 4 * tokens, 1024)
    assert len({shape.name for shape in lattice.shapes}) == len(lattice.shapes) <= 12
    assert lattice.shape([10**6]) is None
    small = lattice.shape([60, 60, 60])
    assert small is not None
    assert small.num_images >= 3


@pytest.mark.parametrize("tokens", [10, 9000, 9009])
def test_two_of_the_largest_images_fit_into_the_cache(tokens: int) -> None:
    processor = replace(PROCESSOR, patch_size=VISION.patch_size)
    settings = settle_tower(
        VISION,
        processor,
        max_pixels=tokens * processor.token_pixels**2,
        max_model_len=20_000,
        platform="gpu",
    )
    assert settings.lattice.max_image_tokens == tokens
    cache = EncoderCache(settings.cache_rows // PAGE_ROWS)
    assert cache.make_room("first", tokens) is not None
    assert cache.make_room("second", tokens) is not None
