"""What image files become, and the bad ones that are refused before they cost anything."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from jaxserve.errors import RequestError
from jaxserve.media.image_file import MAX_PIXELS, check_size, num_pixels, open_image, upright_rgb
from tests.media.photos import CAT, FORMS, ROCKET, file_of, turned

WHERE = "messages[0].content[1]"


def decoded(data: bytes) -> Image.Image:
    return upright_rgb(open_image(data, WHERE), WHERE)


def png_head(width: int, height: int) -> bytes:
    """A PNG that says how large it is and has next to nothing inside."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_rgb(form: str) -> None:
    assert decoded(FORMS[form]()).mode == "RGB"


def test_transparent_parts_are_white() -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 255))
    assert np.asarray(decoded(file_of(image))).tolist() == [[[255, 255, 255], [255, 0, 0]]]


def test_grey_of_16_bits_is_not_cut_off() -> None:
    grey = np.asarray(Image.open(io.BytesIO(CAT.read_bytes())).convert("L"))
    scan = Image.fromarray(grey.astype(np.uint16) * 256 + 99)
    for kind in ("PNG", "TIFF"):
        assert np.array_equal(np.asarray(decoded(file_of(scan, kind)))[..., 0], grey)


def test_photographs_of_two_pictures_are_the_first() -> None:
    cat = Image.open(io.BytesIO(CAT.read_bytes()))
    data = file_of(cat, "MPO", save_all=True, append_images=[cat.rotate(180)])  # as telephones write them
    assert np.array_equal(np.asarray(decoded(data)), np.asarray(decoded(file_of(cat, "JPEG"))))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_as_exif_says(orientation: int, kind: str) -> None:
    data = turned(orientation, kind)
    shown = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))  # what viewers do
    assert np.array_equal(np.asarray(decoded(data)), np.asarray(shown))


def test_an_unknown_orientation_is_upright() -> None:
    assert np.array_equal(np.asarray(decoded(turned(77))), np.asarray(decoded(turned(1))))


def test_of_an_animation_the_first_frame() -> None:
    first = Image.open(io.BytesIO(FORMS["animation"]())).convert("RGB")
    assert np.array_equal(np.asarray(decoded(FORMS["animation"]())), np.asarray(first))


@pytest.mark.parametrize("size", [(20_000, 20_000), (10_000, 10_000), (2**31 - 1, 1), (8193, 8192)])
def test_too_many_pixels_are_refused_by_the_head_alone(size: tuple[int, int]) -> None:
    with pytest.raises(RequestError, match="pixels") as caught:
        open_image(png_head(*size), WHERE)
    assert caught.value.param == "messages"
    assert str(caught.value).startswith(WHERE)


@pytest.mark.parametrize("sides", [(16_384, 8192), (1, 2**27), (2**31 - 1, 1)])
def test_tiles_larger_than_their_image_are_counted(sides: tuple[int, int]) -> None:
    with pytest.raises(RequestError, match="tiles of more than"):
        open_image(tiled(*sides), WHERE)


def test_tiles_of_common_sizes_pass() -> None:
    assert num_pixels(open_image(tiled(256, 16), WHERE)) == 256 * 16


def tiled(width: int, height: int) -> bytes:
    """A TIFF of one pixel, in a tile of this size that holds nothing."""
    tags = {256: 1, 257: 1, 258: 8, 259: 8, 262: 1, 277: 1, 322: width, 323: height, 324: 0, 325: 0}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4)


def test_the_largest_images_pass() -> None:
    assert open_image(png_head(8192, 8192), WHERE).size == (8192, 8192)
    assert MAX_PIXELS > 9248 * 6936  # cameras of 64 megapixels


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GIF89a",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",  # Pillow would start Ghostscript for it
        b"%PDF-1.7",
        b"P6 1 1 255 aaa",
        b"\xff\xd8\xff",
        CAT.read_bytes()[:20],
        png_head(0, 5),
    ],
)
def test_what_is_no_image(data: bytes) -> None:
    with pytest.raises(RequestError, match=r"is not an image \(JPEG, PNG, "):
        open_image(data, WHERE)


@pytest.mark.parametrize("path", [CAT, ROCKET])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_files_that_are_cut_off(path, share: float) -> None:
    data = path.read_bytes()
    with pytest.raises(RequestError, match="is a damaged image") as caught:
        decoded(data[: int(len(data) * share)])
    assert caught.value.param == "messages"


def test_an_image_without_pixels() -> None:
    with pytest.raises(RequestError, match="without pixels"):
        check_size(Image.new("RGB", (0, 4)), WHERE)


SMALL = [
    file_of(Image.open(CAT).resize((40, 30)), kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF")
]


@given(st.sampled_from(SMALL), st.integers(0, 10**6), st.binary(min_size=1, max_size=8))
def test_broken_bytes_give_an_image_or_a_refusal(data: bytes, at: int, put: bytes) -> None:
    at %= len(data)
    broken = data[:at] + put + data[at + len(put) :]
    try:
        assert decoded(broken).mode == "RGB"
    except RequestError as error:
        said = str(error)
    else:
        said = WHERE
    assert said.startswith(WHERE)
