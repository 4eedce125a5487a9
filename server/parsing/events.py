"""The parts of an answer in the order in which the model wrote them, and who tells them apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Reasoning:
    """More of what the model thought before it answered; never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """More of what the model says to the user; never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """The next tool call begins: its function's name is complete."""

    index: int  # among the answer's calls, from 0
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments: the pieces of one call, joined, are its arguments as JSON text; never empty."""

    index: int
    text: str


Event = Reasoning | Content | CallStart | CallArguments


class AnswerParser(Protocol):
    """Takes one answer's text as it comes.  The events do not depend on where the text is cut into pieces."""

    def push(self, text: str, token_ids: Sequence[int]) -> list[Event]:
        """What is certain once `text`, the text of `token_ids`, has come too."""
        ...

    def finish(self) -> list[Event]:
        """What is left when the answer has ended, wherever it was cut off."""
        ...
