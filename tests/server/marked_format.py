"""An answer format for tests: parts between marks, so that what is told when is easy to foresee.

    §think¶ … ¶ … §call name¶ … ¶ …

Text is told as it comes; a mark and a call's name are held back until they are whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from jaxserve.server.parsing.events import CallArguments, CallStart, Content, Event, Reasoning


class MarkedParser:
    """Tells the parts of one answer apart."""

    def __init__(self) -> None:
        self._tell: Callable[[str], Event] = Content
        self._mark: str | None = None  # begun and not yet whole
        self._num_calls = 0

    def push(self, text: str, token_ids: Sequence[int]) -> list[Event]:
        events: list[Event] = []
        for character in text:
            if self._mark is not None:
                if character == "¶":
                    events += self._begin(self._mark)
                    self._mark = None
                else:
                    self._mark += character
            elif character == "§":
                self._mark = ""
            elif character == "¶":
                self._tell = Content
            else:
                events.append(self._tell(character))
        return events

    def finish(self) -> list[Event]:
        return [] if self._mark is None else [Content("§" + self._mark)]

    def _begin(self, mark: str) -> list[Event]:
        if mark == "think":
            self._tell = Reasoning
            return []
        index, self._num_calls = self._num_calls, self._num_calls + 1
        self._tell = lambda text: CallArguments(index, text)
        return [CallStart(index, f"call-{index}", mark.removeprefix("call "))]


@dataclass
class MarkedFormat:
    """Stands in for AnswerFormat; notes what it was asked for."""

    tools: Any = field(default_factory=lambda: SimpleNamespace(tells_reasoning=False))
    reasoning: Any = field(default_factory=lambda: SimpleNamespace(starts=("§think¶",), ends=("¶",)))
    grammar_text: str | None = None
    marks: tuple[str | None, str] | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)

    def kept_token_ids(self, tokenizer: Any) -> tuple[int, ...]:
        return ()

    def reasoning_marks(self, prompt: str) -> tuple[str | None, str] | None:
        return self.marks

    def adjusted(self, request: Any, tools: Any) -> Any:
        return request

    def parser(self, **about: Any) -> MarkedParser:
        self.asked.append(about)
        return MarkedParser()

    def grammar(self, tools: Any, tool_choice: Any, parallel_tool_calls: bool, tokenizer: Any) -> str | None:
        self.asked.append({"tools": tools, "tool_choice": tool_choice, "parallel": parallel_tool_calls})
        return self.grammar_text
