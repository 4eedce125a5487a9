"""Decodes image files of strangers: known formats only, and nothing large before its size is known."""

from __future__ import annotations

import io
import struct
from math import prod

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from jaxserve.media.file_parts import MAX_PARTS, parts_of
from jaxserve.media.refusal import refused

# What browsers show, and scans.  Pillow knows many more, some of which start programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
MAX_PIXELS = 64 * 1024 * 1024  # 192 MiB of RGB; cameras of 50 megapixels stay below
MAX_SCANNED = 16 * MAX_PIXELS  # pixels of all scans of a JPEG: usual progressive ones have 10

_ORIENTATION = 0x0112  # EXIF's tag
_TILE_SIDES = (322, 323)  # TIFF's tags
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(data: bytes, where: str) -> Image.Image:
    """An image of which only the head has been read.

    Raises RequestError for what is no image, has too many pixels, or would keep a decoder busy for very long.
    """
    parts = parts_of(data)
    if parts.count > MAX_PARTS:
        raise refused(where, f"is a file of more than {MAX_PARTS} parts")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # the latter if an error
        raise refused(where, f"has more than {MAX_PIXELS} pixels") from error
    except Exception as error:  # decoders raise anything for broken files
        raise refused(where, f"is not an image ({', '.join(FORMATS)} are known)") from error
    check_size(image, where)
    if parts.scans * num_pixels(image) > MAX_SCANNED:
        raise refused(where, f"has {parts.scans} scans, too many for an image of its size")
    return image


def check_size(image: Image.Image, where: str) -> None:
    """Raise RequestError for an image that is empty or has too many pixels."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise refused(where, f"has {width} x {height} pixels; at most {MAX_PIXELS} in all are taken")
    if num_pixels(image) > MAX_PIXELS:
        raise refused(where, f"has tiles of more than {MAX_PIXELS} pixels in all")
    if not width or not height:
        raise refused(where, "is an image without pixels")


def num_pixels(image: Image.Image) -> int:
    """How many pixels are decoded for an image: tiles of TIFFs may be larger than it, and are decoded whole."""
    sides = image.size
    if isinstance(image, TiffImageFile):
        tiles = [image.tag_v2.get(tag) for tag in _TILE_SIDES]
        sides = (
            -(-side // tile) * tile if isinstance(tile, int) and tile > 0 else side
            for side, tile in zip(sides, tiles, strict=True)
        )
    return prod(sides)


def upright_rgb(image: Image.Image, where: str) -> Image.Image:
    """The decoded image as transformers and vLLM give it to a model; `image` itself where nothing is to be done.

    Of an animation the first frame; turned as its EXIF orientation says; transparent parts on white.  Grey of 16 bits
    is brought to 8, which those two do not do.

    Raises RequestError for a file that is cut off or broken.
    """
    try:
        image.load()  # after which TIFF's are upright, and say so
        orientation = _orientation(image)
        if "A" in image.getbands() or "transparency" in image.info:
            image = image if image.mode == "RGBA" else image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image)
        if image.mode.startswith("I;16"):  # Pillow would cut off: nearly every scan would be white
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode != "RGB":
            image = image.convert("RGB")
        return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image
    except Exception as error:  # decoders raise anything for broken files
        raise refused(where, f"is a damaged image: {str(error) or type(error).__name__:.100}") from error


def _orientation(image: Image.Image) -> int:
    """1 (upright) where EXIF says nothing or is broken: viewers show such photographs as they are, too."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, struct.error, UserWarning):
        return 1
