"""Imports point down, wherever in a file they stand (docs/architecture.md has the floors)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import jaxserve

ROOT = Path(jaxserve.__file__).parent
FRONT_END = (
    *("llm", "async_llm", "admission", "assembly", "output_processor", "prompt_images"),
    *("request_state", "request_stream"),
)
ABOVE_ENGINE = ("server", "cli", *FRONT_END, "conversion", "media")

# The floor, and what it must not import of jaxserve's.
UNKNOWN = {
    "server": ("cli", "engine", "loading", "conversion", "models", "kernels_pallas"),
    "text": ("server", "cli", *FRONT_END, "conversion", "media", "engine", "structured", "models"),
    "media": (
        *("server", "cli", *FRONT_END, "conversion", "text", "engine", "structured", "loading"),
        *("models", "kernels_pallas"),
    ),
    "conversion": ("server", "cli", *FRONT_END, "media", "engine", "structured"),
    "engine": (*ABOVE_ENGINE, "text"),
    "structured": (*ABOVE_ENGINE, "engine", "loading", "models", "kernels_pallas"),
    "loading": (*ABOVE_ENGINE, "text", "engine", "structured"),
    "models": (*ABOVE_ENGINE, "text", "engine", "structured", "loading"),
    "kernels_pallas": (*ABOVE_ENGINE, "text", "engine", "structured", "loading", "models"),
}


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports, those for annotations alone included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("floor", UNKNOWN)
def test_imports_point_down(floor: str) -> None:
    files = sorted((ROOT / floor).resolve().rglob("*.py"))
    assert files
    upward = [
        f"{path.name}: {module}"
        for path in files
        for module in imported(path)
        if module.startswith("jaxserve.") and module.split(".")[1] in UNKNOWN[floor]
    ]
    assert upward == []
