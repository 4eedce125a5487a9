"""Values that a model writes as plain text, as the JSON that their schema asks for."""

from __future__ import annotations

import ast
import json
import math
import warnings
from collections.abc import Mapping
from typing import Any

from jaxserve.server.tool_parsers.grammar import json_text
from jaxserve.server.tool_parsers.json_scanner import is_json
from jaxserve.structured.schema import find

TEXT = frozenset(("string",))
_ALIASES = {  # that tools are described with, though JSON Schema does not know them
    "string": ("str", "text", "varchar", "char", "enum"),
    "integer": ("int", "int32", "int64", "uint", "uint32", "uint64", "long", "short", "unsigned"),
    "number": ("float", "float32", "float64", "double"),
    "boolean": ("bool",),
    "object": ("dict",),
    "array": ("arr", "list", "sequence"),
}
_NAME_OF = {alias: name for name, aliases in _ALIASES.items() for alias in aliases}
_DEEPEST = 16  # schemas in schemas, and references
_LONGEST_LITERAL = 100_000  # characters of a value that is tried as Python's


def canonical_type(name: str) -> str:
    """JSON Schema's name of a type: "int" is "integer"."""
    name = name.strip().lower()
    return _NAME_OF.get(name, name)


def json_type(value: Any) -> str:
    """JSON Schema's name of the type of a value that was JSON; of an integer, "integer"."""
    names = {
        type(None): "null",
        bool: "boolean",
        int: "integer",
        float: "number",
        str: "string",
        list: "array",
    }
    return names.get(type(value), "object")


def property_types(schema: Mapping[str, Any], name: str) -> frozenset[str]:
    """The types that a property may have in an object that `schema` describes; none if it does not say."""
    properties = resolved(schema, schema).get("properties")
    inner = properties.get(name) if isinstance(properties, Mapping) else None
    return _types(inner, schema, 0)


def resolved(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a schema that is a reference refers to; empty if that is nowhere."""
    for _ in range(_DEEPEST):
        reference = schema.get("$ref")
        if not isinstance(reference, str):
            return schema
        target = find(root, reference)
        schema = target if isinstance(target, Mapping) else {}
    return {}


def as_json(text: str, types: frozenset[str]) -> str:
    """The JSON text of a value: the model's own text wherever that is JSON of one of the types.

    Tried in the order null, number, boolean, object or array, string, as vLLM does.  What is none of the types is
    taken for JSON, and for a text if it is none.  Where no type is known, an object or an array is one, and
    everything else a text.
    """
    if types == TEXT:
        return json_text(text)
    bare = text.strip()
    if not types:
        return bare if may_be_container(bare) and is_json(bare) else json_text(text)
    low = bare.lower()
    if "null" in types and low == "null":
        return "null"
    if types & {"integer", "number"} and (number := _number(bare)) is not None:
        return number
    if "boolean" in types:
        if low in ("true", "false"):
            return low
        if bare in ("0", "1") and "string" not in types:
            return "true" if bare == "1" else "false"
    if types & {"object", "array"} and (value := _container(bare, types)) is not None:
        return value
    if "string" not in types and is_json(bare) and _is_finite(bare):
        return bare
    return json_text(text)


def may_be_container(text: str) -> bool:
    """Whether a text begins as an object or an array does."""
    return text.lstrip()[:1] in ("{", "[")


def _number(text: str) -> str | None:
    if is_json(text) and text[:1] in "-0123456789":
        return text if _is_finite(text) else None
    try:
        number = int(text)
    except ValueError:
        try:
            number = float(text)
        except ValueError:
            return None
    return json.dumps(number) if math.isfinite(number) else None


def _container(text: str, types: frozenset[str]) -> str | None:
    brackets = {"{": "object", "[": "array", "(": "array"}
    if brackets.get(text[:1]) not in types:
        return None
    if text[0] != "(" and is_json(text):
        return text
    if len(text) > _LONGEST_LITERAL:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that are none
            value = ast.literal_eval(text)
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _is_finite(text: str) -> bool:
    """Whether a text that is JSON is no number beyond what floats hold."""
    return text[:1] not in "-0123456789" or math.isfinite(float(text))


def _types(schema: Any, root: Mapping[str, Any], depth: int) -> frozenset[str]:
    if not isinstance(schema, Mapping) or depth > _DEEPEST:
        return frozenset()
    schema = resolved(schema, root)
    stated = schema.get("type")
    names = stated if isinstance(stated, list) else [stated]
    types = {canonical_type(name) for name in names if isinstance(name, str)}
    values = schema.get("enum")
    constants = [
        *(values if isinstance(values, list) else ()),
        *([schema["const"]] if "const" in schema else ()),
    ]
    types |= {json_type(value) for value in constants} if not types else set()
    for key in ("anyOf", "oneOf", "allOf"):
        choices = schema.get(key)
        for choice in choices if isinstance(choices, list) else ():
            types |= _types(choice, root, depth + 1)
    if types and schema.get("nullable") is True:
        types.add("null")
    return frozenset(types)
