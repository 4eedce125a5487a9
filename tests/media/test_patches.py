"""Patches are those of transformers, bit by bit, and sizes keep to their bounds."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jaxserve.config import ImageProcessorConfig
from jaxserve.errors import RequestError
from jaxserve.media.image_file import open_image, upright_rgb
from jaxserve.media.patches import (
    ProcessedImage,
    capped,
    fitted_size,
    max_tokens,
    patches_of,
    size_below,
    with_bounds,
)
from tests.media.photos import CAT, DATA, FORMS

CLIP = ImageProcessorConfig(
    patch_size=14,
    temporal_patch_size=2,
    merge_size=2,
    min_pixels=56 * 56,
    max_pixels=28 * 28 * 16384,
    rescale_factor=1 / 255,
    image_mean=(0.48145466, 0.4578275, 0.40821073),
    image_std=(0.26862954, 0.26130258, 0.27577711),
)
BOUNDS = {
    "as it is": CLIP,
    "smaller": replace(CLIP, max_pixels=28 * 28 * 20),
    "larger": replace(CLIP, min_pixels=28 * 28 * 300, max_pixels=28 * 28 * 1280),
}
GOLDENS = json.loads((DATA / "goldens.json").read_text())


def processed(data: bytes, config: ImageProcessorConfig = CLIP) -> ProcessedImage:
    image = upright_rgb(open_image(data, "image"), "image")
    return patches_of(image, fitted_size(*image.size, config, "image"), config)


def pixel_values(image: ProcessedImage, config: ImageProcessorConfig) -> np.ndarray:
    """As transformers hands them to a model; ImageInput's promise to the vision tower."""
    _, down, across = image.grid_thw
    levels = np.frombuffer(image.pixels, np.uint8).reshape(down * across, 3, 1, config.patch_size**2)
    rescaled = (levels.astype(np.float64) * config.rescale_factor).astype(np.float32)
    mean = np.array(config.image_mean, np.float32)[:, None, None]
    std = np.array(config.image_std, np.float32)[:, None, None]
    values = (rescaled - mean) / std
    return np.repeat(values, config.temporal_patch_size, axis=2).reshape(down * across, -1)


@pytest.mark.parametrize("name", GOLDENS)
def test_patches_are_those_of_transformers(name: str) -> None:
    form, _, size = name.rpartition(", ")
    golden, config = GOLDENS[name], BOUNDS[size]
    image = processed(FORMS[form](), config)
    values = pixel_values(image, config)
    assert list(image.grid_thw) == golden["grid"]
    assert list(values.shape) == golden["shape"]
    assert [float(value) for value in values[:: max(1, len(values) // 3), 500]] == golden["sample"]
    assert hashlib.sha256(values.tobytes()).hexdigest() == golden["sha256"]


def test_a_token_for_each_square_of_patches() -> None:
    image = processed(CAT.read_bytes())
    assert image.num_tokens * 4 == image.grid_thw[1] * image.grid_thw[2]
    assert len(image.pixels) == image.num_tokens * 4 * 3 * 14 * 14


def test_the_hash_tells_contents_and_sizes_apart() -> None:
    cat = CAT.read_bytes()
    grey = [Image.new("RGB", size, "grey") for size in ((56, 112), (112, 56))]
    hashes = {
        processed(cat).content_hash,
        processed(cat, BOUNDS["smaller"]).content_hash,
        processed(FORMS["rocket"]()).content_hash,
        *(
            patches_of(image, image.size, CLIP).content_hash for image in grey
        ),  # the same pixels, another shape
    }
    assert len(hashes) == 5
    assert processed(cat).content_hash in hashes


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 400), st.integers(0, 2000))
def test_sizes_are_whole_tokens_within_bounds(width: int, height: int, low: int, more: int) -> None:
    config = replace(CLIP, min_pixels=low * 784, max_pixels=(low + more) * 784)
    if max(width, height) > 200 * min(width, height):
        with pytest.raises(RequestError, match="one side may be at most 200 times the other"):
            fitted_size(width, height, config, "image")
        return
    fitted = fitted_size(width, height, config, "image")
    assert fitted == fitted_size(height, width, config, "image")[::-1]
    assert all(side % 28 == 0 and side > 0 for side in fitted)
    if min(fitted) > 28:  # what is one token thin cannot be made thinner
        assert fitted[0] * fitted[1] <= max(config.max_pixels, config.min_pixels + 28 * sum(fitted))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"min_pixels": 784, "max_pixels": 1568},
        {"size": {"shortest_edge": 784, "longest_edge": 1568}},
        {"size": {"longest_edge": 1568}, "min_pixels": 784},
    ],
)
def test_bounds_of_a_request(kwargs: dict[str, Any]) -> None:
    config = with_bounds(CLIP, kwargs)
    assert (config.min_pixels, config.max_pixels) == (784, 1568)


def test_bounds_need_be_no_whole_tokens() -> None:
    config = with_bounds(CLIP, {"max_pixels": 1_100_000})
    assert (config.max_pixels, max_tokens(config)) == (1_100_000, 1403)
    assert capped(config, 1403) == config
    assert with_bounds(CLIP, {"max_pixels": 1500}).min_pixels == 784  # the checkpoint's own would be above it
    assert with_bounds(CLIP, {"min_pixels": 1568, "max_pixels": 1569}).min_pixels == 1568


def test_bounds_are_capped_to_what_the_tower_takes() -> None:
    small = capped(CLIP, 3)
    assert (small.min_pixels, small.max_pixels) == (3 * 784, 3 * 784)


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 500))
def test_sizes_below_a_number_of_pixels(width: int, height: int, most: int) -> None:
    across, down = size_below(width, height, most * 784, 28)
    assert across % 28 == down % 28 == 0 < min(across, down)
    assert across * down <= most * 784 or min(across, down) == 28


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_pixels": 0}, "max_pixels must be a number of pixels, at least 1, got 0"),
        ({"max_pixels": True}, "max_pixels must be a number of pixels"),
        ({"max_pixels": "big"}, "max_pixels must be a number of pixels"),
        ({"max_pixels": 783}, "max_pixels must be at least 784, the pixels of one token, got 783"),
        ({"min_pixels": 1000, "max_pixels": 1500}, "min_pixels is 1000, and no image of whole tokens"),
        ({"min_pixels": 10**8}, "min_pixels is 100000000, and no image"),
        ({"num_crops": 4}, "'num_crops' is not known"),
        ({"size": 3}, "size must be an object"),
        ({"size": {"height": 3}}, "size must be an object"),
    ],
)
def test_wrong_bounds(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        with_bounds(CLIP, kwargs)
    assert caught.value.param == "mm_processor_kwargs"
