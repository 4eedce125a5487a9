"""Helpers of vLLM's plug-ins for tools' JSON schemas: what calls must look like, and values by their types."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jaxserve.errors import RequestError
from jaxserve.server.parser_api.protocol import ChatCompletionNamedToolChoiceParam
from jaxserve.server.tool_parsers.coercion import canonical_type, json_type


def find_tool_properties(tools: Iterable[Any] | None, tool_name: str) -> dict[str, Any]:
    """The properties of a tool's parameters; empty for unknown tools."""
    parameters = next((each for name, each in _functions(tools) if name == tool_name), None)
    return (parameters or {}).get("properties", {})


def find_tool_name(tools: Iterable[Any] | None, tool_name: str) -> bool:
    """Whether a tool of this name exists."""
    return any(name == tool_name for name, _ in _functions(tools))


def get_json_schema_from_tools(
    tool_choice: Any, tools: Sequence[Any] | None, parallel_tool_calls: bool | None = None
) -> dict[str, Any] | None:
    """The schema of an answer that `tool_choice` makes a call; None where the model chooses.

    A named function: its parameters alone.  "required": a list of `{"name": …, "parameters": …}`, of one
    call when `parallel_tool_calls` is false.

    Raises RequestError for a function that is not among the tools, and for `$defs` of the same name that differ.
    """
    if tools is None or tool_choice in (None, "none", "auto"):
        return None
    functions = _functions(tools)
    if tool_choice == "required":
        return _list_of_calls(functions, 1 if parallel_tool_calls is False else None)
    is_chat = isinstance(tool_choice, ChatCompletionNamedToolChoiceParam)
    name = tool_choice.function.name if is_chat else getattr(tool_choice, "name", None)
    for each, parameters in functions:
        if each == name:
            return parameters or _any_object()
    raise RequestError(f"tool_choice names {name!r}, which is not among the tools.", param="tool_choice")


def extract_types_from_schema(schema: Any) -> list[str]:
    """The JSON types that a schema allows by type, enum, anyOf, oneOf and allOf; ["string"] if it says nothing."""
    return sorted(_types(schema)) or ["string"]


def coerce_to_schema_type(value: str, schema_type: str | Sequence[str]) -> Any:
    """A value that a model wrote as plain text, as the first of its types that it can be read as.

    Tried in the order null, integer, number, boolean, object, array, string.  A text that is none of them is
    read as JSON, and stays a text where it is none.
    """
    given = [schema_type] if isinstance(schema_type, str) else schema_type
    types = {canonical_type(each) for each in given}
    for kind, read in _READERS.items():
        if kind in types:
            try:
                return read(value)
            except ValueError:
                continue
    try:
        return _read_json(value)
    except ValueError:
        return value


def _read_null(text: str) -> None:
    if text.lower() != "null":
        raise ValueError(text)


def _read_number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return int(number) if number.is_integer() else number


def _read_boolean(text: str) -> bool:
    match text.strip().lower():
        case "true" | "1":
            return True
        case "false" | "0":
            return False
    raise ValueError(text)


def _read_json(text: str) -> Any:
    value = json.loads(text)
    json.dumps(value, allow_nan=False)  # 1e999 is JSON, the infinity that Python makes of it is not
    return value


_READERS: dict[str, Callable[[str], Any]] = {
    "null": _read_null,
    "integer": int,
    "number": _read_number,
    "boolean": _read_boolean,
    "object": _read_json,
    "array": _read_json,
    "string": str,
}


def _types(schema: Any) -> set[str]:
    if not isinstance(schema, dict):
        return set()
    stated = schema.get("type")
    types = {each for each in (stated if isinstance(stated, list) else [stated]) if isinstance(each, str)}
    values = schema.get("enum")
    if isinstance(values, list):
        types |= {json_type(value) for value in values}
    for key in ("anyOf", "oneOf", "allOf"):
        choices = schema.get(key)
        if isinstance(choices, list):
            types.update(*(extract_types_from_schema(choice) for choice in choices))
    return types


def _functions(tools: Iterable[Any] | None) -> list[tuple[str, dict[str, Any] | None]]:
    """Names and parameters of chat tools, and of the flat ones of /v1/responses."""
    found = []
    for tool in tools or ():
        function = getattr(tool, "function", tool)
        if isinstance(name := getattr(function, "name", None), str):
            found.append((name, getattr(function, "parameters", None)))
    return found


def _list_of_calls(
    functions: Iterable[tuple[str, dict[str, Any] | None]], max_items: int | None
) -> dict[str, Any]:
    calls, definitions = [], {}
    for name, parameters in functions:
        own = dict(parameters or _any_object())
        for key, definition in own.pop("$defs", {}).items():
            if definitions.setdefault(key, definition) != definition:
                raise RequestError(
                    f"tools: {key!r} in $defs of {name!r} differs from another tool's; give it another name.",
                    param="tools",
                )
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"type": "string", "enum": [name]}, "parameters": own},
                "required": ["name", "parameters"],
            }
        )
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"type": "object", "anyOf": calls}}
    if max_items is not None:
        schema["maxItems"] = max_items
    if definitions:
        schema["$defs"] = definitions
    return schema


def _any_object() -> dict[str, Any]:
    return {"type": "object", "properties": {}}
