"""One answer's outputs become its parts: reasoning, content, tool calls."""

from __future__ import annotations

from dataclasses import dataclass

from jaxserve.outputs import CompletionOutput
from jaxserve.server.parsing.events import (
    AnswerParser,
    CallArguments,
    CallStart,
    Event,
    Reasoning,
)
from jaxserve.server.parsing.joining import joined


@dataclass(frozen=True, slots=True)
class Reading:
    """What is told of an answer's parts."""

    tells_reasoning: bool = True
    is_single_call: bool = False  # calls after the first are not told


class AnswerReader:
    """Reads one answer, whole or as it comes; the joined parts are the same."""

    def __init__(self, parser: AnswerParser, reading: Reading) -> None:
        self.has_calls = False
        self._parser = parser
        self._reading = reading

    def read(self, answer: CompletionOutput) -> list[Event]:
        """The parts that are certain now, neighbours of one kind joined."""
        events = self._parser.push(answer.text, answer.token_ids)
        if answer.finish_reason is not None:
            events = [*events, *self._parser.finish()]
        told = joined(event for event in events if self._is_told(event))
        self.has_calls = self.has_calls or any(isinstance(event, CallStart) for event in told)
        return told

    def _is_told(self, event: Event) -> bool:
        if isinstance(event, Reasoning):
            return self._reading.tells_reasoning
        if isinstance(event, CallStart | CallArguments):
            return event.index == 0 or not self._reading.is_single_call
        return True
