"""Calls whose arguments are JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from jaxserve.server.tool_parsers.call_draft import CallDraft
from jaxserve.server.tool_parsers.grammar import GrammarWriter, json_text
from jaxserve.server.tool_parsers.json_scanner import is_json
from jaxserve.server.tool_parsers.reader import NoCallError, Reader, Steps


@dataclass(frozen=True)
class JsonCall:
    """A call as one JSON object with its name and its arguments, in any order.

    Other keys are read over, unless `only_known_keys`: then they make the object no call at once.  Arguments are the
    model's own text; where that is a string in which an object is written, they are this object.
    """

    name_keys: tuple[str, ...] = ("name",)
    argument_keys: tuple[str, ...] = ("arguments", "parameters")
    only_known_keys: bool = False  # for JSON that nothing marks as a call
    needs_arguments: bool = False  # likewise: without them it is no call

    def read(self, reader: Reader, call: CallDraft) -> Steps[None]:
        """Read one object."""
        call.begin()
        name = held_arguments = None
        yield from reader.expect("{")
        if (yield from reader.white()) == "}":
            raise NoCallError("an object without a name")
        while True:
            key = yield from self._string(reader)
            yield from reader.white()
            yield from reader.expect(":")
            first = yield from reader.white()
            if key in self.name_keys and name is None:
                name = yield from self._string(reader)
                if not name or not _is_unicode(name):
                    raise NoCallError("no name")
                call.start(name)
                if held_arguments:
                    call.add(held_arguments)
            elif key in self.argument_keys and held_arguments is None:
                if first == "{" and name is not None:
                    held_arguments = ""
                    yield from reader.json(call.add)
                else:
                    held_arguments = _unwrapped((yield from self._value(reader)))
                    if name is not None and held_arguments:
                        call.add(held_arguments)
            elif self.only_known_keys and key not in ("type", "id"):
                raise NoCallError(f"an object with {key!r} is no call")
            else:
                yield from self._value(reader)
            yield from reader.white()
            if (yield from reader.literal("}")):
                break
            yield from reader.expect(",")
            yield from reader.white()
        if name is None or (self.needs_arguments and held_arguments is None):
            raise NoCallError("an object without name or arguments")
        call.end()

    def _value(self, reader: Reader) -> Steps[str]:
        pieces: list[str] = []
        yield from reader.json(pieces.append)
        return "".join(pieces)

    def _string(self, reader: Reader) -> Steps[str]:
        if (yield from reader.peek()) != '"':
            raise NoCallError("a string is missing")
        return json.loads((yield from self._value(reader)))

    def marks(self) -> Iterator[str]:
        """None."""
        return iter(())

    def lark(self, writer: GrammarWriter) -> str:
        """The object, the name first."""
        name = json_text(writer.tool.name)
        begin = f'{{"{self.name_keys[0]}": {name}, "{self.argument_keys[0]}": '
        return f"{writer.text(begin)} {writer.json(writer.tool.schema)} {writer.text('}')}"


@dataclass(frozen=True)
class Name:
    """The name of the called function, where it stands alone."""

    def read(self, reader: Reader, call: CallDraft) -> Steps[None]:
        """Read it; the call begins."""
        call.begin()
        name = yield from reader.function_name()
        call.start(name)

    def marks(self) -> Iterator[str]:
        """None."""
        return iter(())

    def lark(self, writer: GrammarWriter) -> str:
        """The name of the tool."""
        return writer.text(writer.tool.name)


@dataclass(frozen=True)
class JsonArguments:
    """The arguments as a JSON object; the call ends with them."""

    def read(self, reader: Reader, call: CallDraft) -> Steps[None]:
        """Read the object."""
        if (yield from reader.peek()) != "{":
            raise NoCallError("the arguments are no object")
        yield from reader.json(call.add)
        call.end()

    def marks(self) -> Iterator[str]:
        """None."""
        return iter(())

    def lark(self, writer: GrammarWriter) -> str:
        """JSON for the tool's schema."""
        return writer.json(writer.tool.schema)


def _unwrapped(value: str) -> str:
    """JSON text as arguments: empty for null, and an object that was written into a string taken out of it."""
    if value == "null":
        return ""
    if value.startswith('"'):
        text = json.loads(value).strip()
        if text.startswith("{") and is_json(text) and _is_unicode(text):
            return text
    return value


def _is_unicode(text: str) -> bool:
    """Whether a text can be sent: JSON's escapes may name half a character."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
