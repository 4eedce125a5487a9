"""JSON files of checkpoints, each of which holds an object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxserve.errors import CheckpointError


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a file.  Raises CheckpointError for what cannot be read and for anything else in it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # lists within lists without end
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a JSON object")
    return content
