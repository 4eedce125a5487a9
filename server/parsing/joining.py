"""Events that follow each other, put together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from jaxserve.server.parser_api.protocol import DeltaMessage
from jaxserve.server.parsing.events import CallArguments, CallStart, Content, Event, Reasoning


def append_event(events: list[Event], event: Event) -> None:
    """Append `event`, or let the last one of `events` say what it says too."""
    last = events[-1] if events else None
    if (
        last is None
        or type(last) is not type(event)
        or isinstance(event, CallStart)
        or isinstance(last, CallStart)
        or (
            isinstance(event, CallArguments) and isinstance(last, CallArguments) and event.index != last.index
        )
    ):
        events.append(event)
    else:
        events[-1] = replace(last, text=last.text + event.text)


def joined(events: Iterable[Event]) -> list[Event]:
    """The same events with as few pieces as possible: what an answer says does not depend on its pieces."""
    whole: list[Event] = []
    for event in events:
        append_event(whole, event)
    return whole


def add_text(delta: DeltaMessage, event: Content | Reasoning) -> None:
    """Let a message in vLLM's form say what `event` says too."""
    if isinstance(event, Content):
        delta.content = (delta.content or "") + event.text
    else:
        delta.reasoning = (delta.reasoning or "") + event.text
