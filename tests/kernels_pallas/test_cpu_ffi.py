"""Registering a CPU kernel: what is said of the compilation."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

from jaxserve.kernels_pallas import cpu_ffi

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="XLA calls these kernels on CPUs only")


def _nothing(address: int) -> int:
    return address - address


def test_a_compilation_is_announced_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu_ffi, "_cache_folder", lambda: tmp_path)
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *arguments, **named: None)  # XLA would call it
    monkeypatch.setattr(cpu_ffi, "_registered", {})
    caplog.set_level("INFO", "jaxserve.kernels_pallas.cpu_ffi")
    cpu_ffi.register("new_kernel", _nothing, _nothing)
    (message,) = caplog.messages
    assert message.startswith("compiling CPU kernel new_kernel,")
    cpu_ffi.register("known_kernel", _nothing, _nothing)  # the same code, which is in the cache
    assert len(caplog.messages) == 1
