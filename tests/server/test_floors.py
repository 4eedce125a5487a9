"""The server's place: above the engine, and without jax."""

from __future__ import annotations

import subprocess
import sys


def test_the_server_imports_no_jax():
    code = "import sys, jaxserve.server; sys.exit('jax' in sys.modules or 'flax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
