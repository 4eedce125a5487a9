"""White space that stands between tool calls says nothing."""

from __future__ import annotations

from collections.abc import Iterable

from jaxserve.server.parsing.events import Content, Event
from jaxserve.server.parsing.joining import append_event


class BlankFilter:
    """Drops content that is nothing but white space beside a tool call or reasoning; all other content stays as it is.

    An answer of one call has no content then, whatever line feeds stand around it.
    """

    def __init__(self) -> None:
        self._blank: list[str] = []  # with which a stretch of content begins, until more comes
        self._is_blank = True  # nothing else has come since the last event of another kind, or the beginning
        self._has_others = False  # there was one

    def push(self, events: Iterable[Event]) -> list[Event]:
        """These events, less what is dropped or may be."""
        kept: list[Event] = []
        for event in events:
            if not isinstance(event, Content):
                self._blank.clear()
                self._is_blank, self._has_others = True, True
                append_event(kept, event)
            elif self._is_blank and event.text.isspace():
                self._blank.append(event.text)
            else:
                append_event(kept, Content("".join((*self._blank, event.text))))
                self._blank.clear()
                self._is_blank = False
        return kept

    def finish(self) -> list[Event]:
        """What was held back, if the answer is nothing else."""
        return [Content("".join(self._blank))] if self._blank and not self._has_others else []
