"""Calls as DeepSeek V3.2 writes them: one element for a call, one for each argument."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jaxserve.server.tool_parsers.call_draft import CallDraft
from jaxserve.server.tool_parsers.grammar import ANY_NAME, GrammarWriter, json_text
from jaxserve.server.tool_parsers.json_scanner import is_json
from jaxserve.server.tool_parsers.reader import Reader, Steps, checked_function_name

_CALL, _END_OF_CALL = '<｜DSML｜invoke name="', "</｜DSML｜invoke>"
_ARGUMENT, _END_OF_ARGUMENT = '<｜DSML｜parameter name="', "</｜DSML｜parameter>"
_IN_QUOTES = re.compile(r'[^"<>]*')
_WRAPPERS = ("arguments", "input", "parameters")  # that models put around arguments at times


@dataclass(frozen=True)
class DsmlCall:
    """A call whose arguments say whether they are strings, written as they are, or JSON."""

    def read(self, reader: Reader, call: CallDraft) -> Steps[None]:
        """Read one call."""
        call.begin()
        yield from reader.expect(_CALL)
        name = checked_function_name((yield from reader.match(_IN_QUOTES)))
        yield from reader.expect('">')
        call.start(name)
        before = "{"
        yield from reader.white()
        while not (yield from reader.literal(_END_OF_CALL)):
            yield from reader.expect(_ARGUMENT)
            key = yield from reader.match(_IN_QUOTES)
            yield from reader.expect('" string="')
            is_string = (yield from reader.match(_IN_QUOTES)) != "false"
            yield from reader.expect('">')
            schema = call.schema(name)
            if before == "{" and key in _WRAPPERS and key not in _properties(schema):
                yield from self._wrapped(reader, call, schema, key, is_string)
            else:
                call.add(f"{before}{json_text(key)}: ")
                yield from self._value(reader, call, is_string and _takes_strings(schema, key))
            before = ", "
            yield from reader.white()
        if before == ", ":
            call.add("}")
        call.end()

    def _value(self, reader: Reader, call: CallDraft, is_string: bool) -> Steps[None]:
        if is_string:
            call.add('"')
            yield from reader.up_to((_END_OF_ARGUMENT,), lambda text: call.add(json_text(text)[1:-1]))
            call.add('"')
        else:
            pieces: list[str] = []
            yield from reader.up_to((_END_OF_ARGUMENT,), pieces.append)
            text = "".join(pieces)
            call.add(text.strip() if is_json(text) else json_text(text))

    def _wrapped(
        self, reader: Reader, call: CallDraft, schema: Mapping[str, Any], key: str, is_string: bool
    ) -> Steps[None]:
        """Read an argument that the schema does not know: an object that holds those that it knows stands for them."""
        pieces: list[str] = []
        yield from reader.up_to((_END_OF_ARGUMENT,), pieces.append)
        text = "".join(pieces)
        if _holds_arguments(text, _properties(schema)):
            call.add(text.strip().removesuffix("}"))
        else:
            value = text.strip() if is_json(text) and not is_string else json_text(text)
            call.add(f"{{{json_text(key)}: {value}")

    def marks(self) -> Iterator[str]:
        """All of them."""
        yield from (_CALL, _END_OF_CALL, _ARGUMENT, _END_OF_ARGUMENT)

    def lark(self, writer: GrammarWriter) -> str:
        """The name, and the schema's properties in their order."""
        schema = writer.tool.schema
        required = writer.required(schema)
        properties = schema.get("properties") or {}
        arguments = [
            writer.rule(self._argument(writer, name, inner)) + ("" if name in required else "?")
            for name, inner in properties.items()
        ]
        if not properties and schema.get("additionalProperties") is not False:
            arguments = [writer.rule(self._any_argument(writer)) + "*"]
        begin = f'{_CALL}{writer.tool.name}">\n'
        return " ".join([writer.text(begin), *arguments, writer.text(_END_OF_CALL)])

    def _any_argument(self, writer: GrammarWriter) -> str:
        """An argument that no schema names."""
        texts = [writer.text(text) for text in (_ARGUMENT, '" string="', 'true">', 'false">', "\n")]
        argument, is_string, true, false, line_end = texts
        value = (
            f"({true} {writer.free_text_before(_END_OF_ARGUMENT)}"
            f" | {false} {writer.json({})} {writer.text(_END_OF_ARGUMENT)})"
        )
        return f"{argument} {ANY_NAME} {is_string} {value} {line_end}"

    def _argument(self, writer: GrammarWriter, name: str, schema: Mapping[str, Any] | bool) -> str:
        begin = f'{_ARGUMENT}{name}" string="'
        end = _END_OF_ARGUMENT
        values = None
        if isinstance(schema, Mapping):
            values = [schema["const"]] if "const" in schema else schema.get("enum")
        is_string = isinstance(schema, Mapping) and schema.get("type") == "string"
        if is_string or (values and all(isinstance(value, str) for value in values)):
            assert isinstance(schema, Mapping)
            if values is None:
                value = writer.plain_string(schema, end)
            else:
                value = f"({' | '.join(writer.text(text) for text in values)}) {writer.text(end)}"
            return f"{writer.text(begin + 'true' + chr(34) + '>')} {value} {writer.text(chr(10))}"
        root = writer.tool.schema
        inner = {**schema} if isinstance(schema, Mapping) else ({} if schema else {"not": {}})
        inner.update({key: root[key] for key in ("$defs", "definitions") if key in root and key not in inner})
        return f"{writer.text(begin + 'false' + chr(34) + '>')} {writer.json(inner)} {writer.text(end + chr(10))}"


def _properties(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    properties = schema.get("properties")
    return properties if isinstance(properties, Mapping) else {}


def _holds_arguments(text: str, properties: Mapping[str, Any]) -> bool:
    """Whether a text is a JSON object, not empty, of such properties."""
    try:
        held = json.loads(text) if is_json(text) else None
    except (ValueError, RecursionError):  # numbers, or brackets, beyond all measure
        return False
    return isinstance(held, dict) and bool(held) and held.keys() <= properties.keys()


def _takes_strings(schema: Mapping[str, Any], name: str) -> bool:
    """Whether an argument may be a string: models call everything one sometimes."""
    inner = _properties(schema).get(name)
    if not isinstance(inner, Mapping):
        return True
    options = inner.get("anyOf") or inner.get("oneOf") or [inner]
    kinds = [option.get("type", "string") for option in options if isinstance(option, Mapping)]
    return any(kind == "string" or (isinstance(kind, list) and "string" in kind) for kind in kinds)
