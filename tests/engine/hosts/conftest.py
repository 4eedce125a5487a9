"""Links between hosts whose time is the test's."""

from __future__ import annotations

import pytest

from jaxserve.engine.hosts import link
from tests.engine.hosts.clock import HostsClock


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> HostsClock:
    """Hosts say that they are there ten times a second, and are lost when this clock says that they said nothing."""
    clock = HostsClock()
    monkeypatch.setattr(link, "time", clock)
    monkeypatch.setattr(link, "BEAT_SECONDS", 0.1)
    return clock
