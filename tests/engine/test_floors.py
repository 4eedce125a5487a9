"""The engine's place: below the server, its planning free of arrays."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        (
            "jaxserve.engine.client",
            ("quart", "uvicorn", "httptools", "pydantic", "jaxserve.server", "jaxserve.text"),
        ),
        ("jaxserve.engine.scheduler", ("jax", "numpy")),
    ],
)
def test_what_the_engine_does_without(module: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print(*[name for name in {absent} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == ""
