"""Where progress bars are shown."""

from __future__ import annotations

import io
import sys
from types import ModuleType

import pytest

from jaxserve.progress import are_bars_seen


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        return True


def test_bars_are_for_terminals_and_notebooks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert are_bars_seen()
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert not are_bars_seen()
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    assert are_bars_seen()
