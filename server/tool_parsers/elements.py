"""What formats of tool calls are made of: each element reads its part of the text.

How to declare a format
-----------------------
A format (`ToolFormat`) names what its calls begin with and what follows, as elements:

    ToolFormat(
        names=("hermes",),
        begins=("<tool_call>",),
        section=InOrder(Mark("<tool_call>"), Space("\\n"), One(JsonCall()), Space("\\n"), Mark("</tool_call>")),
        between="\\n",
    )

The machine (`CallParser`) looks for `begins` in the text and lets `section` read from there, marks included; after it,
it looks for the next one.  Whatever a section reads and then does not like (`NoCallError`) becomes content again, up
to where it stopped liking it.  Calls that a section has completed before stay.

A new element is a frozen dataclass with four methods:

- `read(reader, call)`, a generator: `yield` means "I need more text".  It reads through `Reader`'s methods
  (`yield from reader.expect("<x>")`), never keeps positions over a yield, and tells `CallDraft` what it finds: `begin`
  when a call begins, `start(name)`, `add(text)` for arguments as JSON text (all pieces joined are the arguments),
  `end` when the call is complete.  The order and place of these calls in the text must not depend on how the text
  was cut into pieces; nothing else is asked for streamed answers.  Read what comes, not what ought to come:
  be lenient about white space, strict about what decides between call and prose.  `add` early: arguments that
  have been added can be streamed.
- `marks()`: the literals in it that may be special tokens of a tokenizer, so that they are kept in the text.
- `lark(writer)`: the Lark expression (llguidance's dialect) of what the model is to write here when its calls are
  constrained.  What the grammar allows must be read as the calls that were meant.  Elements that depend on the called
  function (`writer.tool`) stand inside `One` or `Many`, which write their item once for every function.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from jaxserve.server.tool_parsers.call_draft import CallDraft
from jaxserve.server.tool_parsers.grammar import GrammarWriter, json_text
from jaxserve.server.tool_parsers.reader import NoCallError, Reader, Steps

FUNCTION_NAME = r"[A-Za-z_][\w.\-]*"


class Element(Protocol):
    """A part of a format."""

    def read(self, reader: Reader, call: CallDraft) -> Steps[None]:
        """Read this part, or raise NoCallError."""
        ...

    def marks(self) -> Iterator[str]:
        """The literals in it."""
        ...

    def lark(self, writer: GrammarWriter) -> str:
        """The Lark expression of what the model is to write."""
        ...


@dataclass(frozen=True)
class Mark:
    """A literal, or one of several."""

    text: str
    others: tuple[str, ...] = ()  # that are understood as well; none is the beginning of another

    def read(self, reader: Reader, call: CallDraft) -> Steps[None]:
        """Read it, or raise NoCallError."""
        for text in (self.text, *self.others):
            if (yield from reader.literal(text)):
                return
        raise NoCallError(f"{self.text!r} is missing")

    def marks(self) -> Iterator[str]:
        """Itself."""
        yield from (self.text, *self.others)

    def lark(self, writer: GrammarWriter) -> str:
        """The literal."""
        return writer.text(self.text)


@dataclass(frozen=True)
class Space:
    """Any white space, or none."""

    usual: str = ""  # what the model writes

    def read(self, reader: Reader, call: CallDraft) -> Steps[None]:
        """Read it."""
        yield from reader.white()

    def marks(self) -> Iterator[str]:
        """None."""
        return iter(())

    def lark(self, writer: GrammarWriter) -> str:
        """What is usual."""
        return writer.text(self.usual)


class InOrder:
    """One element after the other."""

    def __init__(self, *elements: Element) -> None:
        self.elements = elements

    def read(self, reader: Reader, call: CallDraft) -> Steps[None]:
        """Read all of them."""
        for element in self.elements:
            yield from element.read(reader, call)

    def marks(self) -> Iterator[str]:
        """Theirs."""
        for element in self.elements:
            yield from element.marks()

    def lark(self, writer: GrammarWriter) -> str:
        """Theirs."""
        return " ".join(filter(None, (element.lark(writer) for element in self.elements)))

    def behind(self, mark: str) -> InOrder:
        """The same without the mark that it begins with."""
        first = self.elements[0]
        assert isinstance(first, Mark)
        assert first.text == mark
        return InOrder(*self.elements[1:])


@dataclass(frozen=True)
class One:
    """A call."""

    item: Element

    def read(self, reader: Reader, call: CallDraft) -> Steps[None]:
        """Read it."""
        return self.item.read(reader, call)

    def marks(self) -> Iterator[str]:
        """Its own."""
        return self.item.marks()

    def lark(self, writer: GrammarWriter) -> str:
        """A call of any of the tools."""
        return writer.calls(lambda: self.item.lark(writer))


@dataclass(frozen=True)
class Many:
    """Calls with a separator between them."""

    item: Element
    separator: str = ","  # "": nothing but white space
    usual: str = ", "  # the separator as the model writes it

    def read(self, reader: Reader, call: CallDraft) -> Steps[None]:
        """Read them; what follows is left for others."""
        while True:
            yield from self.item.read(reader, call)
            yield from reader.white()
            if not (yield from reader.literal(self.separator)):
                return
            yield from reader.white()

    def marks(self) -> Iterator[str]:
        """Those of the calls."""
        return self.item.marks()

    def lark(self, writer: GrammarWriter) -> str:
        """One call of any of the tools, or several."""
        call = writer.calls(lambda: self.item.lark(writer))
        return f"{call} ({writer.text(self.usual)} {call})*" if writer.is_parallel else call


@dataclass(frozen=True)
class JsonCall:
    """A call as one JSON object with its name and its arguments, in any order.

    Other keys are read over, unless `only_known_keys`: then they make the object no call at once.
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
                if not name:
                    raise NoCallError("an empty name")
                call.start(name)
                if held_arguments:
                    call.add(held_arguments)
            elif key in self.argument_keys and held_arguments is None:
                if first == "n" or name is None:
                    text = yield from self._value(reader)
                    held_arguments = "" if text == "null" else text
                    if name is not None and held_arguments:
                        call.add(held_arguments)
                else:
                    held_arguments = ""
                    yield from reader.json(call.add)
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

    pattern: str = FUNCTION_NAME  # of a whole name

    def read(self, reader: Reader, call: CallDraft) -> Steps[None]:
        """Read it; the call begins."""
        call.begin()
        name = yield from reader.match(re.compile(r"[\w.\-]*"))
        if not re.fullmatch(self.pattern, name):
            raise NoCallError(f"{name!r} is no function's name")
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
