"""A checkpoint that `jaxserve convert` wrote: every byte of it is checked when it is read."""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from jaxserve.errors import CheckpointError
from jaxserve.loading.checkpoint import TensorInfo
from jaxserve.loading.orbax_format import (
    STATE,
    ChunkIndex,
    FileRecord,
    ParameterLayout,
    chunk_path,
    read_manifest,
)
from jaxserve.loading.safetensors_checkpoint import read_hf_config

if TYPE_CHECKING:
    import jax

    from jaxserve.models.layout import Move

# Read, checked and put where it belongs at once: a block stays in the processor's cache meanwhile.
_BLOCK_BYTES = 2 << 20


class OrbaxCheckpoint:
    """An opened directory; implements jaxserve.loading.checkpoint.ParameterCheckpoint."""

    def __init__(self, directory: Path) -> None:
        """Check the manifest, the size of every file, and the contents of those with text in them.

        Raises CheckpointError, naming the file that is missing, damaged or of another size.
        """
        self.path = directory
        self._manifest = read_manifest(directory)
        self._scratch = threading.local()
        for name, record in self._manifest.files.items():
            if name.startswith(f"{STATE}/"):
                _check_size(directory / name, record.num_bytes)
            else:
                _check_text(directory / name, record)
        for name, layout in self.layouts.items():
            for index in layout.chunks():
                _check_size(directory / chunk_path(name, index), layout.chunk_bytes)
        self.config, self.defaults = read_hf_config(directory)

    @property
    def parameters(self) -> Mapping[str, TensorInfo]:
        """Shapes and dtypes of the parameters, by name."""
        return {name: TensorInfo(layout.shape, layout.dtype) for name, layout in self.layouts.items()}

    @property
    def layouts(self) -> Mapping[str, ParameterLayout]:
        """How each parameter is cut into chunks."""
        return self._manifest.layouts

    def restore(
        self,
        wanted: Mapping[str, jax.ShapeDtypeStruct],
        moves: Mapping[str, Sequence[Move]] | None = None,
        *,
        progress: bool,
    ) -> dict[str, jax.Array]:
        """See ParameterCheckpoint.  Raises CheckpointError, naming it, for a file that is not as it was written."""
        from jaxserve.loading.orbax_restore import restore  # brings jax

        return restore(self, wanted, moves or {}, progress=progress)

    def check_metadata(self) -> None:
        """Check what only Orbax reads."""
        for name, record in self._manifest.files.items():
            if name.startswith(f"{STATE}/"):
                self._check_file(name, record)

    def read(self, name: str) -> np.ndarray:
        """A whole parameter.  Thread-safe."""
        layout = self.layouts[name]
        out = np.empty(layout.shape, layout.numpy_dtype)
        for index in layout.chunks():
            self.read_chunk(name, index, out[layout.box(index)])
        return out

    def read_chunk(self, name: str, index: ChunkIndex, out: np.ndarray) -> None:
        """Fill `out`, an array or a part of one, with a chunk, cast to its dtype.  Thread-safe."""
        layout = self.layouts[name]
        if out.flags.c_contiguous and out.dtype == layout.numpy_dtype:
            with self._open_chunk(name, index) as file:
                file.read_into(out.reshape(-1).view(np.uint8))
            return
        for start, block in self.read_blocks(name, index):
            out[start : start + len(block)] = block

    def read_blocks(self, name: str, index: ChunkIndex) -> Iterator[tuple[int, np.ndarray]]:
        """A chunk in blocks of whole rows, each with the number of its first row.  Thread-safe.

        A block is overwritten by the next.  The checksum is known after the last: go through all of them.
        """
        layout = self.layouts[name]
        num_rows, *row_shape = layout.chunk_shape
        row_bytes = layout.chunk_bytes // num_rows
        step = max(1, _BLOCK_BYTES // row_bytes)
        scratch = self._scratch_of(step * row_bytes)
        with self._open_chunk(name, index) as file:
            for start in range(0, num_rows, step):
                count = min(step, num_rows - start)
                part = scratch[: count * row_bytes]
                file.read_into(part)
                yield start, part.view(layout.numpy_dtype).reshape(count, *row_shape)

    def _open_chunk(self, name: str, index: ChunkIndex) -> _CheckedFile:
        layout = self.layouts[name]
        number = int(np.ravel_multi_index(index, layout.grid))
        record = FileRecord(layout.chunk_bytes, self._manifest.checksums[name][number])
        return _CheckedFile(self.path / chunk_path(name, index), record)

    def _check_file(self, name: str, record: FileRecord) -> None:
        with _CheckedFile(self.path / name, record) as file:
            file.read_into(np.empty(record.num_bytes, np.uint8))

    def _scratch_of(self, num_bytes: int) -> np.ndarray:
        """This thread's own, kept: memory that is new to the process costs more than reading into it."""
        scratch = getattr(self._scratch, "array", None)
        if scratch is None or scratch.size < num_bytes:
            scratch = self._scratch.array = np.empty(num_bytes, np.uint8)
        return scratch


class _CheckedFile:
    """A file that is read from front to back and checked against its record at the end."""

    def __init__(self, path: Path, record: FileRecord) -> None:
        self._path = path
        self._record = record
        self._crc32 = 0
        self._num_bytes = 0

    def __enter__(self) -> _CheckedFile:
        _check_size(self._path, self._record.num_bytes)  # first: what it raises would leave the file open
        try:
            self._file = self._path.open("rb", buffering=0)
        except OSError as error:
            raise _unreadable(self._path, error) from error
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None and (self._num_bytes, self._crc32) != (self._record.num_bytes, self._record.crc32):
            raise CheckpointError(
                f"{self._path}: damaged: its checksum is {self._crc32:08x}, and when it was written it was "
                f"{self._record.crc32:08x}; convert the model again or copy the file once more"
            )

    def read_into(self, out: np.ndarray) -> None:
        """Fill `out`, uint8, with the bytes that come next."""
        view = out.data
        for start in range(0, len(view), _BLOCK_BYTES):
            block = view[start : start + _BLOCK_BYTES]
            filled = 0
            while filled < len(block):
                try:
                    count = self._file.readinto(block[filled:])
                except OSError as error:
                    raise _unreadable(self._path, error) from error
                if not count:
                    raise CheckpointError(f"{self._path}: truncated while it was read")
                filled += count
            self._crc32 = zlib.crc32(block, self._crc32)
            self._num_bytes += len(block)


def _check_text(path: Path, record: FileRecord) -> None:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    if FileRecord.of(data) != record:
        raise CheckpointError(
            f"{path}: damaged or edited: it is not as jaxserve convert wrote it; copy the file once more, or edit the "
            "original and convert that"
        )


def _check_size(path: Path, expected: int) -> None:
    try:
        found = path.stat().st_size
    except OSError as error:
        raise _unreadable(path, error) from error
    if found != expected:
        what = "truncated" if found < expected else "too long"
        raise CheckpointError(
            f"{path}: {what}: expected {expected} bytes, found {found}; convert the model again or copy the "
            "file once more"
        )


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    if isinstance(error, FileNotFoundError):
        return CheckpointError(
            f"{path}: missing; convert the model again or copy the file from where it is whole"
        )
    return CheckpointError(f"{path}: cannot be read: {error.strerror or error}")
