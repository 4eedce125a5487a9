"""What long work shows: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import io
import re
import sys
import threading
from types import ModuleType

import pytest

from jaxserve import progress
from jaxserve.progress import TokenBar, progress_bar
from tests.patience import PATIENCE


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def no_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)


def shown(monkeypatch: pytest.MonkeyPatch, stderr: io.StringIO) -> str:
    """What work of 3 GB writes there, beside other work."""
    monkeypatch.setattr(sys, "stderr", stderr)
    with progress_bar(3, "programs", "prog"), progress_bar(3 * 10**9, "Loading weights", "B") as bar:
        for _ in range(3):
            bar.update(10**9)
    return stderr.getvalue()


def test_a_terminal_shows_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\rLoading weights: 100%|" in shown(monkeypatch, Terminal())


def test_a_notebook_shows_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    assert "\rLoading weights: 100%|" in shown(monkeypatch, io.StringIO())


def test_a_log_has_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    text = shown(monkeypatch, io.StringIO())
    assert "\r" not in text
    assert re.search(r"^Loading weights: 2\.00GB of 3\.00GB after \d\d:\d\d$", text, re.MULTILINE)
    assert "\x1b" not in text
    assert re.search(r"^Loading weights: 3\.00GB of 3\.00GB after \d\d:\d\d$", text, re.MULTILINE)


def test_a_log_has_nothing_of_what_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", PATIENCE)
    assert shown(monkeypatch, io.StringIO()) == ""


def test_a_bar_may_be_unwanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    progress_bar(3, "programs", "prog", enabled=False).update(3)
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]  # a StringIO here


def test_an_interrupt_while_a_bar_is_drawn_keeps_no_other_thread_from_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Interrupted(Terminal):
        def write(self, text: str) -> int:
            if "tok/s" in text and "0/2" in text:
                raise KeyboardInterrupt
            return super().write(text)

    monkeypatch.setattr(sys, "stderr", Interrupted())
    with TokenBar(2, enabled=True) as bar:
        with pytest.raises(KeyboardInterrupt):
            bar.update(0, 5)
        bar.update(2, 5)
    assert "2/2" in sys.stderr.getvalue()  # type: ignore[attr-defined]  # a StringIO here
    other = threading.Thread(target=progress_bar, args=(3, "programs", "prog"), daemon=True)
    other.start()
    other.join(PATIENCE)
    assert not other.is_alive()
