"""`--engine NAME=VALUE`: engine options on a benchmark's command line."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """After parsing, `args.engine` is a list of (name, value)."""
    parser.add_argument(
        "--engine",
        type=_option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an engine option, for instance page_size=64; may be repeated",
    )


def _option(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
