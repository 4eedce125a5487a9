"""The state machine that every format of tool calls shares."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxserve.server.parsing.events import CallArguments, CallStart, Content, Event
from jaxserve.server.parsing.joining import append_event
from jaxserve.server.tool_parsers.call_draft import HELD_CHARACTERS, CallDraft
from jaxserve.server.tool_parsers.elements import Element
from jaxserve.server.tool_parsers.reader import NoCallError, Reader, Steps


class CallParser:
    """Tells the calls in one answer from what the model says.

    The same for whole answers and for pieces of any size.  Nothing is lost: text that is no call is content,
    byte for byte.  A call that is cut off or turns out bad before it was announced (CallDraft says when that is)
    is content.
    """

    def __init__(
        self,
        section: Element,
        *,
        begins: Sequence[str],
        begins_at_start: Sequence[str],
        tools: Sequence[Mapping[str, Any]],
        make_id: Callable[[str, int], str],
        constrained: bool = False,
    ) -> None:
        """See ToolFormat for the arguments."""
        self._element = section
        self._reader = Reader()
        held_characters = 0 if constrained else HELD_CHARACTERS
        self._draft = CallDraft(self._reader, self._announce, tools, make_id, held_characters)
        self._begins = _Begins(begins)
        self._begins_at_start = _Begins((*begins, *begins_at_start))
        self._section: Steps[None] | None = None  # what is reading now, if not the content
        self._num_before_section = 0  # calls that had ended when it began
        self._has_content = False  # other than white space
        self._events: list[Event] = []

    def push(self, text: str, token_ids: Sequence[int] = ()) -> list[Event]:
        """What is certain once `text` has come too."""
        self._reader.feed(text)
        while self._section is not None or self._find_section():
            if not self._read_section():
                break
        return self._take_events()

    def finish(self) -> list[Event]:
        """What is left when the answer has ended.

        Marks that were read in or behind a call that was announced stay marks, even if the answer was cut
        off among them.
        """
        draft, rest = self._draft, self._reader.rest()
        was_announced = draft.is_announced or (
            draft.num_ended > self._num_before_section and not draft.is_open
        )
        draft.drop()
        if self._section is None or not was_announced:
            self._say(rest)
        self._section = None
        return self._take_events()

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _find_section(self) -> bool:
        """Say what comes before the next section; whether one has begun."""
        reader = self._reader
        while True:
            begins = self._begins if self._has_content else self._begins_at_start
            place, is_sure = begins.find(reader.text, reader.position)
            text, reader.position = reader.text[reader.position : place], place
            reader.settle()
            had_content = self._has_content
            self._say(text)
            if had_content == self._has_content:
                break
            # What was found may count at the start only: look again from there.
        if is_sure:
            self._section = self._element.read(reader, self._draft)
            self._num_before_section = self._draft.num_ended
        return is_sure

    def _read_section(self) -> bool:
        """Let the section read; whether it has ended."""
        assert self._section is not None
        reader, draft = self._reader, self._draft
        try:
            next(self._section)
            return False
        except StopIteration:
            is_call = draft.num_ended > self._num_before_section
        except NoCallError:
            is_call = False
        self._section = None
        draft.drop()
        read = reader.give_back()
        # White space behind the last mark belongs to the text that follows.
        self._say(read[len(read.rstrip()) :] if is_call else read)
        return True

    def _announce(self, event: CallStart | CallArguments) -> None:
        append_event(self._events, event)

    def _say(self, text: str) -> None:
        if text:
            self._has_content = self._has_content or not text.isspace()
            append_event(self._events, Content(text))


class _Begins:
    """Finds what begins a section."""

    def __init__(self, begins: Sequence[str]) -> None:
        self._any = re.compile("|".join(map(re.escape, begins)) or "(?!)")
        self._prefixes = frozenset(begin[:n] for begin in begins for n in range(1, len(begin)))
        self._longest = max(map(len, begins), default=1)

    def find(self, text: str, position: int) -> tuple[int, bool]:
        """Where the first one is and True; or where one may have begun at the end of the text, and False."""
        match = self._any.search(text, position)
        if match:
            return match.start(), True
        for start in range(max(position, len(text) - self._longest + 1), len(text)):
            if text[start:] in self._prefixes:
                return start, False
        return len(text), False
