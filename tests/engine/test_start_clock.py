"""The lines that say where a start's seconds went."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import pytest

from jaxserve.engine.start_clock import process_age, timed


def test_a_line_for_each_part(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), timed("weights"):
        pass
    (record,) = caplog.records
    assert re.match(r"weights: \d+\.\d\d s", record.getMessage())


def test_a_part_that_fails_is_not_said_to_be_done(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), pytest.raises(KeyError), timed("weights"):
        raise KeyError
    assert not caplog.records


def test_age_of_the_process(tmp_path: Path) -> None:
    assert process_age(tmp_path) is None
    (tmp_path / "proc/self").mkdir(parents=True)
    fields = ["0"] * 50
    fields[21] = str(100 * os.sysconf("SC_CLK_TCK"))  # field 22 of proc(5): the start, in ticks since boot
    stat = " ".join(["7 (a) name (b)", *fields[2:]])
    (tmp_path / "proc/self/stat").write_text(stat)
    (tmp_path / "proc/uptime").write_text("107.25 300.00\n")
    assert process_age(tmp_path) == 7.25
