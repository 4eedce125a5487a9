"""Tools, their calls and results as plain text, for chat templates that do not write them out themselves."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

CallWriter = Callable[[str, str], str]
"""How a model writes a call of a function: its name and its arguments as JSON text → text."""


def hermes_call(name: str, arguments: str) -> str:
    """A call in the form of Hermes and Qwen models, which most other models have seen too."""
    return f'<tool_call>\n{{"name": {_json(name)}, "arguments": {arguments}}}\n</tool_call>'


def result_text(result: str) -> str:
    """A tool's result, as it stands in a user's message."""
    return f"<tool_response>\n{result}\n</tool_response>"


def tools_text(tools: Sequence[Mapping[str, Any]], write_call: CallWriter) -> str:
    """What a system message says about the functions that the model may call."""
    listed = "\n".join(_json(tool) for tool in tools)
    example = write_call("function_name", '{"argument": "value"}')
    return (
        "You can call these functions (one a line, with the JSON schema of its arguments):\n"
        f"<tools>\n{listed}\n</tools>\n\n"
        f"To call one, write it like this:\n{example}"
    )


def documents_text(documents: Sequence[Mapping[str, Any]]) -> str:
    """What a system message says about documents: each as one line of JSON."""
    listed = "\n".join(_json(document) for document in documents)
    return f"Use these documents (one a line, as JSON) where they help:\n<documents>\n{listed}\n</documents>"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
