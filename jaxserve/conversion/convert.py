"""Writes a checkpoint in our own layout, parameter by parameter: `jaxserve convert`."""

from __future__ import annotations

import errno
import shutil
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve import __version__
from jaxserve.config import Dtype
from jaxserve.conversion.destination import Destination, check_free, open_destination
from jaxserve.conversion.sources import ParameterSource, sources_of
from jaxserve.conversion.texts import text_files
from jaxserve.errors import CheckpointError
from jaxserve.loading.byte_budget import ByteBudget
from jaxserve.loading.checkpoint import Checkpoint
from jaxserve.loading.orbax_checkpoint import OrbaxCheckpoint
from jaxserve.loading.orbax_format import (
    STATE,
    FileRecord,
    chunk_path,
    parameter_directory,
    write_synced,
)
from jaxserve.loading.resolve import locate_tokenizer, open_checkpoint
from jaxserve.progress import progress_bar

_NUM_THREADS = 4


@dataclass(frozen=True, slots=True)
class Converted:
    """What was written."""

    path: Path
    family: str
    num_parameters: int  # single numbers
    num_bytes: int  # of weights
    dtypes: tuple[str, ...]
    is_dequantized: bool  # into more bytes than the original has


def convert(
    model: str,
    destination: Path,
    *,
    dtype: Dtype | None = None,
    tokenizer: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Converted:
    """Convert anything that can be served into the directory `destination`; dtype None keeps the float types.

    Beside the process itself this takes the memory of the largest parameter as it is read, or twice that of the
    largest as it is written, whichever is more, and of a chunk for each of a few threads.  Interrupted at any point, it
    goes on when it is called again with the same arguments, and until it is done nothing loads the directory.

    Raises CheckpointError if the model cannot be read, or the directory not be written or holds something else.
    """
    with _told(destination):
        check_free(destination, overwrite=overwrite)  # before anything is downloaded
    checkpoint = open_checkpoint(model)
    if destination.exists() and checkpoint.path.resolve() == destination.resolve():
        raise CheckpointError(f"{destination}: is what is to be converted; give another directory")
    texts = text_files(checkpoint, locate_tokenizer(tokenizer) if tokenizer else checkpoint.path)
    return write_checkpoint(
        checkpoint, texts, destination, dtype=dtype, overwrite=overwrite, progress=progress
    )


def write_checkpoint(
    checkpoint: Checkpoint | OrbaxCheckpoint,
    texts: dict[str, bytes],
    directory: Path,
    *,
    dtype: Dtype | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Converted:
    """Like `convert`, of an opened checkpoint and the files to lie beside its weights."""
    sources = sources_of(checkpoint, dtype)
    layouts = {source.name: source.layout for source in sources}
    identity = {
        "jaxserve": __version__,
        "source": _fingerprint(checkpoint.path),
        "texts": {name: FileRecord.of(data).crc32 for name, data in texts.items()},
        "parameters": {name: _jsonable(asdict(layout)) for name, layout in layouts.items()},
    }
    num_bytes = sum(layout.num_bytes for layout in layouts.values())
    with _told(directory):
        _check_space(directory, num_bytes + sum(map(len, texts.values())))
        with open_destination(directory, identity, layouts, texts, overwrite=overwrite) as destination:
            _write_parameters(destination, sources, progress=progress)
            destination.commit()
    return Converted(
        path=directory,
        family=checkpoint.config.family,
        num_parameters=sum(layout.num_bytes // layout.numpy_dtype.itemsize for layout in layouts.values()),
        num_bytes=num_bytes,
        dtypes=tuple(sorted({layout.dtype for layout in layouts.values()})),
        is_dequantized=checkpoint.path.is_file() and num_bytes > 1.5 * checkpoint.path.stat().st_size,
    )


def _write_parameters(destination: Destination, sources: list[ParameterSource], *, progress: bool) -> None:
    todo = [source for source in sources if source.name not in destination.done]
    num_bytes = sum(source.layout.num_bytes for source in sources)
    missing = sum(source.layout.num_bytes for source in todo)
    largest = max(source.layout.num_bytes for source in sources)
    budget = ByteBudget(max(2 * largest, *(source.num_bytes_held for source in sources)))
    bar = progress_bar(num_bytes, "Converting weights", "B", initial=num_bytes - missing, enabled=progress)
    lock = threading.Lock()

    def advance(count: int) -> None:
        with lock:
            bar.update(count)

    def write(source: ParameterSource) -> None:
        try:
            destination.note(source.name, _write(destination, source, advance))
        except BaseException:
            budget.stop()
            raise
        budget.give(source.num_bytes_held)

    with bar, ThreadPoolExecutor(_NUM_THREADS, "conversion") as pool:
        try:
            futures: list[Future[None]] = []
            for source in todo:
                if not budget.take(source.num_bytes_held):
                    break  # a thread failed
                futures.append(pool.submit(write, source))
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _write(
    destination: Destination, source: ParameterSource, advance: Callable[[int], None]
) -> tuple[int, ...]:
    """Write one parameter; its chunks' checksums."""
    layout = source.layout
    (destination.directory / parameter_directory(source.name)).mkdir()
    value = source.read()
    assert value.shape == layout.shape, f"{source.name}: {value.shape} read for {layout.shape}"
    checksums = []
    for index in layout.chunks():
        chunk = np.ascontiguousarray(value[layout.box(index)], layout.numpy_dtype)
        data = chunk.reshape(-1).view(np.uint8).data
        write_synced(destination.directory / chunk_path(source.name, index), data)
        checksums.append(zlib.crc32(data))
        advance(layout.chunk_bytes)
    destination.write_metadata(source.name)
    del value
    source.release()
    return tuple(checksums)


def _check_space(directory: Path, needed: int) -> None:
    """Raise CheckpointError if what is to be written has no room, before anything is touched."""
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    # Of an earlier conversion, which is gone on with or removed.
    free += sum(path.stat().st_size for path in (directory / STATE).rglob("*") if path.is_file())
    if free < needed:
        raise CheckpointError(
            f"{directory}: {needed / 1e9:.2f} GB are to be written, and {free / 1e9:.2f} GB are free there"
        )


def _fingerprint(path: Path) -> dict[str, Any]:
    """What tells a checkpoint from one that was there before: its files' sizes and times."""
    files = [path] if path.is_file() else sorted(path.glob("*"))
    stats = [(file.name, file.stat()) for file in files if file.is_file()]
    return {
        "path": str(path.resolve()),
        "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
    }


def _jsonable(value: dict[str, Any]) -> dict[str, Any]:
    """As it comes back from JSON."""
    return {name: list(item) if isinstance(item, tuple) else item for name, item in value.items()}


@contextmanager
def _told(directory: Path) -> Iterator[None]:
    """Say what to do about a directory that cannot be written."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = "free some space and run it again: what was written is kept"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            advice = "give a directory that you may write to"
        else:
            advice = "what was written is kept; run it again once that is mended"
        raise CheckpointError(
            f"{error.filename or directory}: cannot be written: {error.strerror or error}; {advice}"
        ) from error
