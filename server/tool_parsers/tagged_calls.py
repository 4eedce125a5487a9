"""Calls whose arguments stand between tags as plain text, and become what their schema says."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxserve.server.tool_parsers.call_draft import CallDraft
from jaxserve.server.tool_parsers.coercion import TEXT, as_json, may_be_container, property_types, resolved
from jaxserve.server.tool_parsers.grammar import ANY_NAME, GrammarWriter, json_text
from jaxserve.server.tool_parsers.reader import Reader, Steps, checked_function_name

_IN_TAG = re.compile(r"[^<>\"'\n]*")
_IN_KEY = re.compile(r"[^<>]*")
_ENTITY = r"&(?:lt|gt|amp|quot|apos|#[0-9]{1,7}|#x[0-9a-fA-F]{1,6});"
_CDATA, _END_OF_CDATA = "<![CDATA[", "]]>"
_LONGEST_SPACE = 4  # white space that is looked over between two marks
_TEXT_KEYWORDS = ("minLength", "maxLength", "pattern")


@dataclass(frozen=True)
class Values:
    """How values are written, and where they end."""

    end: str  # the mark behind a value
    wrap: str = ""  # white space before and behind a value that is no part of it
    # entities stand for characters, CDATA for what it holds, and white space around a value is no part of it
    is_xml: bool = False
    # regular expression of what else ends a value, where the model has left the mark out
    other_ends: str = ""
    longest_other_end: int = 0  # characters


@dataclass(frozen=True)
class _Ends:
    """What a value ends with."""

    marks: re.Pattern[str]
    longest: int  # characters of such a mark
    has_entities: bool  # which are among the marks, and end nothing


class TaggedArguments:
    """Reads and describes the arguments of a call; what stands around names and keys is told by subclasses."""

    values: Values

    def read_value(self, reader: Reader, call: CallDraft, schema: Mapping[str, Any], key: str) -> Steps[str]:
        """Read a value and the mark that ends it; its JSON goes to `call`.  Returns the mark."""
        types = property_types(schema, key)
        ends = yield from self._begin_value(reader, schema)
        if types != TEXT and (types or may_be_container((yield from reader.peek()))):
            pieces: list[str] = []
            mark = yield from self._read_rest(reader, ends, pieces.append)
            call.add(as_json("".join(pieces), types))
            return mark
        call.add('"')
        mark = yield from self._read_rest(reader, ends, lambda text: call.add(json_text(text)[1:-1]))
        call.add('"')
        return mark

    def read_text(self, reader: Reader, schema: Mapping[str, Any]) -> Steps[str]:
        """Read a value and the mark that ends it.  Returns the value's text."""
        pieces: list[str] = []
        ends = yield from self._begin_value(reader, schema)
        yield from self._read_rest(reader, ends, pieces.append)
        return "".join(pieces)

    def _begin_value(self, reader: Reader, schema: Mapping[str, Any]) -> Steps[_Ends]:
        """Read what comes before a value; tells where it ends."""
        values = self.values
        if values.wrap:
            yield from reader.literal(values.wrap)
        if values.is_xml:
            yield from reader.white()
            if (yield from reader.literal(_CDATA)):
                end = rf"{re.escape(_END_OF_CDATA)}\s{{0,{_LONGEST_SPACE}}}{values.end}"
                return _Ends(re.compile(end), 64, has_entities=False)
        return self._ends_of_value(schema)

    def _read_rest(self, reader: Reader, ends: _Ends, sink: Callable[[str], None]) -> Steps[str]:
        while True:
            mark = yield from reader.until(ends.marks, ends.longest, sink)
            if not (ends.has_entities and mark.startswith("&")):
                return mark
            sink(html.unescape(mark))

    def lark_arguments(self, writer: GrammarWriter) -> str:
        """The schema's properties in their order; any arguments where it names none."""
        schema = writer.tool.schema
        properties = schema.get("properties") or {}
        required = writer.required(schema)
        arguments = [
            writer.rule(self._lark_argument(writer, name, inner)) + ("" if name in required else "?")
            for name, inner in properties.items()
        ]
        if not properties and schema.get("additionalProperties") is not False:
            before, behind = self.around_key()
            any_key = f"{writer.text(before)} {ANY_NAME} {writer.text(behind)}"
            value = writer.free_text_before(self.values.end)
            return f"({any_key} {value} {writer.text(self.behind_value())})*"
        return " ".join(arguments)

    def around_key(self) -> tuple[str, str]:
        """What the model writes before a key, and from there to the value."""
        raise NotImplementedError

    def behind_value(self) -> str:
        """White space that the model writes behind the mark that ends a value."""
        raise NotImplementedError

    def next_key(self, names: str) -> str:
        """Regular expression of the beginning of the next argument, whose key is one of `names`."""
        raise NotImplementedError

    def _ends_of_value(self, schema: Mapping[str, Any]) -> _Ends:
        values = self.values
        ends = [f"{re.escape(values.wrap)}?{re.escape(values.end)}" if values.wrap else re.escape(values.end)]
        longest = len(values.wrap) + len(values.end)
        if values.other_ends:
            # Only known keys tell an argument from a value that speaks of such tags.
            names = [str(name) for name in schema.get("properties") or ()]
            ends += [values.other_ends, self.next_key("|".join(map(re.escape, names)) or r"[\w.\-]{1,64}")]
            longest = max(longest, values.longest_other_end, 32 + max([64, *map(len, names)]))
        if values.is_xml:
            ends = [rf"\s{{0,{_LONGEST_SPACE}}}{ends[0]}", *ends[1:], _ENTITY]
            longest = max(longest + _LONGEST_SPACE, 12)
        return _Ends(re.compile("|".join(ends)), longest, has_entities=values.is_xml)

    def _lark_argument(self, writer: GrammarWriter, name: str, schema: Mapping[str, Any] | bool) -> str:
        before, behind = self.around_key()
        value = self._lark_value(writer, name, schema)
        return f"{writer.text(f'{before}{name}{behind}')} {value} {writer.text(self.behind_value())}"

    def _lark_value(self, writer: GrammarWriter, name: str, schema: Mapping[str, Any] | bool) -> str:
        """A value, and the mark that ends it."""
        values, root = self.values, writer.tool.schema
        end = f"{values.wrap}{values.end}"
        inner = resolved(schema, root) if isinstance(schema, Mapping) else {}
        given = [inner["const"]] if "const" in inner else inner.get("enum")
        types = property_types(root, name)
        if isinstance(given, list) and all(isinstance(each, str) for each in given):
            return f"({' | '.join(writer.text(each) for each in given)}) {writer.text(end)}"
        if "string" in types or not types:
            if types == TEXT and any(keyword in inner for keyword in _TEXT_KEYWORDS):
                return writer.plain_string(inner, end, without=values.end[0])
            text = writer.free_text_before(values.end)
            # A value that begins with a tag might be taken for CDATA.
            return f"({writer.text(values.end)} | /[^<&]/ {text})" if values.is_xml else text
        if types == {"boolean"}:
            words = " | ".join(writer.text(word) for word in ("true", "false", "True", "False"))
            return f"({words}) {writer.text(end)}"
        held = {**inner} if schema is not False else {"not": {}}
        held.update({key: root[key] for key in ("$defs", "definitions") if key in root and key not in held})
        return f"{writer.json(held)} {writer.text(end)}"


