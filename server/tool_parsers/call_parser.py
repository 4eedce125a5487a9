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
        begins: Sequence[str],
        section: Element,
        *,
        tools: Sequence[Mapping[str, Any]],
        make_id: Callable[[str, int], str],
        only_at_start: bool = False,
        constrained: bool = False,
    ) -> None:
        self._element = section
        self._only_at_start = only_at_start
        self._reader = Reader()
        held_characters = 0 if constrained else HELD_CHARACTERS
        self._draft = CallDraft(self._reader, self._announce, tools, make_id, held_characters)
        self._begins = re.compile("|".join(map(re.escape, begins)))
        self._prefixes = frozenset(begin[:n] for begin in begins for n in range(1, len(begin)))
        self._longest = max(map(len, begins))
        self._section: Steps[None] | None = None  # what is reading now, if not the content
        self._num_before_section = 0  # calls that had ended when it began
        self._has_content = False
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
        match = self._begins.search(reader.text, reader.position)
        end = match.start() if match else len(reader.text) - self._num_possible()
        text = reader.text[reader.position : end]
        if self._only_at_start and (self._has_content or (text and not text.isspace())):
            match, text = None, reader.text[reader.position :]
        reader.position += len(text)
        reader.settle()
        self._say(text)
        if match:
            self._section = self._element.read(reader, self._draft)
            self._num_before_section = self._draft.num_ended
        return match is not None

    def _num_possible(self) -> int:
        """How many of the last characters may be the beginning of a section."""
        reader = self._reader
        longest = min(self._longest - 1, len(reader.text) - reader.position)
        for length in range(longest, 0, -1):
            if reader.text[-length:] in self._prefixes:
                return length
        return 0

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
        if not is_call or read.isspace():
            self._say(read)
        return True

    def _announce(self, event: CallStart | CallArguments) -> None:
        append_event(self._events, event)

    def _say(self, text: str) -> None:
        if text:
            self._has_content = self._has_content or not text.isspace()
            append_event(self._events, Content(text))
