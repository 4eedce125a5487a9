"""How models write calls in each format, for tests to read back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Calls = Sequence[tuple[str, Mapping[str, Any]]]


def dumps(value: Any) -> str:
    """JSON as models write it."""
    return json.dumps(value, ensure_ascii=False)


def hermes(calls: Calls) -> str:
    """Tags around objects."""
    return "\n".join(
        f'<tool_call>\n{{"name": {dumps(name)}, "arguments": {dumps(arguments)}}}\n</tool_call>'
        for name, arguments in calls
    )


# By the name of a registered format: one for each.
WRITERS: dict[str, Callable[[Calls], str]] = {
    "hermes": hermes,
}

# Formats whose arguments are no JSON text: values may differ by what the format cannot say.
COERCED: frozenset[str] = frozenset()
