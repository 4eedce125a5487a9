"""The parts of an answer, told apart by one parser after the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jaxserve.server.parsing.blanks import BlankFilter
from jaxserve.server.parsing.events import AnswerParser, Content, Event
from jaxserve.server.reasoning_parsers.splitter import ReasoningSplitter


class ReasoningThenCalls:
    """What follows the reasoning is searched for calls; a call that is drafted in thoughts stays there."""

    def __init__(
        self, reasoning: AnswerParser, calls: AnswerParser, end_ids: frozenset[int] = frozenset()
    ) -> None:
        """`end_ids` are the tokens that end the reasoning: `calls` gets the ids of what follows them."""
        self._reasoning = reasoning
        self._calls = calls
        self._end_ids = end_ids
        self._is_behind = False

    def push(self, text: str, token_ids: Sequence[int]) -> list[Event]:
        """What is certain once `text`, the text of `token_ids`, has come too."""
        events: list[Event] = []
        said: list[str] = []
        for event in self._reasoning.push(text, token_ids):
            if isinstance(event, Content):
                said.append(event.text)
            else:
                events.append(event)
        if said or self._is_behind:  # tokens without text are told too: plug-ins go by them
            ids = token_ids if self._is_behind else self._ids_behind(token_ids)
            self._is_behind = True
            events += self._calls.push("".join(said), ids)
        return events

    def finish(self) -> list[Event]:
        """What is left when the answer has ended."""
        events: list[Event] = []
        for event in self._reasoning.finish():
            events += self._calls.push(event.text, ()) if isinstance(event, Content) else [event]
        return events + self._calls.finish()

    def _ids_behind(self, token_ids: Sequence[int]) -> Sequence[int]:
        ends = [place for place, token_id in enumerate(token_ids) if token_id in self._end_ids]
        return token_ids[ends[-1] + 1 :] if ends else token_ids


class CallsInReasoning:
    """Calls are found wherever they are; what is no call is reasoning or content."""

    def __init__(self, reasoning: ReasoningSplitter, calls: AnswerParser) -> None:
        self._reasoning = reasoning
        self._calls = calls

    def push(self, text: str, token_ids: Sequence[int]) -> list[Event]:
        """What is certain once `text`, the text of `token_ids`, has come too."""
        return self._split(self._calls.push(text, token_ids))

    def finish(self) -> list[Event]:
        """What is left when the answer has ended."""
        return self._split(self._calls.finish()) + self._reasoning.finish()

    def _split(self, events: Iterable[Event]) -> list[Event]:
        split: list[Event] = []
        for event in events:
            if isinstance(event, Content):
                split += self._reasoning.push(event.text)
            else:
                split += [*self._reasoning.flush(), event]
        return split


class WithoutBlanks:
    """An answer's parser whose white space between calls is dropped."""

    def __init__(self, parser: AnswerParser) -> None:
        self._parser = parser
        self._blanks = BlankFilter()

    def push(self, text: str, token_ids: Sequence[int]) -> list[Event]:
        """What is certain once `text`, the text of `token_ids`, has come too."""
        return self._blanks.push(self._parser.push(text, token_ids))

    def finish(self) -> list[Event]:
        """What is left when the answer has ended."""
        return [*self._blanks.push(self._parser.finish()), *self._blanks.finish()]


class AllContent:
    """An answer in which nothing is looked for."""

    def push(self, text: str, token_ids: Sequence[int]) -> list[Event]:
        """All of it."""
        return [Content(text)] if text else []

    def finish(self) -> list[Event]:
        """Nothing."""
        return []
