"""Grammars for values that are written otherwise than in JSON, derived from JSON schemas."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxserve.server.tool_parsers.grammar import ANY_NAME, GrammarWriter, json_text
from jaxserve.structured.lark import lark_regex
from jaxserve.structured.schema import find

# Keywords of JSON Schema that say nothing about what is allowed, or that are looked at here.
_KNOWN = frozenset(
    (
        *(
            "type",
            "properties",
            "required",
            "items",
            "minItems",
            "maxItems",
            "enum",
            "const",
            "anyOf",
            "oneOf",
        ),
        *(
            "$ref",
            "$defs",
            "definitions",
            "additionalProperties",
            "title",
            "description",
            "default",
            "examples",
        ),
        *("$schema", "$id", "$comment", "deprecated", "readOnly", "writeOnly", "nullable", "strict"),
    )
)
# Those that llguidance's own JSON grammar looks after, in strings and numbers.
_OF_SCALARS = frozenset(
    (
        *("minLength", "maxLength", "pattern", "format", "minimum", "maximum", "exclusiveMinimum"),
        *("exclusiveMaximum", "multipleOf"),
    )
)
_ANY_TYPE = ("string", "number", "boolean", "null", "array", "object")


@dataclass(frozen=True)
class LiteralStyle:
    """How a format writes values."""

    key: Callable[[str], str]  # of an argument, with what follows it
    inner_key: Callable[[str], str]  # of a dict in an argument
    true: str
    false: str
    null: str
    separator: str
    string: Callable[[GrammarWriter, Mapping[str, Any]], str]  # Lark for a string that a schema describes
    string_texts: tuple[Callable[[str], str], ...]  # a given string, in the ways in which it can be written


def _json_string(writer: GrammarWriter, schema: Mapping[str, Any]) -> str:
    return writer.json({"type": "string", **{k: v for k, v in schema.items() if k in _OF_SCALARS}})


def _python_string(writer: GrammarWriter, schema: Mapping[str, Any]) -> str:
    """JSON's strings are Python's too, as read here; and the same between single quotes."""
    if "pattern" in schema or "format" in schema:
        return _json_string(writer, schema)
    fewest, most = schema.get("minLength", 0), schema.get("maxLength", "")
    single = rf"'([^'\\\x00-\x1f]|\\['\"\\nrt]){{{fewest},{most}}}'"
    return f"({_json_string(writer, schema)} | {lark_regex(single)})"


def _single_quoted(text: str) -> str:
    return "'" + json_text(text)[1:-1].replace("'", r"\'").replace(r"\"", '"') + "'"


PYTHON_STYLE = LiteralStyle(
    key=lambda name: f"{name}=",
    inner_key=lambda name: f"{json_text(name)}: ",
    true="True",
    false="False",
    null="None",
    separator=", ",
    string=_python_string,
    string_texts=(json_text, _single_quoted),
)


class LiteralWriter:
    """Writes Lark for the values of one call's arguments."""

    def __init__(self, writer: GrammarWriter, style: LiteralStyle) -> None:
        self._writer = writer
        self._style = style
        self._root: Mapping[str, Any] = writer.tool.schema
        self._rules: dict[str, str] = {}  # by reference, and of any value
        self._waiting: dict[str, str] = {}

    def arguments(self, schema: Mapping[str, Any]) -> str:
        """The named arguments of a call, in the schema's order."""
        schema = self._resolved(schema)
        self._check(schema)
        return self._members(schema, self._style.key)

    def value(self, schema: Mapping[str, Any] | bool) -> str:
        """A value that a schema describes."""
        writer, style = self._writer, self._style
        if schema is True or schema == {}:
            return self._any_value()
        if schema is False:
            raise writer.refuse("a schema that is false allows nothing")
        assert not isinstance(schema, bool)
        if "$ref" in schema:
            return self._reference(schema["$ref"])
        self._check(schema)
        if "const" in schema:
            return self._constant(schema["const"])
        if "enum" in schema:
            return self._either([self._constant(value) for value in schema["enum"]])
        for key in ("anyOf", "oneOf"):
            if key in schema:
                return self._either([self.value(option) for option in schema[key]])
        kinds = schema.get("type", _ANY_TYPE)
        kinds = [kinds] if isinstance(kinds, str) else list(kinds)
        if schema.get("nullable") is True and "null" not in kinds:
            kinds.append("null")
        if len(kinds) > 1:
            return self._either([self.value({**schema, "type": kind, "nullable": False}) for kind in kinds])
        match kinds[0]:
            case "string":
                return style.string(writer, schema)
            case "integer" | "number" as kind:
                return writer.json({"type": kind, **{k: v for k, v in schema.items() if k in _OF_SCALARS}})
            case "boolean":
                return self._either([writer.text(style.true), writer.text(style.false)])
            case "null":
                return writer.text(style.null)
            case "array":
                return self._array(schema)
            case "object":
                return self._object(schema)
            case kind:
                raise writer.refuse(f"{kind!r} is no type of JSON Schema")

    def _array(self, schema: Mapping[str, Any]) -> str:
        writer = self._writer
        item = writer.rule(self.value(schema.get("items", True)))
        fewest, most = schema.get("minItems", 0), schema.get("maxItems")
        separator = writer.text(self._style.separator)
        if most == 0:
            return writer.text("[]")
        repeats = f"{{{max(fewest - 1, 0)},{'' if most is None else most - 1}}}"
        items = f"{item} ({separator} {item}){repeats}"
        return f"{writer.text('[')} {items if fewest else f'({items})?'} {writer.text(']')}"

    def _object(self, schema: Mapping[str, Any]) -> str:
        writer = self._writer
        return f"{writer.text('{')} {self._members(schema, self._style.inner_key)} {writer.text('}')}"

    def _members(self, schema: Mapping[str, Any], key: Callable[[str], str]) -> str:
        """What stands between the brackets of an object or a call."""
        write = self._named_members if "properties" in schema else self._free_members
        return write(schema, key)

    def _free_members(self, schema: Mapping[str, Any], key: Callable[[str], str]) -> str:
        """Any number of properties that no schema names."""
        writer = self._writer
        if schema.get("additionalProperties") is False:
            return '""'
        before, after = key("k").split("k")
        any_key = f"{writer.text(before)} {ANY_NAME} {writer.text(after)}"
        member = writer.rule(f"{any_key} {self.value(schema.get('additionalProperties', True))}")
        return f"({member} ({writer.text(self._style.separator)} {member})*)?"

    def _named_members(self, schema: Mapping[str, Any], key: Callable[[str], str]) -> str:
        """Properties in the schema's order, with separators; those that are not required may be left out."""
        writer = self._writer
        members = [
            (name, writer.rule(f"{writer.text(key(name))} {self.value(inner)}"))
            for name, inner in schema["properties"].items()
        ]
        required = writer.required(schema)
        separator = writer.text(self._style.separator)
        # What may follow when so many members were looked at, with a member before and without.
        with_before, without = '""', '""'
        for name, member in reversed(members):
            skipped = (f" | {with_before}", f" | {without}") if name not in required else ("", "")
            with_before, without = (
                writer.rule(f"{separator} {member} {with_before}{skipped[0]}"),
                writer.rule(f"{member} {with_before}{skipped[1]}"),
            )
        return without

    def _any_value(self) -> str:
        """Any value: a rule that refers to itself."""
        return self._recursive("any", lambda: self.value({"type": list(_ANY_TYPE)}))

    def _reference(self, reference: str) -> str:
        return self._recursive(reference, lambda: self.value(self._target(reference)))

    def _recursive(self, key: str, write: Callable[[], str]) -> str:
        if key not in self._rules:
            self._rules[key] = self._writer.name_of_rule()
            self._writer.rule(write(), name=self._rules[key])
        return self._rules[key]

    def _resolved(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        for _ in range(20):
            if "$ref" not in schema:
                return schema
            schema = self._target(schema["$ref"])
        raise self._writer.refuse("its $ref leads nowhere")

    def _target(self, reference: str) -> Mapping[str, Any]:
        if reference.split("/")[0] != "#":
            raise self._writer.refuse(f"{reference!r} lies outside the schema")
        target = find(self._root, reference)
        if not isinstance(target, Mapping):
            raise self._writer.refuse(f"{reference!r} is not there")
        return target

    def _check(self, schema: Mapping[str, Any]) -> None:
        unknown = [key for key in schema if key not in _KNOWN and key not in _OF_SCALARS]
        if unknown:
            raise self._writer.refuse(f"{unknown[0]!r} cannot be held to in this format")

    def _constant(self, value: Any) -> str:
        if isinstance(value, str):
            return self._either([self._writer.text(write(value)) for write in self._style.string_texts])
        return self._writer.text(self._constant_text(value))

    def _constant_text(self, value: Any) -> str:
        style = self._style
        if isinstance(value, str):
            return style.string_texts[0](value)
        if value is None or isinstance(value, bool):
            return {None: style.null, True: style.true, False: style.false}[value]
        if isinstance(value, list):
            return f"[{style.separator.join(map(self._constant_text, value))}]"
        if isinstance(value, Mapping):
            members = (style.inner_key(k) + self._constant_text(v) for k, v in value.items())
            return f"{{{style.separator.join(members)}}}"
        return json.dumps(value)

    def _either(self, options: Sequence[str]) -> str:
        return options[0] if len(options) == 1 else f"({' | '.join(options)})"
