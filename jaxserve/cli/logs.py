"""What a command logs while it works: lines on stderr."""

from __future__ import annotations

import logging
import sys


def log_to_stderr() -> None:
    """Our own messages from INFO on, those of libraries from WARNING on."""
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.WARNING,
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
    )
    logging.getLogger("jaxserve").setLevel(logging.INFO)
