"""JSON schemas as data: reading them, closing their objects, and walking to a part that is at fault."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from jaxserve.errors import RequestError

# Keywords that hold schemas: one, a list of them, or a mapping of names to them.
_ONE = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_MAPPINGS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")

Schema = Mapping[str, Any] | bool


def read_json(text: str, name: str) -> Any:
    """JSON out of a text.  Raises RequestError; RecursionError where it is nested too deeply."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise RequestError(f"{name} is not valid JSON: {error}.") from error


def subschemas(schema: Schema, pointer: str = "") -> Iterator[tuple[str, Schema]]:
    """The schemas directly inside a schema, with their JSON pointers."""
    if not isinstance(schema, Mapping):
        return
    for key, value in schema.items():
        if key in _ONE and isinstance(value, Mapping | bool):
            yield f"{pointer}/{key}", value
        elif key in _LISTS or (key == "items" and isinstance(value, list)):
            if isinstance(value, list | tuple):
                for index, item in enumerate(value):
                    if isinstance(item, Mapping | bool):
                        yield f"{pointer}/{key}/{index}", item
        elif key in _MAPPINGS and isinstance(value, Mapping):
            for name, item in value.items():
                if isinstance(item, Mapping | bool):
                    escaped = str(name).replace("~", "~0").replace("/", "~1")
                    yield f"{pointer}/{key}/{escaped}", item


def check_counted_names(schema: Schema) -> None:
    """Refuse objects that must have several properties of free names: a grammar cannot see to it that they differ.

    Raises RequestError naming the place.
    """
    todo = [("", schema)]
    while todo:
        pointer, part = todo.pop()
        todo += subschemas(part, pointer)
        if not isinstance(part, Mapping):
            continue
        least, required = part.get("minProperties"), part.get("required", ())
        if not isinstance(least, int) or not isinstance(required, list | tuple):
            continue
        may_have_others = part.get("additionalProperties", True) is not False or "patternProperties" in part
        if may_have_others and least - len(set(map(str, required))) > 1:
            raise RequestError(
                f"the JSON schema cannot be used: at {pointer or 'its top'}: minProperties of {least} is not supported "
                f"where more than one of the properties may have any name, since names could repeat."
            )


def literals(schema: Schema) -> Iterator[str]:
    """The texts that a schema wants written exactly so: constants, the values of enums, names."""
    todo = [schema]
    while todo:
        part = todo.pop()
        todo += [inner for _, inner in subschemas(part)]
        if not isinstance(part, Mapping):
            continue
        enum, names = part.get("enum"), part.get("properties")
        values = [part.get("const"), *(enum if isinstance(enum, list | tuple) else ())]
        yield from (value if isinstance(value, str) else json.dumps(value, default=str) for value in values)
        yield from map(str, names if isinstance(names, Mapping) else ())


def find(root: Schema, reference: object) -> Schema | None:
    """The schema that a reference into the same document ("#/$defs/x") points to, if it is there."""
    if not isinstance(reference, str):
        return None
    document, *parts = reference.split("/")
    if document != "#":
        return None
    found: Any = root
    for part in parts:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, Mapping) and name in found:
            found = found[name]
        elif isinstance(found, list) and name.isdigit() and int(name) < len(found):
            found = found[int(name)]
        else:
            return None
    return found if isinstance(found, Mapping | bool) else None


def close_objects(schema: Schema) -> Schema:
    """The schema with `additionalProperties: false` in every object that does not speak of other properties.

    Raises RequestError for an allOf of several, whose members would exclude each other's properties.
    """
    if not isinstance(schema, Mapping):
        return schema
    members = schema.get("allOf")
    if isinstance(members, list | tuple) and len(members) > 1:
        raise RequestError(
            "disable_additional_properties cannot be applied to an allOf of several schemas; write "
            "additionalProperties where it is meant."
        )
    closed: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _ONE and key != "not" and isinstance(value, Mapping | bool):
            closed[key] = close_objects(value)
        elif key in _LISTS and isinstance(value, list | tuple):
            closed[key] = [close_objects(item) for item in value]
        elif key in _MAPPINGS and isinstance(value, Mapping):
            closed[key] = {name: close_objects(item) for name, item in value.items()}
        else:
            closed[key] = value
    says_more = any(key in schema for key in ("additionalProperties", "patternProperties"))
    if "properties" in schema and not says_more:
        closed["additionalProperties"] = False
    return closed
