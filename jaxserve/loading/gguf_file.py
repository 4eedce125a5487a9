"""Reads the header of a GGUF file: its metadata fields and the table of its tensors."""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from jaxserve.errors import CheckpointError

# The gguf package's own GGUFReader takes 6 s for a vocabulary of 49k tokens and 25 s for one of 152k: it
# wraps every string in numpy arrays.  Reading the same bytes plainly takes a quarter of a second.

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # 1 had 32-bit lengths and vanished within weeks of its birth
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
_STRING, _ARRAY = 8, 9
_SCALARS = {  # value type of the GGUF specification -> struct code, numpy dtype
    0: ("<B", "<u1"),
    1: ("<b", "<i1"),
    2: ("<H", "<u2"),
    3: ("<h", "<i2"),
    4: ("<I", "<u4"),
    5: ("<i", "<i4"),
    6: ("<f", "<f4"),
    7: ("<?", "|b1"),
    10: ("<Q", "<u8"),
    11: ("<q", "<i8"),
    12: ("<d", "<f8"),
}


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One line of the tensor table."""

    name: str
    # Slowest axis first, as numpy and Hugging Face write it: GGUF's dimensions reversed.
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int  # of its data, in bytes from the beginning of the file
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """Everything in a GGUF file before the data.  Fields are str, bool, int, float or lists of these."""

    fields: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]


def read_gguf_header(path: Path) -> GGUFHeader:
    """Read and check a header against the file it stands in.

    Raises CheckpointError, naming the file, for anything but a whole little-endian GGUF of version 2 or 3.
    The data of every tensor must lie within the file, in the order and at the alignment llama.cpp asks for.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(24)
        if start.startswith(b"version https://git-lfs"):
            raise CheckpointError(
                f"{path}: a Git LFS pointer, not the weights; run `git lfs pull` where it came from"
            )
        if not _MAGIC.startswith(start[:4]):
            raise CheckpointError(f"{path}: not a GGUF file (it begins with {start[:4]!r}, not {_MAGIC!r})")
        if len(start) < 24:
            raise CheckpointError(f"{path}: truncated: {size} bytes do not even hold a GGUF header")
        version, num_tensors, num_fields = struct.unpack_from("<IQQ", start, 4)
        if version not in _VERSIONS:
            swapped = int.from_bytes(start[4:8], "big") in _VERSIONS
            what = "a big-endian GGUF file" if swapped else f"GGUF version {version}"
            raise CheckpointError(f"{path}: {what} is not supported; convert it to little-endian version 3")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(path, data, size)
            cursor.position = 24
            fields = _read_fields(cursor, num_fields)
            tensors = _read_tensor_table(cursor, num_tensors, _alignment(path, fields))
    _check_extent(path, size, tensors)
    return GGUFHeader(fields, {tensor.name: tensor for tensor in tensors})


class _Cursor:
    """A position in the mapped file that refuses to run over its end."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path = path
        self.data = data
        self.size = size
        self.position = 0

    def take(self, num_bytes: int) -> int:
        """Move on by `num_bytes`, and give the position from before."""
        start = self.position
        if num_bytes > self.size - start:
            raise CheckpointError(
                f"{self.path}: truncated or damaged: its header wants {num_bytes} bytes at offset {start}, "
                f"but the file has {self.size} bytes"
            )
        self.position = start + num_bytes
        return start

    def scalar(self, code: str) -> Any:
        return struct.unpack_from(code, self.data, self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        """`count` strings, each a 64-bit length and UTF-8 bytes.  A lean loop: vocabularies come this way."""
        data, unpack, position = self.data, struct.Struct("<Q").unpack_from, self.position
        raw = []
        try:
            for _ in range(count):
                begin = position + 8
                position = begin + unpack(data, position)[0]
                if position > self.size:
                    break
                raw.append(data[begin:position])
        except struct.error:
            position = self.size + 1
        self.take(position - self.position)
        try:
            return [item.decode() for item in raw]
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{self.path}: damaged: a string of its header is not UTF-8 ({error})"
            ) from error

    def value(self, kind: int, where: str) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            element, count = self.scalar("<I"), self.scalar("<Q")
            if element == _STRING:
                return self.strings(count)
            if element not in _SCALARS:
                raise CheckpointError(f"{self.path}: {where} is an array of unsupported value type {element}")
            dtype = np.dtype(_SCALARS[element][1])
            begin = self.take(count * dtype.itemsize)
            return np.frombuffer(self.data[begin : self.position], dtype).tolist()
        if kind not in _SCALARS:
            raise CheckpointError(f"{self.path}: {where} has unknown value type {kind}")
        return self.scalar(_SCALARS[kind][0])


def _read_fields(cursor: _Cursor, count: int) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.string()
        if key in fields:
            raise CheckpointError(f"{cursor.path}: damaged: field {key!r} stands there twice")
        fields[key] = cursor.value(cursor.scalar("<I"), f"field {key!r}")
    return fields


def _alignment(path: Path, fields: Mapping[str, Any]) -> int:
    alignment = fields.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise CheckpointError(f"{path}: general.alignment is {alignment!r}; it must be a power of two")
    return alignment


def _read_tensor_table(cursor: _Cursor, count: int, alignment: int) -> list[GGUFTensor]:
    def padded(position: int) -> int:
        return -(-position // alignment) * alignment

    rows: list[tuple[str, tuple[int, ...], GGMLQuantizationType, int]] = []
    for _ in range(count):
        name, num_dimensions = cursor.string(), cursor.scalar("<I")
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise CheckpointError(
                f"{cursor.path}: tensor {name!r} has {num_dimensions} dimensions; 1 to 4 are possible"
            )
        shape = tuple(cursor.scalar("<Q") for _ in range(num_dimensions))[::-1]
        kind, offset = cursor.scalar("<I"), cursor.scalar("<Q")
        try:
            rows.append((name, shape, GGMLQuantizationType(kind), offset))
        except ValueError as error:
            raise CheckpointError(
                f"{cursor.path}: tensor {name!r} is stored as unknown type {kind}"
            ) from error

    data_start = padded(cursor.position)
    tensors, names, expected = [], set(), 0
    for name, shape, kind, offset in rows:
        if name in names:
            raise CheckpointError(f"{cursor.path}: damaged: tensor {name!r} stands there twice")
        names.add(name)
        block_size, block_bytes = GGML_QUANT_SIZES[kind]
        if min(shape) < 1 or shape[-1] % block_size:
            raise CheckpointError(
                f"{cursor.path}: tensor {name!r} of shape {shape} cannot be stored as {kind.name}, "
                f"whose rows are multiples of {block_size}"
            )
        if offset != expected:
            raise CheckpointError(
                f"{cursor.path}: damaged: tensor {name!r} is at data offset {offset}, not {expected}"
            )
        num_bytes = math.prod(shape) // block_size * block_bytes
        tensors.append(GGUFTensor(name, shape, kind, data_start + offset, num_bytes))
        expected = padded(offset + num_bytes)
    return tensors


def _check_extent(path: Path, size: int, tensors: list[GGUFTensor]) -> None:
    if not tensors:
        raise CheckpointError(
            f"{path}: holds no tensors (a vocabulary-only file?); give the file with the weights"
        )
    expected = tensors[-1].start + tensors[-1].num_bytes
    if size < expected:
        raise CheckpointError(f"{path}: truncated: expected {expected} bytes, found {size}; fetch it again")
