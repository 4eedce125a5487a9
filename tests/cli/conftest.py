"""A fake OpenAI server for every test that wants one, and a log that is afterwards as it was."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from tests.bench.fake_server import FakeServer, fake_server


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """A server that answers by script; see FakeServer."""
    with fake_server() as running:
        yield running


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """Commands that run in this process set the log up, which other tests read."""
    root, ours = logging.getLogger(), logging.getLogger("jaxserve")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])
