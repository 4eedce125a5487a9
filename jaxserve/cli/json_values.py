"""JSON objects as the values of flags."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any


def json_object(example: str) -> Callable[[str], dict[str, Any]]:
    """A flag's `type`: reads an object, and shows `example` where there is none."""

    def read(text: str) -> dict[str, Any]:
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object, e.g. {example}")
        return value

    return read
