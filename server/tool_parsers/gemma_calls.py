"""Calls as Gemma writes them: call:f{city:<escape>Paris<escape>,days:[1,2]}."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jaxserve.server.tool_parsers.call_draft import CallDraft
from jaxserve.server.tool_parsers.grammar import GrammarWriter, json_text
from jaxserve.server.tool_parsers.json_scanner import is_json
from jaxserve.server.tool_parsers.literal_grammar import LiteralStyle, LiteralWriter
from jaxserve.server.tool_parsers.reader import NoCallError, Reader, Steps

_BARE_KEY = re.compile(r"[^:,{}\[\]]*")
_BARE_VALUE = re.compile(r"[^,}\]]*")
_DEEPEST = 64  # levels of lists and objects

Sink = Callable[[str], None]
Schema = Mapping[str, Any]


@dataclass(frozen=True)
class GemmaCall:
    """A call whose strings stand between marks, and whose other values stand bare; they become JSON as they come."""

    quote: str  # the mark before and behind a string
    quotes_all: bool = False  # values that are no strings may stand between marks as well

    def read(self, reader: Reader, call: CallDraft) -> Steps[None]:
        """Read one call."""
        call.begin()
        yield from reader.expect("call:")
        name = yield from reader.function_name()
        if (yield from reader.peek()) != "{":
            raise NoCallError("the arguments are missing")
        call.start(name)
        yield from self._object(reader, call.add, call.schema(name), 0)
        call.end()

    def _object(self, reader: Reader, sink: Sink, schema: Schema, depth: int) -> Steps[None]:
        if depth > _DEEPEST:
            raise NoCallError("too many brackets")
        yield from reader.expect("{")
        properties = schema.get("properties")
        before = "{"
        while (yield from reader.white()) != "}":
            key = yield from self._key(reader)
            yield from reader.expect(":")
            yield from reader.white()
            sink(f"{before}{json_text(key)}: ")
            before = ", "
            inner = properties.get(key) if isinstance(properties, Mapping) else None
            yield from self._value(reader, sink, inner if isinstance(inner, Mapping) else {}, depth)
            if (yield from reader.white()) != "}":
                yield from reader.expect(",")
        yield from reader.expect("}")
        sink("}" if before == ", " else "{}")

    def _list(self, reader: Reader, sink: Sink, schema: Schema, depth: int) -> Steps[None]:
        if depth > _DEEPEST:
            raise NoCallError("too many brackets")
        yield from reader.expect("[")
        items = schema.get("items")
        before = "["
        while (yield from reader.white()) != "]":
            sink(before)
            before = ", "
            yield from self._value(reader, sink, items if isinstance(items, Mapping) else {}, depth)
            if (yield from reader.white()) != "]":
                yield from reader.expect(",")
        yield from reader.expect("]")
        sink("]" if before == ", " else "[]")

    def _key(self, reader: Reader) -> Steps[str]:
        if (yield from reader.literal(self.quote)):
            pieces: list[str] = []
            yield from self._text(reader, pieces.append)
            yield from reader.white()
            return "".join(pieces)
        key = (yield from reader.match(_BARE_KEY)).strip()
        if not key:
            raise NoCallError("an argument without a name")
        return key

    def _value(self, reader: Reader, sink: Sink, schema: Schema, depth: int) -> Steps[None]:
        first = yield from reader.peek()
        if first == "{":
            yield from self._object(reader, sink, schema, depth + 1)
        elif first == "[":
            yield from self._list(reader, sink, schema, depth + 1)
        elif not (yield from reader.literal(self.quote)):
            sink(_bare_as_json((yield from reader.match(_BARE_VALUE)).strip(), schema))
        elif self.quotes_all and schema.get("type") != "string":
            pieces: list[str] = []
            yield from self._text(reader, pieces.append)
            text = "".join(pieces)
            sink(text if is_json(text) else json_text(text))
        else:
            sink('"')
            yield from self._text(reader, lambda text: sink(json_text(text)[1:-1]))
            sink('"')

    def _text(self, reader: Reader, sink: Sink) -> Steps[None]:
        yield from reader.up_to((self.quote,), sink)

    def marks(self) -> Iterator[str]:
        """The mark at strings."""
        yield self.quote

    def lark(self, writer: GrammarWriter) -> str:
        """The name, and values for the schema's properties."""
        arguments = LiteralWriter(writer, self._style()).arguments(writer.tool.schema)
        return f"{writer.text(f'call:{writer.tool.name}{{')} {arguments} {writer.text('}')}"

    def _style(self) -> LiteralStyle:
        quote = self.quote

        def key(name: str) -> str:
            return f"{name}:" if re.fullmatch(r"\w+", name) else f"{quote}{name}{quote}:"

        return LiteralStyle(
            key=key,
            inner_key=key,
            true="true",
            false="false",
            null="null",
            separator=",",
            string=lambda writer, schema: f"{writer.text(quote)} {writer.plain_string(schema, quote)}",
            string_texts=(lambda text: f"{quote}{text}{quote}",),
        )


def _bare_as_json(text: str, schema: Schema) -> str:
    """The JSON text of a value that stands without marks: a number or a name of JSON's, or else a string."""
    if schema.get("type") == "string":
        return json_text(text)
    if is_json(text):
        return text
    try:
        number = float(text)
    except ValueError:
        return json_text(text)
    return json.dumps(number) if math.isfinite(number) else json_text(text)  # such as 1. and .5
