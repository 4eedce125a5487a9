"""The state machine that every format of reasoning shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxserve.server.parsing.events import Content, Event, Reasoning
from jaxserve.server.parsing.joining import append_event
from jaxserve.server.tool_parsers.reader import WHITE, Reader, Steps


class ReasoningSplitter:
    """Tells one answer's reasoning from the rest, which comes out as content.

    Byte for byte, except for the marks, for white space around marks at the answer's beginning, and for reasoning
    that is nothing but white space.
    """

    def __init__(
        self,
        starts: Sequence[str],
        ends: Sequence[str],
        *,
        is_inside: bool,
        is_over: bool,
        answer_marks: tuple[str, str] | None = None,
        is_content: bool = False,
    ) -> None:
        """See ReasoningFormat for the arguments.

        Args:
            is_inside: the answer begins inside reasoning, whether or not the beginning mark comes.
            is_over: the reasoning was over before the answer begins.
        """
        self._starts = starts
        self._ends = ends
        self._is_inside = is_inside
        self._is_over = is_over
        self._answer_marks = answer_marks
        self._is_content = is_content
        self._reader = Reader()
        self._events: list[Event] = []
        self._blank: list[str] = []  # white space with which the reasoning begins, until more comes
        self._has_thought = False
        self._sink: Callable[[str], None] = self._think if is_inside else self._say  # of text at this place
        self._steps: Steps[None] = self._read()

    def push(self, text: str, token_ids: Sequence[int] = ()) -> list[Event]:
        """What is certain once `text` has come too."""
        self._reader.feed(text)
        next(self._steps)
        return self._take_events()

    def flush(self) -> list[Event]:
        """What is held back: it is no mark, since something else than text follows."""
        reader = self._reader
        held, reader.position = reader.text[reader.position :], len(reader.text)
        if held:
            self._sink(held)
        return self._take_events()

    def finish(self) -> list[Event]:
        """What is left when the answer has ended."""
        rest = self._reader.rest()
        if rest:
            self._sink(rest)
        return self._take_events()

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _read(self) -> Steps[None]:
        """Never ends: what comes last is content for ever."""
        reader = self._reader
        if self._is_content:
            if not self._is_over:
                self._say(self._starts[0])
        elif not self._is_over:
            white = yield from reader.match(WHITE)
            has_start = yield from self._start()
            if has_start or self._is_inside:
                self._sink = self._think
                if not has_start:
                    self._think(white)
                yield from reader.up_to(self._ends, self._think)
                reader.settle()
                self._sink = self._say
            elif white:
                self._say(white)
        if self._answer_marks is not None:
            yield from self._answer(*self._answer_marks)
        while True:
            if reader.position < len(reader.text):
                text, reader.position = reader.text[reader.position :], len(reader.text)
                self._say(text)
            yield

    def _start(self) -> Steps[bool]:
        for mark in self._starts:
            if (yield from self._reader.literal(mark)):
                self._reader.settle()
                return True
        return False

    def _answer(self, start: str, end: str) -> Steps[None]:
        reader = self._reader
        white = yield from reader.match(WHITE)
        if (yield from reader.literal(start)):
            reader.settle()
            yield from reader.up_to((end,), self._say)
            reader.settle()
            self._sink = self._forget  # white space that nothing follows
            white = yield from reader.match(WHITE)
            self._sink = self._say
        if white:
            self._say(white)

    def _think(self, text: str) -> None:
        self._reader.settle()
        if not self._has_thought and (not text or text.isspace()):
            self._blank.append(text)
        elif text:
            append_event(self._events, Reasoning("".join((*self._blank, text))))
            self._blank.clear()
            self._has_thought = True

    def _forget(self, text: str) -> None:
        pass

    def _say(self, text: str) -> None:
        self._reader.settle()
        append_event(self._events, Content(text))
