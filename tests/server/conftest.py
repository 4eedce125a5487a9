"""What a server gets can be waited for, and what tests register for plug-ins is gone after them."""

from __future__ import annotations

import asyncio
from collections.abc import Generator

import pytest

from jaxserve.server.connection import Connection
from jaxserve.server.parser_api.abstract import ToolParserManager
from jaxserve.server.parser_api.reasoning import ReasoningParserManager


@pytest.fixture(autouse=True)
def registries() -> Generator[None]:
    """The registries of tool and reasoning parsers, as they were before."""
    kept = [manager.registry.entries() for manager in (ToolParserManager, ReasoningParserManager)]
    yield
    for manager, entries in zip((ToolParserManager, ReasoningParserManager), kept, strict=True):
        manager.registry.restore(entries)


@pytest.fixture
def arrivals(monkeypatch: pytest.MonkeyPatch) -> asyncio.Queue[bytes]:
    """What a server has got: of each connection nothing, and then its bytes."""
    arrivals = asyncio.Queue[bytes]()
    connection_made, data_received = Connection.connection_made, Connection.data_received

    def made(self: Connection, transport: asyncio.Transport) -> None:
        connection_made(self, transport)
        arrivals.put_nowait(b"")

    def received(self: Connection, data: bytes) -> None:
        data_received(self, data)
        arrivals.put_nowait(data)

    monkeypatch.setattr(Connection, "connection_made", made)
    monkeypatch.setattr(Connection, "data_received", received)
    return arrivals
