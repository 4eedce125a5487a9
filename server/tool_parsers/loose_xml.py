"""Calls as XML elements, in whatever way XML may be written, and in some in which it may not."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jaxserve.server.tool_parsers.call_draft import CallDraft
from jaxserve.server.tool_parsers.coercion import as_json, property_types, resolved
from jaxserve.server.tool_parsers.grammar import GrammarWriter, json_text
from jaxserve.server.tool_parsers.reader import NoCallError, Reader, Steps, checked_function_name
from jaxserve.server.tool_parsers.tagged_calls import AttributeCall

_IN_TAG = re.compile(r"[^<>]*")
_NAME = re.compile(r"""(?:^|\s)name\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'/]+))""")
_WHITE = str.maketrans("\u0120\u010a", " \n")  # as byte-level vocabularies write white space
_WRAPPERS = ("properties", "arguments")
_OBJECT = frozenset(("object",))
_MOST_BETWEEN = 200  # characters between the arguments of a call: of other elements, as a rule


@dataclass(frozen=True)
class LooseXmlCall(AttributeCall):
    """`<function name="f"><param name="a">1</param></function>`, leniently.

    `open` and `key_open` are the tags without their attributes, of which `name` counts, wherever it stands.  Between
    arguments anything may stand; those that the function does not have are left out, unless they hold an object of
    those that it has.  A name given twice, and an argument without one, make it no call.
    """

    def read(self, reader: Reader, call: CallDraft) -> Steps[None]:
        """Read one call, behind the name of its tag."""
        call.begin()
        name, _ = yield from self._rest_of_tag(reader)
        call.start(checked_function_name(name))
        schema = call.schema(name)
        properties = resolved(schema, schema).get("properties") or {}
        told: set[str] = set()
        while (yield from self._next_tag(reader)) != self.end:
            key, is_empty = yield from self._rest_of_tag(reader)
            if not properties or key in properties:
                call.add(_before(told, key))
                if is_empty:
                    call.add(as_json("", property_types(schema, key)))
                else:
                    yield from self.read_value(reader, call, schema, key)
                continue
            text = "" if is_empty else (yield from self.read_text(reader, schema))
            for inner, value in _wrapped(text).items() if key in _WRAPPERS else ():
                if inner in properties:
                    written = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                    call.add(_before(told, inner) + as_json(written, property_types(schema, inner)))
        if told:
            call.add("}")
        call.end()

    def _next_tag(self, reader: Reader) -> Steps[str]:
        """Read on to the next argument, or the end of the call."""
        between = 0

        def count(text: str) -> None:
            nonlocal between
            between += len(text)
            if between > _MOST_BETWEEN:
                raise NoCallError("there is a text in the call")

        # Another call is left to be read, as one.
        tags = re.compile(f"{re.escape(self.key_open)}|{re.escape(self.end)}|(?={re.escape(self.open)})")
        tag = yield from reader.until(tags, max(len(self.end), len(self.open)), count)
        if not tag:
            raise NoCallError("there is a call in the call")
        return tag

    def _rest_of_tag(self, reader: Reader) -> Steps[tuple[str, bool]]:
        """Read the attributes of a tag; the name among them, and whether the element ends with its tag."""
        text = (yield from reader.match(_IN_TAG)).translate(_WHITE)
        yield from reader.expect(">")
        if text[:1] in ("'", '"'):  # behind `name=`
            text = f"name={text}"
        match = _NAME.search(text) if text[:1].isspace() or text.startswith("name") else None
        if match is None:
            raise NoCallError("a name is missing")
        return html.unescape(next(filter(None, match.groups()), "")).strip(), text.endswith("/")

    def marks(self) -> Iterator[str]:
        """The tags."""
        yield from (self.open, self.key_open, self.values.end, self.end, "<![CDATA[", "]]>")

    def lark(self, writer: GrammarWriter) -> str:
        """The name, and the arguments."""
        begin = f"{self.quote}{writer.tool.name}{self.quote}>"
        return f"{writer.text(begin)} {self.lark_arguments(writer)} {writer.text(self.end)}"

    def around_key(self) -> tuple[str, str]:
        """The tag of an argument."""
        return f"{self.key_open} name={self.quote}", f"{self.quote}>"


def _before(told: set[str], key: str) -> str:
    """The JSON before the value of an argument."""
    if key in told:
        raise NoCallError(f"{key!r} is there twice")
    told.add(key)
    return f"{'{' if len(told) == 1 else ', '}{json_text(key)}: "


def _wrapped(text: str) -> dict[str, Any]:
    """The object that is written as JSON or as Python."""
    value = json.loads(as_json(text, _OBJECT))
    if not isinstance(value, dict):
        raise NoCallError("the arguments are no object")
    return value
