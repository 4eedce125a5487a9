"""Registries as they were before the test."""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from jaxserve.server.plugins.load import Plugin, load_plugin
from jaxserve.server.tool_parsers.abstract import ToolParserManager
from jaxserve.server.tool_parsers.reasoning import ReasoningParserManager


@pytest.fixture(autouse=True)
def registries() -> Generator[None]:
    """What a test registers is gone after it."""
    kept = [manager._registry.entries() for manager in (ToolParserManager, ReasoningParserManager)]
    yield
    for manager, entries in zip((ToolParserManager, ReasoningParserManager), kept, strict=True):
        manager._registry.restore(entries)


@pytest.fixture
def load(tmp_path: Path) -> Callable[[str], Plugin]:
    """Loads a plug-in of this source text."""

    def write(source: str) -> Plugin:
        file = tmp_path / "plugin.py"
        file.write_text(source, encoding="utf-8")
        return load_plugin(file)

    return write
