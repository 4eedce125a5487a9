"""What tests register for plug-ins is gone after them."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from jaxserve.server.parser_api.abstract import ToolParserManager
from jaxserve.server.parser_api.reasoning import ReasoningParserManager


@pytest.fixture(autouse=True)
def registries() -> Generator[None]:
    """The registries of tool and reasoning parsers, as they were before."""
    kept = [manager.registry.entries() for manager in (ToolParserManager, ReasoningParserManager)]
    yield
    for manager, entries in zip((ToolParserManager, ReasoningParserManager), kept, strict=True):
        manager.registry.restore(entries)