@dataclass(frozen=True)
class AttributeCall(TaggedArguments):
    """A call as an element, with one for each argument: `<function=f><parameter=a>1</parameter></function>`.

    Names are attributes of the tags, with quotes around them or without.
    """

    open: str  # before the call's name
    key_open: str  # before an argument's name
    values: Values
    end: str  # of the call
    quote: str = ""  # around names, as the model writes them
    space: str = ""  # behind tags, as the model writes it
    other_ends: tuple[str, ...] = field(default=())  # marks that end the call where its own is left out

    def read(self, reader: Reader, call: CallDraft) -> Steps[None]:
        """Read one call."""
        call.begin()
        yield from reader.expect(self.open)
        name = checked_function_name((yield from self._attribute(reader)))
        call.start(name)
        schema = call.schema(name)
        before, mark = "{", ""
        while not (yield from self._is_over(reader, mark)):
            if not mark.rstrip().endswith(self.key_open):
                yield from reader.white()
                yield from reader.expect(self.key_open)
            key = yield from self._attribute(reader)
            call.add(f"{before}{json_text(key)}: ")
            before = ", "
            mark = yield from self.read_value(reader, call, schema, key)
        if before == ", ":
            call.add("}")
        call.end()

    def _is_over(self, reader: Reader, mark: str) -> Steps[bool]:
        """Whether the call ends here; reads what ends it, unless `mark`, behind the last value, did."""
        if any(mark.rstrip().endswith(end) for end in (self.end, *self.other_ends)):
            return True
        if mark.rstrip().endswith(self.key_open):
            return False
        yield from reader.white()
        for end in (self.end, *self.other_ends):
            if (yield from reader.literal(end)):
                return True
        return False

    def _attribute(self, reader: Reader) -> Steps[str]:
        """Read the rest of a tag that ends with a name."""
        first = yield from reader.white()
        quote = (yield from reader.take(1)) if first in "\"'" else ""
        name = yield from reader.match(_IN_TAG)
        if quote:
            yield from reader.expect(quote)
            yield from reader.white()
        yield from reader.expect(">")
        return name.strip()

    def marks(self) -> Iterator[str]:
        """The tags."""
        yield from (self.open, self.key_open, self.values.end, self.end, *self.other_ends)

    def lark(self, writer: GrammarWriter) -> str:
        """The name, and the arguments."""
        begin = f"{self.open}{self.quote}{writer.tool.name}{self.quote}>{self.space}"
        return f"{writer.text(begin)} {self.lark_arguments(writer)} {writer.text(self.end)}"

    def around_key(self) -> tuple[str, str]:
        """The tag."""
        return f"{self.key_open}{self.quote}", f"{self.quote}>{self.values.wrap}"

    def behind_value(self) -> str:
        """As behind all tags."""
        return self.space

    def next_key(self, names: str) -> str:
        """Where a line begins."""
        return rf"\n{re.escape(self.key_open)}(?=[\"']?(?:{names})[\"']?>)"


