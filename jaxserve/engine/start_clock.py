"""Where the seconds of a start go: a line in the log for each part of it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Log how long the block took, and how long after the process' own start it ended."""
    began = time.monotonic()
    yield
    took = time.monotonic() - began
    age = process_age()
    logger.info("%s: %.2f s%s", what, took, "" if age is None else f", done {age:.2f} s after launch")


def process_age(root: Path = Path("/")) -> float | None:
    """Seconds since this process was launched; None where the system does not tell."""
    try:
        # The second field is the program's name in brackets, and may hold blanks.
        fields = (
            (root / "proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
        uptime = float((root / "proc/uptime").read_text(encoding="ascii").split()[0])
        return uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None
