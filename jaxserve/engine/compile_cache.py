"""Compiled programs on disk, found again without tracing.

JAX's own compilation cache is keyed by the traced program, and tracing a whole model takes longer than loading what it
compiles to.  Here the key is everything that goes into the trace: the sources, the model's and engine's numbers, the
versions, the flags, the processor, and of devices how many there are and of what kind.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from jaxserve.engine.stored_program import from_bytes, place, to_bytes
from jaxserve.engine.xla_options import compiler_options

if TYPE_CHECKING:
    from jaxlib._jax import Device  # jax.Device, as type checkers can see it


logger = logging.getLogger(__name__)

# What a program is traced from.  Folders count whole, since which of their files matter is too easily mistaken.
_SOURCES = ("engine", "models", "kernels_pallas", "config.py", "sampling_params.py")
_PACKAGES = ("jaxlib", "flax", "numba")  # numba's machine code is called by programs, where there is numba
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")  # of the environment
_JAX_SETTINGS = (  # that change what is traced or compiled
    "jax_default_matmul_precision",
    "jax_enable_x64",
    "jax_numpy_dtype_promotion",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
)
_JAX_CACHE = "jax_enable_compilation_cache"
_SUM_BYTES = 4  # of a file, that check the others


class CompileCache:
    """A folder of serialised executables; `None` as folder keeps nothing."""

    def __init__(self, folder: Path | None, context: object, devices: Sequence[Device] | None = None) -> None:
        """`context` is what the programs depend on beside sources, versions and devices; its repr must tell.

        `devices` are those that the programs span; by default the first there is.
        """
        self._devices = tuple(devices or jax.devices()[:1])
        self._folder = folder
        # Programs are traced one by one, as the interpreter's lock would have it anyway: side by side they would all be
        # traced before the first one compiles.
        self._tracing = threading.Lock()
        self._has_told = False  # that one cannot be loaded
        self._prefix = _environment_digest(repr(context), self._devices) if folder else ""

    @contextmanager
    def alone(self) -> Iterator[None]:
        """JAX's own cache, if it has one, is out of use while programs are compiled to be kept here.

        On CPUs what comes from there cannot be kept once more: then functions are missing (jax 0.10.2, 0.11.2).
        """
        if self._folder is None or not getattr(jax.config, "jax_compilation_cache_dir", None):
            yield
            return
        was_enabled = getattr(jax.config, _JAX_CACHE)
        jax.config.update(_JAX_CACHE, False)
        reset_cache()  # it has looked at that before
        try:
            yield
        finally:
            jax.config.update(_JAX_CACHE, was_enabled)
            reset_cache()

    def load(self, name: str) -> jax.stages.Compiled | None:
        """The program compiled under this name before, or None; a file that cannot be read is as good as absent."""
        path = self._path(name)
        try:
            if path is None or not path.exists():  # which raises in a folder that may not be looked at
                return None
            return from_bytes(_checked(path.read_bytes()), self._devices)
        except (OSError, pickle.UnpicklingError, EOFError, ValueError, jax.errors.JaxRuntimeError) as error:
            if not self._has_told:  # others are likely to be of no use either
                self._has_told = True
                logger.info("program %s cannot be loaded, and is compiled again: %s", name, error)
            return None

    def compile(
        self, name: str, lower: Callable[[], jax.stages.Lowered], rows: int = 0
    ) -> jax.stages.Compiled:
        """Compile and keep; `rows` as in compiler_options.

        A folder that cannot be written is a warning, since the program is there all the same.
        """
        with self._tracing:
            lowered = lower()
        options = compiler_options(self._devices[0].platform, len(self._devices), rows)
        compiled = lowered.compile(options)
        path = self._path(name)
        if path is not None:
            try:
                _write(path, to_bytes(compiled, self._devices))
            except OSError as error:
                logger.warning("compiled program %s cannot be kept for the next start: %s", name, error)
        return compiled

    def _path(self, name: str) -> Path | None:
        return self._folder / self._prefix / name if self._folder else None


def default_folder(setting: str | None) -> Path | None:
    """Where programs are kept: the setting, nowhere for "", by default ~/.cache/jaxserve/xla."""
    if setting == "":
        return None
    return Path(setting or "~/.cache/jaxserve/xla").expanduser()


def _checked(stored: bytes) -> memoryview:
    """What a file was given to keep.  Raises ValueError if it is not that any more: XLA would not survive it."""
    content = memoryview(stored)[_SUM_BYTES:]
    if stored[:_SUM_BYTES] != _sum_of(content):
        raise ValueError("the file is damaged")
    return content


def _sum_of(content: bytes | memoryview) -> bytes:
    return zlib.crc32(content).to_bytes(_SUM_BYTES, "little")


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all: two servers may start at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(_sum_of(content))
            file.write(content)
            file.flush()
            os.replace(file.name, path)
        except OSError:
            os.unlink(file.name)
            raise


def _environment_digest(context: str, devices: Sequence[Device]) -> str:
    parts = [
        context,
        jax.__version__,
        *(_version(package) for package in _PACKAGES),
        repr(place(devices)),
        str(getattr(devices[0].client, "platform_version", "")),
        *(os.environ.get(name, "") for name in _FLAGS),
        repr([getattr(jax.config, name, None) for name in _JAX_SETTINGS]),
        _cpu_features(),
        _source_digest(),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


@cache
def _source_digest() -> str:
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for path in source_files():
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def source_files() -> list[Path]:
    """The files of this package that programs are traced from."""
    root = Path(__file__).resolve().parent.parent
    found = []
    for name in _SOURCES:
        path = root / name
        found += sorted(path.glob("**/*.py")) if path.is_dir() else [path]
    return found


def _cpu_features() -> str:
    """CPU programs hold machine code for this processor's instruction set."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        import platform

        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
