"""Reads the header of one .safetensors file, and tensors out of it."""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np

from jaxserve.errors import CheckpointError

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One entry of the header."""

    dtype: str  # the format's name of it: "BF16"
    shape: tuple[int, ...]
    begin: int  # in bytes from the beginning of the file
    end: int


class SafetensorsFile:
    """One mapped file, checked when opened: a truncated, padded or patched file is refused by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: Mapping[str, StoredTensor] = read_safetensors_header(path)
        self._map = map_file(path)
        self._data = np.frombuffer(self._map, np.uint8)

    def read(self, name: str) -> np.ndarray:
        """The tensor as a read-only view of the file (F64 as a float32 copy).  Thread-safe."""
        tensor = self.tensors[name]
        dtype = _DTYPES[tensor.dtype]
        view = self._data[tensor.begin : tensor.end].view(dtype).reshape(tensor.shape)
        if tensor.dtype == "F64":
            return view.astype(np.float32)
        # Headers of odd length leave the data misaligned: copied then.
        return np.require(view, requirements="A")

    def release(self, name: str) -> None:
        """See Checkpoint.release."""
        release(self._map, self.tensors[name].begin, self.tensors[name].end)


def map_file(path: Path) -> mmap.mmap:
    """A file's bytes, read when they are looked at."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def release(mapped: mmap.mmap, begin: int, end: int) -> None:
    """Drop the whole pages of a stretch from this process's memory; looking at them brings them back."""
    begin = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
    end = end // mmap.PAGESIZE * mmap.PAGESIZE
    if begin < end:
        mapped.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def read_safetensors_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file whose header and size agree to the byte.  Raises CheckpointError otherwise."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if len(start) < 8:
                raise CheckpointError(
                    f"{path}: truncated: {size} bytes do not even hold a safetensors header"
                )
            if start == b"version ":
                raise CheckpointError(
                    f"{path}: a Git LFS pointer, not the weights; run `git lfs pull` where it came from"
                )
            header_bytes = int.from_bytes(start, "little")
            if header_bytes > _MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path}: not a safetensors file (its header would have {header_bytes} bytes)"
                )
            if 8 + header_bytes > size:
                raise CheckpointError(
                    f"{path}: truncated: expected a header of {8 + header_bytes} bytes, found {size} in all"
                )
            text = file.read(header_bytes)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        header = json.loads(text, object_pairs_hook=_refuse_duplicates)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise CheckpointError(f"{path}: damaged: its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: damaged: its header is not a JSON object")
    header.pop("__metadata__", None)
    tensors = {name: _parse_entry(path, name, entry, 8 + header_bytes) for name, entry in header.items()}
    _check_extent(path, size, 8 + header_bytes, tensors)
    return tensors


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a key stands there twice")
    return entries


def _parse_entry(path: Path, name: str, entry: object, data_start: int) -> StoredTensor:
    if not isinstance(entry, dict):
        raise CheckpointError(f"{path}: damaged: the header's entry of {name!r} is not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{path}: damaged: the header's entry of {name!r} is {entry}")
    if dtype not in _DTYPES:
        raise CheckpointError(
            f"{path}: tensor {name!r} is stored as {dtype}; only {', '.join(_DTYPES)} can be served "
            "(quantised checkpoints are not supported)"
        )
    expected = math.prod(shape) * _DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != expected:
        raise CheckpointError(
            f"{path}: damaged: tensor {name!r}, {dtype} of shape {tuple(shape)}, needs {expected} bytes, "
            f"but its data_offsets {offsets} span {offsets[1] - offsets[0]}"
        )
    return StoredTensor(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _is_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _check_extent(path: Path, size: int, data_start: int, tensors: Mapping[str, StoredTensor]) -> None:
    """The format allows no hole, no overlap and nothing after the last tensor."""
    expected = data_start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != expected:
            raise CheckpointError(
                f"{path}: damaged: the data of {name!r} begins at byte {tensor.begin}, not {expected}, where "
                "the tensor before it ends"
            )
        expected = tensor.end
    if size != expected:
        what = "truncated" if size < expected else "too long"
        raise CheckpointError(f"{path}: {what}: expected {expected} bytes, found {size}; fetch it again")
