"""What tells one checkpoint's weights from another's without reading all of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from jaxserve.errors import CheckpointError
from jaxserve.loading.checkpoint import AnyCheckpoint
from jaxserve.loading.orbax_format import is_converted, read_manifest
from jaxserve.loading.safetensors_checkpoint import SafetensorsCheckpoint

_NUM_SAMPLES = 64  # of a file
_SAMPLE_BYTES = 4096


def weights_digest(checkpoint: AnyCheckpoint) -> str:
    """The same for copies of a checkpoint; others, one that was trained further say, have another.

    A converted checkpoint has the checksums of its weights in its manifest.  Of other files the sizes and samples are
    looked at.
    """
    digest = hashlib.sha256()
    for part in _parts(checkpoint):
        digest.update(part)
    return digest.hexdigest()[:16]


def _parts(checkpoint: AnyCheckpoint) -> Iterator[bytes]:
    path = checkpoint.path
    if is_converted(path):
        yield repr(sorted(read_manifest(path).checksums.items())).encode()
        return
    is_directory = isinstance(checkpoint, SafetensorsCheckpoint)
    for file in checkpoint.files if is_directory else [path] if path.is_file() else []:
        try:
            yield from _samples(file)
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from error


def _samples(file: Path) -> Iterator[bytes]:
    with file.open("rb", buffering=0) as opened:
        size = os.fstat(opened.fileno()).st_size
        yield size.to_bytes(8, "big")
        for start in range(0, size, max(_SAMPLE_BYTES, size // _NUM_SAMPLES)):
            opened.seek(start)
            yield opened.read(_SAMPLE_BYTES)
