"""A fake OpenAI server for every test that wants one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.bench.fake_server import FakeServer, fake_server


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """A server that answers by script; see FakeServer."""
    with fake_server() as running:
        yield running
