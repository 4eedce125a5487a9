"""How a converted checkpoint lies on disk: an Orbax checkpoint, and beside it a manifest with checksums.

    DST/jaxserve.json                  the manifest; written last, so that a checkpoint without it is not whole
    DST/config.json, tokenizer.json…   as in a Hugging Face directory
    DST/state/NAME/zarr.json, c.0.1.0  a parameter: a Zarr 3 array whose chunks are plain bytes, a file each
    DST/state/_METADATA, …             what Orbax wants to know: `orbax.checkpoint.v1.load(DST)` reads all of it

Orbax's own `save` wants the whole tree in memory, and its `load` takes a flipped bit for a weight (seen with 0.12.8);
hence the files are written and read here, and only their layout is Orbax's.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxserve.errors import CheckpointError

MANIFEST = "jaxserve.json"
JOURNAL = "jaxserve-conversion.jsonl"  # what a conversion has done so far; see jaxserve.conversion
STATE = "state"  # Orbax's own name for a tree that is saved without giving it one
# Any of these makes a directory an Orbax checkpoint to Orbax; commit_success.txt is what object stores want.
ORBAX_MARKERS = ("orbax.checkpoint", "_CHECKPOINT_METADATA", "commit_success.txt")

_FORMAT = 1
_DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
_PARAMETER_NAME = re.compile(r"\w+(\.\w+)*")

ChunkIndex = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a file was when it was written."""

    num_bytes: int
    crc32: int

    @classmethod
    def of(cls, data: bytes) -> FileRecord:
        """The record of a file with these contents."""
        return cls(len(data), zlib.crc32(data))


@dataclass(frozen=True, slots=True)
class ParameterLayout:
    """How a parameter is stored: cut into equal chunks, `grid` of them along each axis, each in C order."""

    shape: tuple[int, ...]
    dtype: str  # numpy's name
    grid: tuple[int, ...]

    @property
    def numpy_dtype(self) -> np.dtype:
        """`dtype` as numpy knows it, bfloat16 included."""
        return _DTYPES[self.dtype]

    @property
    def num_bytes(self) -> int:
        """Of the whole parameter."""
        return math.prod(self.shape) * self.numpy_dtype.itemsize

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """The same for every chunk: the grid divides the shape."""
        return tuple(size // count for size, count in zip(self.shape, self.grid, strict=True))

    @property
    def chunk_bytes(self) -> int:
        """Of one chunk, and so of its file."""
        return math.prod(self.chunk_shape) * self.numpy_dtype.itemsize

    def chunks(self) -> Iterator[ChunkIndex]:
        """Every chunk, in the order of their checksums."""
        return itertools.product(*map(range, self.grid))

    def box(self, index: ChunkIndex) -> tuple[slice, ...]:
        """Where a chunk lies in its parameter."""
        return tuple(slice(i * size, (i + 1) * size) for i, size in zip(index, self.chunk_shape, strict=True))


@dataclass(frozen=True, slots=True)
class Manifest:
    """All that belongs to a checkpoint, and what its bytes must be."""

    layouts: Mapping[str, ParameterLayout]
    checksums: Mapping[str, tuple[int, ...]]  # CRC-32 of each parameter's chunks
    files: Mapping[str, FileRecord]  # everything else, by its path in the directory


def is_converted(directory: Path) -> bool:
    """Whether a directory is a checkpoint that `jaxserve convert` finished."""
    return (directory / MANIFEST).exists()


def is_unfinished(directory: Path) -> bool:
    """Whether a conversion into this directory was begun and not finished."""
    return (directory / JOURNAL).exists() and not is_converted(directory)


def parameter_directory(name: str) -> str:
    """Where a parameter's files are, as Orbax names it."""
    return f"{STATE}/{name}"


def chunk_path(name: str, index: ChunkIndex) -> str:
    """A chunk's file, as zarr_metadata says that they are named."""
    return f"{STATE}/{name}/c.{'.'.join(map(str, index))}"


def zarr_metadata(layout: ParameterLayout) -> bytes:
    """The zarr.json of a parameter: no compression, which would cost more time than it saves reading weights."""
    return _json(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": layout.shape,
            "data_type": layout.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": layout.chunk_shape}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": 0.0,
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        }
    )


def orbax_files(names: Iterable[str]) -> dict[str, bytes]:
    """What Orbax looks at before it reads the parameters of these names, by path."""
    dictionary_key = 2
    tree = {}
    for name in names:
        keys = name.split(".")
        tree[str(tuple(keys))] = {
            "key_metadata": [{"key": key, "key_type": dictionary_key} for key in keys],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
    now = time.time_ns()
    return {
        f"{STATE}/_METADATA": _json(
            {
                "tree_metadata": tree,
                "use_ocdbt": False,
                "use_zarr3": True,
                "store_array_data_equal_to_fill_value": True,
                "custom_metadata": None,
            }
        ),
        "_CHECKPOINT_METADATA": _json(
            {
                "item_handlers": {},
                "metrics": {},
                "performance_metrics": {},
                "init_timestamp_nsecs": now,
                "commit_timestamp_nsecs": now,
                "custom_metadata": {},
            }
        ),
        "orbax.checkpoint": b"",
        "commit_success.txt": b"Written by jaxserve convert.\n",
    }


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Make the directory a whole checkpoint, in one step; all else must have reached the disk before."""
    contents = {
        "format": _FORMAT,
        "parameters": {
            name: {**asdict(layout), "crc32": manifest.checksums[name]}
            for name, layout in manifest.layouts.items()
        },
        "files": {path: [record.num_bytes, record.crc32] for path, record in manifest.files.items()},
    }
    text = _json({"contents": contents, "crc32": zlib.crc32(_json(contents))})
    temporary = directory / (MANIFEST + ".tmp")
    write_synced(temporary, text)
    temporary.replace(directory / MANIFEST)
    sync_directory(directory)


def read_manifest(directory: Path) -> Manifest:
    """Read a manifest back; CheckpointError, naming it, if it is damaged or of another version."""
    path = directory / MANIFEST
    try:
        whole = json.loads(path.read_bytes())
        contents = whole["contents"]
        is_intact = whole["crc32"] == zlib.crc32(_json(contents))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, LookupError, TypeError):
        is_intact, contents = False, {}
    if not is_intact:
        raise CheckpointError(f"{path}: damaged: it does not have its own checksum; convert the model again")
    if contents["format"] != _FORMAT:
        raise CheckpointError(
            f"{path}: in format {contents['format']}, and this version of jaxserve reads format {_FORMAT}; "
            "convert the model again"
        )
    layouts, checksums = {}, {}
    for name, entry in contents["parameters"].items():
        if not _PARAMETER_NAME.fullmatch(name):
            raise CheckpointError(f"{path}: {name!r} is no parameter's name")
        layouts[name] = ParameterLayout(tuple(entry["shape"]), entry["dtype"], tuple(entry["grid"]))
        checksums[name] = tuple(entry["crc32"])
    files = {name: FileRecord(*record) for name, record in contents["files"].items()}
    for name in files:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{path}: {name!r} is not within the checkpoint")
    return Manifest(layouts, checksums, files)


def write_synced(path: Path, data: bytes | memoryview) -> None:
    """Write a file that is on the disk when this returns."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Have the names in a directory on the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
