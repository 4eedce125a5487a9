"""Counts what image files are made of: the parts that decoders go through one by one, however small each is."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

MAX_PARTS = 65_536  # chunks, segments, strips; large photographs have some thousands

_JPEG, _PNG, _GIF = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", (b"GIF87a", b"GIF89a")
_TIFF = re.compile(rb"(II|MM)(?:\0[*+]|[*+]\0)")
_BYTES = (1, 2, 7)  # TIFF's types of fields that are read as one piece,
_ONE_BY_ONE = (273, 279, 320, 324, 325)  # but for strips, tiles and colours, whatever their type
_OLDEST_BMP = 12  # bytes of a head without compression, behind which the image begins
_MARKER = re.compile(rb"\xff[^\x00\xff]")
_BEHIND_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
# Those that decoders skip as a whole.  Others are skipped alone, so that nothing can hide in what they claim to be.
_WITH_LENGTH = frozenset((*range(0xC0, 0xC8), *range(0xC9, 0xD0), *range(0xDA, 0xF0), 0xFE))


@dataclass(frozen=True, slots=True)
class Parts:
    """How many parts a file has, counted little further than MAX_PARTS."""

    count: int = 0
    scans: int = 1  # of a JPEG: times that a decoder goes over the whole image


def parts_of(data: bytes) -> Parts:
    """The parts of a file.  Those of a kind that is not known here, or has no such parts, are not counted.

    Files that are cut off or broken are counted as far as decoders would read them.
    """
    try:
        if data.startswith(_JPEG):
            return _jpeg(data)
        if data.startswith(_PNG):
            return Parts(_png(data))
        if data.startswith(_GIF):
            return Parts(_gif(data))
        if data.startswith(b"BM"):
            return Parts(_bmp(data))
        if _TIFF.match(data):
            return Parts(_tiff(data, "<" if data.startswith(b"II") else ">", is_big=data[2:3] == b"+"))
    except (IndexError, struct.error):  # it ends where it should not, which its decoder will notice
        pass
    return Parts()


def _jpeg(data: bytes) -> Parts:
    count = scans = 0
    at, pattern = 2, _MARKER
    while count <= MAX_PARTS and (match := pattern.search(data, at)):
        # What is no marker is looked over byte by byte; within a scan, it is the scan.
        count += 1 if pattern is _BEHIND_SCAN else 1 + match.start() - at
        at, pattern = match.end(), _MARKER
        marker = data[at - 1]
        if marker == _END_OF_IMAGE and scans:
            break
        if marker in _WITH_LENGTH:
            at += int.from_bytes(data[at : at + 2])
        if marker == _START_OF_SCAN:
            scans += 1
            pattern = _BEHIND_SCAN
    return Parts(count, scans)


def _png(data: bytes) -> int:
    count, at = 0, len(_PNG)
    while count <= MAX_PARTS and at < len(data) and data[at + 4 : at + 8] != b"IEND":
        count += 1
        at += 12 + int.from_bytes(data[at : at + 4])
    return count


def _gif(data: bytes) -> int:
    """Those before the first image."""
    flags, count, at = data[10], 0, 13
    if flags & 0x80:
        at += 3 << ((flags & 7) + 1)
    while count <= MAX_PARTS and data[at : at + 1] not in (b"", b",", b";"):
        is_extension = data[at : at + 1] == b"!"
        at += 2 if is_extension else 1
        count += 1
        while is_extension and count <= MAX_PARTS and data[at]:
            count += 1
            at += 1 + data[at]
        at += is_extension
    return count


def _bmp(data: bytes) -> int:
    """Runs of one that is compressed, which nobody has compressed for decades; so many a run are a mebibyte."""
    size_of_head, compression = *_unpacked("<I", data, 14), *_unpacked("<I", data, 30)
    return len(data) // 16 if size_of_head > _OLDEST_BMP and compression in (1, 2) else 0


def _tiff(data: bytes, order: str, *, is_big: bool) -> int:
    """Those of the first image: numbers in its fields, of which strips and tiles have one each."""
    entry, number = (f"{order}HHQQ", f"{order}Q") if is_big else (f"{order}HHII", f"{order}I")
    (at,) = _unpacked(number, data, 8 if is_big else 4)
    of_entries = f"{order}Q" if is_big else f"{order}H"
    (num_entries,) = _unpacked(of_entries, data, at)
    at += struct.calcsize(of_entries)
    count = 0
    for i in range(min(num_entries, MAX_PARTS + 1)):
        tag, kind, length, _ = _unpacked(entry, data, at + i * struct.calcsize(entry))
        count += 1 if kind in _BYTES and tag not in _ONE_BY_ONE else length
        if count > MAX_PARTS:
            break
    return count


def _unpacked(form: str, data: bytes, at: int) -> tuple[int, ...]:
    """Numbers at a place that a file names, which may be anywhere: struct.error where it is not in the file."""
    return struct.unpack(form, data[at : at + struct.calcsize(form)])
