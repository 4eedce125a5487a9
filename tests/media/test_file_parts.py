"""Files that would keep a decoder busy for minutes are refused unread; photographs are not."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from jaxserve.errors import RequestError
from jaxserve.media.file_parts import MAX_PARTS, Parts, parts_of
from jaxserve.media.image_file import open_image
from tests.media.photos import CAT, FORMS, file_of

WHERE = "messages[0].content[0]"
MANY = MAX_PARTS + 100
SMALL = Image.new("L", (16, 16), 128)
JPEG, PNG, GIF, BMP = (file_of(SMALL, kind) for kind in ("JPEG", "PNG", "GIF", "BMP"))


def chunk(name: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def tiff(num_strips: int, order: str = "<", *, mark: bytes = b"", kind: int = 4) -> bytes:
    tags = [(tag, 3, 1, value) for tag, value in ((256, 8), (257, 8), (258, 8), (259, 1), (262, 1), (278, 1))]
    at = 8 + 2 + 12 * (len(tags) + 2) + 4
    tags += [(273, kind, num_strips, at), (279, kind, num_strips, at + 4 * num_strips)]
    head = mark or (b"II*\0" if order == "<" else b"MM\0*")
    fields = b"".join(struct.pack(f"{order}HHII", *tag) for tag in tags)
    places = (
        struct.pack(f"{order}I", at + 8 * num_strips) * num_strips + struct.pack(f"{order}I", 8) * num_strips
    )
    return head + struct.pack(f"{order}IH", 8, len(tags)) + fields + bytes(4) + places + bytes(64)


BIG_TIFF = file_of(SMALL, "TIFF", big_tiff=True)


def progressive(side: int, more_scans: int) -> bytes:
    """A JPEG whose last scan comes again and again; libjpeg reads it each time."""
    data = file_of(Image.new("L", (side, side), 128), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + scan * more_scans + b"\xff\xd9"


BUSY: dict[str, Callable[[], bytes]] = {
    "PNG, unknown chunks": lambda: PNG[:33] + chunk(b"abCd") * MANY + PNG[33:],
    "PNG, behind the image": lambda: PNG[:-12] + chunk(b"abCd") * MANY + PNG[-12:],
    "PNG, an image in pieces": lambda: PNG[:33] + chunk(b"IDAT") * MANY + PNG[33:],
    "JPEG, segments": lambda: JPEG[:2] + b"\xff\xe5\0\2" * MANY + JPEG[2:],
    "JPEG, segments behind an end": lambda: JPEG[:2] + b"\xff\xd9" + b"\xff\xe5\0\2" * MANY + JPEG[2:],
    "JPEG, segments in one that is none": lambda: (
        JPEG[:2] + (b"\xff\xf0\xff\xff" + b"\xff\xe5\0\2" * 16383) * 5 + JPEG[2:]
    ),
    "JPEG, filling bytes": lambda: JPEG[:2] + b"\xff" * MANY + JPEG[2:],
    "JPEG, other bytes": lambda: JPEG[:2] + b"\xff\xe5\0\2" + b"\1" * MANY + JPEG[2:],
    "JPEG, scans": lambda: progressive(16, MANY),
    "GIF, extensions": lambda: GIF[: GIF.index(b",")] + b"!\xfe\0" * MANY + GIF[GIF.index(b",") :],
    "GIF, an extension": lambda: (
        GIF[: GIF.index(b",")] + b"!\xfe" + b"\1a" * MANY + b"\0" + GIF[GIF.index(b",") :]
    ),
    "BMP, runs": lambda: BMP[:30] + b"\1" + BMP[31:] + b"\1\0" * 8 * MANY,
    "TIFF, strips": lambda: tiff(MANY),
    "TIFF, the other way round": lambda: tiff(MANY, ">"),
    "TIFF, strips that bytes tell of": lambda: tiff(MANY, kind=1),
    "TIFF, a wrong mark": lambda: tiff(MANY, ">", mark=b"MM*\0"),
}


@pytest.mark.parametrize("name", BUSY)
def test_too_many_parts(name: str) -> None:
    data = BUSY[name]()
    assert parts_of(data).count > MAX_PARTS
    with pytest.raises(RequestError, match=r"content\[0\] is a file of more than 65536 parts"):
        open_image(data, WHERE)


def test_too_many_scans_for_the_size_of_an_image() -> None:
    assert open_image(progressive(16, 200), WHERE).size == (16, 16)
    usual = progressive(8000, 0)
    assert parts_of(usual).scans == 6
    assert open_image(usual, WHERE).size == (8000, 8000)
    with pytest.raises(RequestError, match="has 26 scans, too many for an image of its size"):
        open_image(progressive(8000, 20), WHERE)


@pytest.mark.parametrize("form", FORMS)
def test_photographs_have_few_parts(form: str) -> None:
    parts = parts_of(FORMS[form]())
    assert parts.count < 1000
    assert parts.scans < 16


def test_what_is_counted() -> None:
    cat = Image.open(CAT)
    assert parts_of(file_of(cat, "JPEG")).scans == 1
    assert parts_of(file_of(cat, "JPEG", progressive=True)).scans == 10
    with_thumbnail = file_of(cat, "JPEG", exif=b"Exif\0\0" + file_of(cat.resize((99, 99)), "JPEG"))
    assert parts_of(with_thumbnail).scans == 1  # what is inside a segment is none of it
    assert parts_of(tiff(8)).count == 6 + 2 * 8
    assert 8 < parts_of(BIG_TIFF).count < 100
    assert parts_of(PNG) == Parts(2)
    assert parts_of(BMP + bytes(10**7)) == Parts(0)
    oldest = b"BM" + struct.pack("<IHHIIHHHH", 0, 0, 0, 26, 12, 1000, 1000, 1, 24)
    assert parts_of(oldest + b"\0\0\0\0\1\0\0\0" + bytes(3 * 10**6)) == Parts(0)


@given(st.sampled_from([JPEG, PNG, GIF, BMP, tiff(8), tiff(8, ">"), BIG_TIFF, CAT.read_bytes()]), st.data())
@example(b"II+\0" + b"\xff" * 50, None)
def test_broken_files_are_counted_as_far_as_they_go(whole: bytes, data: st.DataObject | None) -> None:
    if data is None:
        assert parts_of(whole) == Parts()
        return
    at = data.draw(st.integers(0, min(len(whole), 400)))
    broken = whole[:at] + data.draw(st.binary(max_size=12)) + whole[at + data.draw(st.integers(0, 12)) :]
    cut = broken[: data.draw(st.integers(0, len(broken)))]
    assert parts_of(cut).count >= 0
    if not whole.startswith((b"II", b"MM")):  # whose fields say how many they have
        assert parts_of(cut).count <= len(cut)
