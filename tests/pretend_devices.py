"""Tests in processes of their own, which pretend to have several CPU devices: one has as many as it began with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax

# Compiling is nearly all of the time.  Without its new way to write fusions XLA takes half as long; from 0.11 on there
# is no other (jax 0.10.2, 2026-11-25).
_FLAGS = "--xla_backend_optimization_level=0" + (
    " --xla_cpu_use_fusion_emitters=false" if jax.__version_info__ < (0, 11) else ""
)


def run_on_devices(num_devices: int, module: str, *arguments: str, **environment: str) -> str:
    """What `python -m module` prints, with so many devices and what `environment` adds; AssertionError if it fails."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={num_devices} {_FLAGS}"
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        # NPROC: with a thread a core, devices that wait for each other would leave none to go on with.
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "NPROC": "16"} | environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
