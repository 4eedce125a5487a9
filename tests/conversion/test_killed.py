"""A conversion that is killed, at any point, is never loaded, and goes on to the same end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxserve.conversion import sources
from jaxserve.conversion.convert import convert
from jaxserve.errors import CheckpointError
from jaxserve.loading.orbax_format import JOURNAL, MANIFEST, STATE
from jaxserve.loading.resolve import open_checkpoint
from tests.conversion.models import assert_same, parameters_of, write_directory
from tests.loading.builders import hf_shapes, random_tensors, write_hf_directory

REPOSITORY = Path(__file__).parents[2]


def contents(directory: Path) -> dict[str, bytes]:
    """Every file, save for the one that has the time in it and the manifest, which has its checksum."""
    varying = ("_CHECKPOINT_METADATA", MANIFEST)
    files = [path for path in directory.rglob("*") if path.is_file() and path.name not in varying]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def test_killed_between_any_two_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_directory(tmp_path / "source")
    command = [sys.executable, "-m", "tests.conversion.killed", str(source), str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(sources, "LEAST_CHUNK_BYTES", 64)
    expected = parameters_of(source)
    whole = contents(tmp_path / "whole")
    left = [path for path in tmp_path.iterdir() if path.name.isdigit()]
    assert len(left) == 13
    num_resumed = 0
    for directory in left:
        if (directory / MANIFEST).exists():  # killed behind its last step
            assert_same(parameters_of(directory), expected)
            continue
        with pytest.raises(CheckpointError, match=r"not finished|has no config\.json"):
            open_checkpoint(str(directory))
        before = {path: path.stat().st_mtime_ns for path in (directory / STATE).rglob("c.*")}
        noted = (directory / JOURNAL).read_text().splitlines() if directory.exists() else []
        done_names = [json.loads(line)["parameter"] for line in noted[2:]]
        convert(str(source), directory, progress=False)
        assert contents(directory) == whole, directory.name
        kept = [path for path in before if path.parent.name in done_names]
        assert all(path.stat().st_mtime_ns == before[path] for path in kept), "written twice"
        num_resumed += bool(kept)
    assert num_resumed >= 4


def test_overwriting_killed_at_any_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old checkpoint is whole, or the directory is known to be unfinished: never a mixture."""
    source, other = write_directory(tmp_path / "source"), write_directory(tmp_path / "other", "qwen3")
    converted = tmp_path / "converted"

    class Killed(BaseException):
        pass

    honest = Path.unlink
    old = parameters_of(other)
    for number in range(4):
        convert(str(other), converted, progress=False, overwrite=True)
        num_removed = 0

        def unlink(path: Path, *, missing_ok: bool = False, last: int = number) -> None:
            nonlocal num_removed
            if num_removed == last:
                raise Killed
            num_removed += 1
            honest(path, missing_ok=missing_ok)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", unlink)
            with pytest.raises(Killed):
                convert(str(source), converted, progress=False, overwrite=True)
        if number == 0:
            assert_same(parameters_of(converted), old)
        else:
            with pytest.raises(CheckpointError, match="not finished"):
                open_checkpoint(str(converted))
        convert(str(source), converted, progress=False, overwrite=True)
        assert_same(parameters_of(converted), parameters_of(source))


def test_killed_from_outside(tmp_path: Path) -> None:
    """The command itself, whenever it happens to have written a few parameters."""
    write_hf_directory(tmp_path / "source", random_tensors(hf_shapes()))
    write_directory(tmp_path / "tokenizer")
    converted = tmp_path / "converted"
    arguments = [str(tmp_path / "source"), str(converted), "--tokenizer", str(tmp_path / "tokenizer")]
    command = [sys.executable, "-m", "jaxserve", "convert", *arguments]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        while process.poll() is None and len(_lines(converted / JOURNAL)) < 4:
            time.sleep(0.001)
    finally:
        process.kill()
    process.wait()
    if process.returncode == -signal.SIGKILL and not (converted / MANIFEST).exists():
        with pytest.raises(CheckpointError, match="not finished"):
            open_checkpoint(str(converted))
    if not (converted / MANIFEST).exists():
        convert(str(tmp_path / "source"), converted, tokenizer=str(tmp_path / "tokenizer"), progress=False)
    assert_same(parameters_of(converted), parameters_of(tmp_path / "source"))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except FileNotFoundError:  # not yet there, or not any more
        return []
