"""Calls as Python writes them: f(city="Paris", days=[1, 2])."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from jaxserve.server.tool_parsers.call_draft import CallDraft
from jaxserve.server.tool_parsers.grammar import GrammarWriter, json_text
from jaxserve.server.tool_parsers.literal_grammar import PYTHON_STYLE, LiteralWriter
from jaxserve.server.tool_parsers.reader import WHITE, NoCallError, Reader, Steps

_WORD = re.compile(r"[\w.+\-]*")
_KEY = re.compile(r"\w*")
_JSON_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_ZEROS_BEFORE = re.compile(r"-?0[0-9]{1,39}")
_NAMED = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_BODIES = {quote: re.compile(rf"[^\\{quote}]*") for quote in "\"'"}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "\n": ""}
_ESCAPES |= {character: character for character in "\\'\"/"}
_NUM_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}
_BEHIND_LITERALS = ",)]}:"
_DEEPEST = 64  # levels of lists and dicts

Sink = Callable[[str], None]


@dataclass(frozen=True)
class PythonCall:
    """A call with keyword arguments that are literals, of Python or of JSON; the arguments become JSON as they come."""

    def read(self, reader: Reader, call: CallDraft) -> Steps[None]:
        """Read one call."""
        call.begin()
        name = yield from reader.function_name()
        yield from reader.expect("(")
        call.start(name)
        before = "{"
        while (yield from reader.white()) != ")":
            key = yield from reader.match(_KEY)
            if not key:
                raise NoCallError("an argument without a name")
            yield from reader.white()
            yield from reader.expect("=")
            yield from reader.white()
            call.add(f"{before}{json_text(key)}: ")
            before = ", "
            yield from read_literal(reader, call.add)
            yield from _comma_before(")", reader)
        yield from reader.expect(")")
        call.add("}" if before == ", " else "{}")
        call.end()

    def marks(self) -> Iterator[str]:
        """None."""
        return iter(())

    def lark(self, writer: GrammarWriter) -> str:
        """The name, and literals for the schema's properties."""
        arguments = LiteralWriter(writer, PYTHON_STYLE).arguments(writer.tool.schema)
        return f"{writer.text(writer.tool.name + '(')} {arguments} {writer.text(')')}"


def read_literal(reader: Reader, sink: Sink, depth: int = 0) -> Steps[None]:
    """Read a literal; its JSON text goes to `sink` as it comes."""
    first = yield from reader.peek()
    if depth > _DEEPEST:
        raise NoCallError("too many brackets")
    if first in "\"'":
        yield from _read_string(reader, sink)
    elif first == "[":
        yield from _read_list(reader, sink, depth)
    elif first == "{":
        yield from _read_dict(reader, sink, depth)
    else:
        sink(_word_as_json((yield from reader.match(_WORD))))


def _read_list(reader: Reader, sink: Sink, depth: int) -> Steps[None]:
    yield from reader.expect("[")
    yield from _read_items("]", reader, sink, depth, before="[")


def _read_items(end: str, reader: Reader, sink: Sink, depth: int, before: str) -> Steps[None]:
    """Read items up to the bracket `end`; `before` is the JSON text before the next one."""
    while (yield from reader.white()) != end:
        sink(before)
        before = ", "
        yield from read_literal(reader, sink, depth + 1)
        yield from _comma_before(end, reader)
    yield from reader.expect(end)
    sink("]" if before == ", " else "[]")


def _read_dict(reader: Reader, sink: Sink, depth: int) -> Steps[None]:
    """A dict, whose keys are strings, or a set, which becomes a list."""
    yield from reader.expect("{")
    before = "{"
    while (yield from reader.white()) != "}":
        pieces: list[str] = []
        yield from read_literal(reader, pieces.append, depth + 1)
        first = "".join(pieces)
        follows = yield from reader.white()
        if follows in ",}" and before == "{":
            sink("[" + first)
            yield from _comma_before("}", reader)
            yield from _read_items("}", reader, sink, depth, before=", ")
            return
        if not first.startswith('"'):
            raise NoCallError("a key that is no string")
        yield from reader.expect(":")
        yield from reader.white()
        sink(f"{before}{first}: ")
        before = ", "
        yield from read_literal(reader, sink, depth + 1)
        yield from _comma_before("}", reader)
    yield from reader.expect("}")
    sink("}" if before == ", " else "{}")


def _comma_before(end: str, reader: Reader) -> Steps[None]:
    """Read what stands behind an item: a comma, or nothing before the end."""
    if (yield from reader.white()) != end:
        yield from reader.expect(",")


def _read_string(reader: Reader, sink: Sink) -> Steps[None]:
    quote = yield from reader.take(1)
    end = quote * 3 if (yield from reader.literal(quote * 2)) else quote
    sink('"')

    def escaped(text: str) -> None:
        sink(json_text(text)[1:-1])

    while True:
        following = yield from reader.run(_BODIES[quote], escaped)
        if following == "\\":
            yield from reader.expect("\\")
            sink((yield from _read_escape(reader)))
        elif end != quote and (yield from reader.literal(end)):
            break
        else:
            yield from reader.expect(quote)
            white = "" if end != quote else (yield from reader.match(WHITE))
            if end == quote and (yield from reader.peek()) in _BEHIND_LITERALS:
                break
            # One of fewer than three, or of a text in the text, such as the shell's: models forget to escape those.
            escaped(quote + white)
    sink('"')


def _read_escape(reader: Reader) -> Steps[str]:
    """What follows a backslash; what it stands for, as JSON text between quotes."""
    kind = yield from reader.take(1)
    if kind in _NUM_HEX_DIGITS:
        digits = yield from reader.take(_NUM_HEX_DIGITS[kind])
        try:
            character = chr(int(digits, 16)) if digits.isalnum() else ""
        except (ValueError, OverflowError):
            character = ""
        if not character:
            raise NoCallError(f"\\{kind}{digits} is no character")
        if "\ud800" <= character <= "\udfff":
            return f"\\u{ord(character):04x}"  # half of a pair, which JSON writes the same way
        return json_text(character)[1:-1]
    if kind in _ESCAPES:
        return json_text(_ESCAPES[kind])[1:-1]
    return json_text("\\" + kind)[1:-1]  # no escape, as in Python


def _word_as_json(word: str) -> str:
    """The JSON text of a literal without brackets and quotes."""
    if word in _NAMED:
        return _NAMED[word]
    if _JSON_NUMBER.fullmatch(word) and math.isfinite(float(word)):
        return word
    if _ZEROS_BEFORE.fullmatch(word):
        return str(int(word))  # no literal of Python's, but what models write
    try:
        value = ast.literal_eval(word) if len(word) <= 40 else None
    except (ValueError, SyntaxError):
        value = None
    if isinstance(value, int | float) and math.isfinite(value):
        return json.dumps(value)  # such as 1_000 and .5
    raise NoCallError(f"{word!r} is no literal")
