"""From an RGB image to the patches of a vision tower, by the rules of transformers' Qwen2VLImageProcessor."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from jaxserve.config import ImageProcessorConfig
from jaxserve.errors import ConfigError, RequestError
from jaxserve.media.refusal import refused

if TYPE_CHECKING:
    from jaxserve.media.pixel_budget import PixelHold

MAX_RATIO = 200  # of an image's sides, transformers' limit


@dataclass(frozen=True, slots=True)
class ProcessedImage:
    """An image as the engine takes it, before its place in a prompt is known (see engine.protocol.ImageInput)."""

    pixels: bytes  # uint8 [h * w, 3, patch_size, patch_size]
    grid_thw: tuple[int, int, int]
    content_hash: str
    num_tokens: int
    hold: PixelHold | None = None  # of all images of its request, while that waits for the engine


def with_bounds(config: ImageProcessorConfig, kwargs: Mapping[str, Any]) -> ImageProcessorConfig:
    """`config` with the bounds of a request or operator (mm_processor_kwargs).

    `kwargs` has min_pixels and max_pixels, or size with shortest_edge and longest_edge, which mean the same.  They
    need be no multiples of a token's pixels.

    Raises RequestError (param "mm_processor_kwargs"), also for bounds that no whole number of tokens lies between.
    """
    given = dict(kwargs)
    size = given.pop("size", None)
    if size is not None:
        if not isinstance(size, Mapping) or not {"shortest_edge", "longest_edge"}.issuperset(size):
            raise _wrong(f"size must be an object with shortest_edge and longest_edge, got {size!r:.60}")
        for edge, name in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):
            if edge in size:
                given.setdefault(name, size[edge])
    for name, value in given.items():
        if name not in ("min_pixels", "max_pixels"):
            raise _wrong(f"{name!r:.60} is not known here; min_pixels, max_pixels and size are")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise _wrong(f"{name} must be a number of pixels, at least 1, got {value!r:.60}")
    side = config.token_pixels
    high = given.get("max_pixels", config.max_pixels)
    whole = high // side**2 * side**2
    low = given.get("min_pixels", min(config.min_pixels, whole))
    if not whole:
        raise _wrong(f"max_pixels must be at least {side**2}, the pixels of one token, got {high}")
    if low > whole:
        raise _wrong(
            f"min_pixels is {low}, and no image of whole tokens ({side} x {side} pixels each) lies between it and "
            f"max_pixels, which is {high}"
        )
    return replace(config, min_pixels=low, max_pixels=high)


def operators_processor(config: ImageProcessorConfig, kwargs: Mapping[str, Any]) -> ImageProcessorConfig:
    """A checkpoint's settings with the operator's bounds.  Raises ConfigError for bounds that are wrong."""
    try:
        return with_bounds(config, kwargs)
    except RequestError as error:
        raise ConfigError(str(error)) from error


def max_tokens(config: ImageProcessorConfig) -> int:
    """Tokens of the largest image within the bounds."""
    return config.max_pixels // config.token_pixels**2


def capped(config: ImageProcessorConfig, num_tokens: int) -> ImageProcessorConfig:
    """`config` with bounds of at most `num_tokens` tokens."""
    if max_tokens(config) <= num_tokens:
        return config
    most = num_tokens * config.token_pixels**2
    return replace(config, min_pixels=min(config.min_pixels, most), max_pixels=most)


def fitted_size(width: int, height: int, config: ImageProcessorConfig, where: str) -> tuple[int, int]:
    """The width and height that an image is brought to: about its own proportions, in whole tokens, within bounds.

    One that is enlarged to min_pixels may get a few tokens more than max_pixels has, as in transformers.

    Raises RequestError for an image that is too long and thin.
    """
    if max(width, height) / min(width, height) > MAX_RATIO:
        raise refused(
            where, f"has {width} x {height} pixels; one side may be at most {MAX_RATIO} times the other"
        )
    side = config.token_pixels
    across, down = round(width / side), round(height / side)  # halves to even, as in transformers
    if across * down * side * side > config.max_pixels:
        return size_below(width, height, config.max_pixels, side)
    if across * down * side * side < config.min_pixels:
        enlarged = math.sqrt(config.min_pixels / (width * height))
        across = math.ceil(width * enlarged / side)
        down = math.ceil(height * enlarged / side)
    return across * side, down * side


def size_below(width: int, height: int, pixels: int, side: int) -> tuple[int, int]:
    """The size with about these proportions and whole tokens of `side` x `side` that has at most `pixels`.

    What becomes one token thin may still have more.
    """
    shrunk = math.sqrt(width * height / pixels)
    across = max(1, math.floor(width / shrunk / side))
    down = max(1, math.floor(height / shrunk / side))
    return across * side, down * side


def patches_of(image: Image.Image, size: tuple[int, int], config: ImageProcessorConfig) -> ProcessedImage:
    """The patches of an RGB image that is brought to `size` first (see fitted_size)."""
    width, height = size
    patch, merge, side = config.patch_size, config.merge_size, config.token_pixels
    pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    # [tokens down, patches of a token down, rows of a patch, and the same across, colours]
    parts = pixels.reshape(height // side, merge, patch, width // side, merge, patch, 3)
    data = parts.transpose(0, 3, 1, 4, 6, 2, 5).tobytes()
    grid = (1, height // patch, width // patch)
    digest = hashlib.sha256(repr(grid).encode())
    digest.update(data)
    return ProcessedImage(data, grid, digest.hexdigest(), (width // side) * (height // side))


def _wrong(message: str) -> RequestError:
    return RequestError(f"mm_processor_kwargs: {message}.", param="mm_processor_kwargs")
