"""Plug-ins out of texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from jaxserve.server.plugins.load import Plugin, load_plugin


@pytest.fixture
def load(tmp_path: Path) -> Callable[[str], Plugin]:
    """Loads a plug-in of this source text."""

    def write(source: str) -> Plugin:
        file = tmp_path / "plugin.py"
        file.write_text(source, encoding="utf-8")
        return load_plugin(file)

    return write
