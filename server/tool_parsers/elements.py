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

A new element is a frozen dataclass with three methods:

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

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from jaxserve.server.tool_parsers.call_draft import CallDraft
from jaxserve.server.tool_parsers.grammar import GrammarWriter
from jaxserve.server.tool_parsers.reader import NoCallError, Reader, Steps


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
class MaybeMark(Mark):
    """A literal that the model may leave out, though it is meant to write it."""

    def read(self, reader: Reader, call: CallDraft) -> Steps[None]:
        """Read it if it comes."""
        yield from reader.literal(self.text)


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


class Maybe:
    """One of several literals, or none of them."""

    def __init__(self, *texts: str, usual: str = "") -> None:
        """`usual` is what the model is to write: one of the literals, or nothing."""
        self.texts = texts
        self.usual = usual

    def read(self, reader: Reader, call: CallDraft) -> Steps[None]:
        """Read the one that comes, if one does."""
        for text in self.texts:
            if (yield from reader.literal(text)):
                return

    def marks(self) -> Iterator[str]:
        """All of them."""
        yield from self.texts

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
        assert (isinstance(first, Mark) and first.text == mark) or (
            isinstance(first, Maybe) and first.usual == mark
        )
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
    separator: str = ","  # "": nothing but white space, and then there is an end
    end: str = ""  # the mark behind the last call; "": there is none
    usual: str = ", "  # the separator as the model writes it
    usual_before_end: str = ""  # white space

    def read(self, reader: Reader, call: CallDraft) -> Steps[None]:
        """Read them, and the end; without an end, what follows the last call is left for others."""
        while True:
            yield from self.item.read(reader, call)
            yield from reader.white()
            if self.end and (yield from reader.literal(self.end)):
                return
            has_separator = yield from reader.literal(self.separator)
            if not has_separator and self.end:
                raise NoCallError(f"{self.separator!r} or {self.end!r} is missing")
            if not has_separator:
                return
            yield from reader.white()

    def marks(self) -> Iterator[str]:
        """Those of the calls, and the end."""
        yield from self.item.marks()
        if self.end:
            yield self.end

    def lark(self, writer: GrammarWriter) -> str:
        """One call of any of the tools, or several."""
        call = writer.calls(lambda: self.item.lark(writer))
        more = f" ({writer.text(self.usual)} {call})*" if writer.is_parallel else ""
        # Apart, since the lexer is greedy: "\n" would be taken for the beginning of "\n</end>" where both may come.
        return f"{call}{more} {writer.text(self.usual_before_end)} {writer.text(self.end)}"
