"""Tests in processes of their own, which pretend to have several CPU devices: one has as many as it began with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.quick_compile import QUICK

_FLAGS = " ".join(f"--{name}={int(value)}" for name, value in QUICK.items())

_LONGEST_SECONDS = 900  # as the whole suite: processes that wait for each other may do so for ever
# XLA ends a process of which one device has waited 40 s for another, on however few processors.
_PATIENCE = f"--xla_cpu_collective_call_terminate_timeout_seconds={_LONGEST_SECONDS}"


def run_on_devices(num_devices: int, module: str, *arguments: str, **environment: str) -> str:
    """What `python -m module` prints, with so many devices and what `environment` adds; AssertionError if it fails."""
    flags = [os.environ.get("XLA_FLAGS", ""), f"--xla_force_host_platform_device_count={num_devices}"]
    flags = " ".join([*flags, _FLAGS, _PATIENCE])
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        # NPROC: with a thread a core, devices that wait for each other would leave none to go on with.
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "NPROC": "16"} | environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
        timeout=_LONGEST_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
