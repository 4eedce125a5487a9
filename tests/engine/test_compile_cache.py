"""The cache of compiled programs: found again, and never a reason not to start."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from jaxserve.engine.compile_cache import CompileCache, source_files
from jaxserve.engine.compiling import compile_all
from jaxserve.engine.programs import Program


def lower() -> jax.stages.Lowered:
    return jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((3,), np.float32))


def test_a_program_is_found_by_its_name_and_context(tmp_path: Path) -> None:
    CompileCache(tmp_path, "engine").compile("add", lower)
    found = CompileCache(tmp_path, "engine").load("add")
    assert found is not None
    assert found(np.ones(3, np.float32)).tolist() == [2, 2, 2]
    assert CompileCache(tmp_path, "engine").load("subtract") is None
    assert CompileCache(tmp_path, "another engine").load("add") is None


def with_a_wrong_bit(kept: bytes) -> bytes:
    middle = len(kept) // 2
    return kept[:middle] + bytes([kept[middle] ^ 1]) + kept[middle + 1 :]


@pytest.mark.parametrize(
    "damage", [lambda _: b"", lambda _: b"not a pickle", lambda kept: kept[:-1], with_a_wrong_bit]
)
def test_a_damaged_program_is_as_good_as_absent(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    cache = CompileCache(tmp_path, "engine")
    cache.compile("add", lower)
    (path,) = (path for path in tmp_path.rglob("*") if path.is_file())
    path.write_bytes(damage(path.read_bytes()))
    assert cache.load("add") is None


def test_a_folder_that_cannot_be_written_is_only_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    cache = CompileCache(tmp_path / "file" / "xla", "engine")
    assert cache.load("add") is None
    with caplog.at_level(logging.WARNING):
        compiled = cache.compile("add", lower)
    assert compiled(np.zeros(3, np.float32)).tolist() == [1, 1, 1]
    assert "cannot be kept" in caplog.text


def test_nor_is_one_that_cannot_be_looked_at(tmp_path: Path) -> None:
    assert CompileCache(tmp_path / ("x" * 300), "engine").load("add") is None


@pytest.fixture
def jax_cache(tmp_path: Path) -> Iterator[None]:
    """JAX's own cache, of everything that is compiled."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path / "jax"),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


@pytest.mark.usefixtures("jax_cache")
def test_what_is_kept_does_not_come_from_the_cache_of_jax(tmp_path: Path) -> None:
    CompileCache(None, "engine").compile("add", lower)  # JAX has it now
    folder = tmp_path / "ours"
    compile_all([Program("add", lower)], CompileCache(folder, "engine"), show_progress=False)
    found = CompileCache(folder, "engine").load("add")
    assert found is not None
    assert found(np.ones(3, np.float32)).tolist() == [2, 2, 2]


def test_what_programs_are_traced_from_is_in_the_key() -> None:
    names = {path.name for path in source_files()}
    assert {"programs.py", "sampling_params.py", "config.py", "decoder.py", "reference.py"} <= names


@pytest.mark.parametrize("name", ["XLA_FLAGS", "LIBTPU_INIT_ARGS"])
def test_flags_are_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    CompileCache(tmp_path, "engine").compile("add", lower)
    monkeypatch.setenv(name, f"{os.environ.get(name, '')} --xla_one_more=true")
    assert CompileCache(tmp_path, "engine").load("add") is None
    monkeypatch.undo()
    assert CompileCache(tmp_path, "engine").load("add") is not None


def test_settings_of_jax_are_in_the_key(tmp_path: Path) -> None:
    CompileCache(tmp_path, "engine").compile("add", lower)
    with jax.default_matmul_precision("highest"):
        assert CompileCache(tmp_path, "engine").load("add") is None
    assert CompileCache(tmp_path, "engine").load("add") is not None
