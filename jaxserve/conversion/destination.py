"""The directory that a conversion writes: locked, with a journal of what is done, whole only at the very end.

The journal is a line of JSON for each step: what is converted from what, that old files are gone, and then the
checksums of each parameter when it has reached the disk.  Whoever finds a journal and no manifest has an unfinished
conversion before him; the same conversion goes on behind the last line, another one begins anew.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from jaxserve.errors import CheckpointError
from jaxserve.loading.orbax_format import (
    JOURNAL,
    MANIFEST,
    ORBAX_MARKERS,
    STATE,
    FileRecord,
    Manifest,
    ParameterLayout,
    chunk_path,
    is_converted,
    is_unfinished,
    orbax_files,
    parameter_directory,
    read_manifest,
    sync_directory,
    write_manifest,
    write_synced,
    zarr_metadata,
)

_NOT_OURS_BUT_HARMLESS = "lost+found"  # at the root of a volume
_NAMES_SHOWN = 3


def check_free(directory: Path, *, overwrite: bool) -> None:
    """Raise CheckpointError unless a conversion may write here: into nothing, or what a conversion has left."""
    if not directory.exists() or is_unfinished(directory):
        return
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: is a file; give a directory to write to")
    if is_converted(directory):
        if not overwrite:
            raise CheckpointError(f"{directory}: holds a converted checkpoint; --overwrite replaces it")
        return
    others = sorted(path.name for path in directory.iterdir() if path.name != _NOT_OURS_BUT_HARMLESS)
    if others:
        shown = ", ".join(others[:_NAMES_SHOWN]) + (", …" if len(others) > _NAMES_SHOWN else "")
        raise CheckpointError(f"{directory}: holds other files ({shown}); give a new or an empty directory")


@contextmanager
def open_destination(
    directory: Path,
    identity: Mapping[str, Any],
    layouts: Mapping[str, ParameterLayout],
    texts: Mapping[str, bytes],
    *,
    overwrite: bool,
) -> Iterator[Destination]:
    """The directory, made and locked and free of what earlier conversions have left, save for parts of this one.

    `identity` is JSON that tells this conversion from others.  Raises CheckpointError if something else is there, or
    another process is converting into it.
    """
    check_free(directory, overwrite=overwrite)
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / JOURNAL).open("a+b") as journal:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(f"{directory}: another process is converting into it") from error
        if not os.fstat(journal.fileno()).st_nlink:
            raise CheckpointError(f"{directory}: another process has just converted into it")
        check_free(directory, overwrite=overwrite)
        destination = Destination(directory, layouts, texts, journal)
        destination.begin(identity)
        yield destination


class Destination:
    """See open_destination.  `done` are parameters that an earlier run has written."""

    def __init__(
        self,
        directory: Path,
        layouts: Mapping[str, ParameterLayout],
        texts: Mapping[str, bytes],
        journal: IO[bytes],
    ) -> None:
        self.directory = directory
        self.done: dict[str, tuple[int, ...]] = {}
        self._layouts = layouts
        self._texts = texts
        self._journal = journal
        self._lock = threading.Lock()

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Find out what is done, remove all else, and write the files that are not weights."""
        entries = self._read_journal()
        is_same = len(entries) > 1 and entries[0].get("identity") == identity
        if is_converted(self.directory) or not is_same:
            self._begin_anew(identity, entries)
        for entry in entries[2:] if is_same else ():
            name, checksums = entry["parameter"], tuple(entry["crc32"])
            if self._is_whole(name):
                self.done[name] = checksums
        state = self.directory / STATE
        state.mkdir(exist_ok=True)
        _remove(path for path in state.iterdir() if path.name not in self.done)
        for name, data in self._texts.items():
            path = self.directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_synced(path, data)

    def write_metadata(self, name: str) -> None:
        """Write what belongs to a parameter beside its chunks."""
        folder = self.directory / parameter_directory(name)
        write_synced(folder / "zarr.json", zarr_metadata(self._layouts[name]))
        sync_directory(folder)

    def note(self, name: str, checksums: tuple[int, ...]) -> None:
        """Note that a parameter and its metadata are on the disk.  Thread-safe."""
        with self._lock:
            self._append({"parameter": name, "crc32": checksums})
            self.done[name] = checksums

    def commit(self) -> None:
        """Make the directory a whole checkpoint: every parameter has been noted."""
        assert self.done.keys() == self._layouts.keys(), "parameters are missing"
        written = orbax_files(self._layouts)
        for name, data in written.items():
            write_synced(self.directory / name, data)
        contents = {**self._texts, **written}
        for name, layout in self._layouts.items():
            contents[f"{parameter_directory(name)}/zarr.json"] = zarr_metadata(layout)
        sync_directory(self.directory / STATE)
        sync_directory(self.directory)
        files = {name: FileRecord.of(data) for name, data in contents.items()}
        write_manifest(self.directory, Manifest(self._layouts, self.done, files))
        (self.directory / JOURNAL).unlink()

    def _begin_anew(self, identity: Mapping[str, Any], entries: list[dict[str, Any]]) -> None:
        # In this order: as long as the manifest is there the old checkpoint is whole, and from then on the journal
        # says what is still to be removed.
        stale = set(self._texts)
        if is_converted(self.directory):
            with suppress(CheckpointError):  # a damaged one does not tell
                stale |= read_manifest(self.directory).files.keys()
        if entries:
            stale |= set(entries[0].get("files", ()))
        self._journal.truncate(0)
        self._append({"identity": identity, "files": sorted(stale)})
        sync_directory(self.directory)
        (self.directory / MANIFEST).unlink(missing_ok=True)
        sync_directory(self.directory)
        _remove(self.directory / name for name in (STATE, *ORBAX_MARKERS, MANIFEST + ".tmp", *sorted(stale)))
        self._append({"cleared": True})

    def _read_journal(self) -> list[dict[str, Any]]:
        """The steps of an earlier run, cut off behind the last that was written out."""
        self._journal.seek(0)
        entries, whole = [], 0
        for line in self._journal:
            try:
                entry = json.loads(line)
            except ValueError:
                break
            if not isinstance(entry, dict) or not line.endswith(b"\n"):
                break
            entries.append(entry)
            whole += len(line)
        self._journal.truncate(whole)
        return entries

    def _append(self, entry: Mapping[str, Any]) -> None:
        self._journal.write(json.dumps(entry).encode() + b"\n")  # "a": at the end, wherever that is
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def _is_whole(self, name: str) -> bool:
        layout = self._layouts[name]
        paths = [self.directory / chunk_path(name, index) for index in layout.chunks()]
        has_metadata = (self.directory / parameter_directory(name) / "zarr.json").is_file()
        return has_metadata and all(
            path.is_file() and path.stat().st_size == layout.chunk_bytes for path in paths
        )


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