@dataclass(frozen=True)
class PairedCall(TaggedArguments):
    """A name, and then keys and values in turns: `f<arg_key>city</arg_key><arg_value>Paris</arg_value>`."""

    key_open: str
    key_end: str
    value_open: str
    values: Values
    end: str  # of the call
    space: str = ""  # behind the name and the tags, as the model writes it

    def read(self, reader: Reader, call: CallDraft) -> Steps[None]:
        """Read one call."""
        call.begin()
        yield from reader.white()
        name = yield from reader.function_name()
        yield from reader.white()
        if not (yield from reader.literal(self.end)):
            yield from reader.expect(self.key_open)
            call.start(name)
            yield from self._arguments(reader, call, name)
        else:
            call.start(name)
        call.end()

    def _arguments(self, reader: Reader, call: CallDraft, name: str) -> Steps[None]:
        before = "{"
        while True:
            key = (yield from reader.match(_IN_KEY)).strip()
            yield from reader.expect(self.key_end)
            yield from reader.white()
            yield from reader.expect(self.value_open)
            call.add(f"{before}{json_text(key)}: ")
            before = ", "
            yield from self.read_value(reader, call, call.schema(name), key)
            yield from reader.white()
            if (yield from reader.literal(self.end)):
                break
            yield from reader.expect(self.key_open)
        call.add("}")

    def marks(self) -> Iterator[str]:
        """The tags."""
        yield from (self.key_open, self.key_end, self.value_open, self.values.end, self.end)

    def lark(self, writer: GrammarWriter) -> str:
        """The name, and the arguments."""
        begin = f"{writer.tool.name}{self.space}"
        return f"{writer.text(begin)} {self.lark_arguments(writer)} {writer.text(self.end)}"

    def around_key(self) -> tuple[str, str]:
        """The tags."""
        return self.key_open, f"{self.key_end}{self.space}{self.value_open}"

    def behind_value(self) -> str:
        """As behind all tags."""
        return self.space
