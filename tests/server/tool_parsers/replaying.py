"""An answer's text given to a parser in pieces, and what comes out, put together."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hypothesis import strategies as st

from jaxserve.server.parsing.events import AnswerParser, CallArguments, CallStart, Content, Event, Reasoning
from jaxserve.server.parsing.joining import joined


@dataclass
class Call:
    """One tool call of an answer."""

    name: str
    arguments: str  # JSON text

    @property
    def value(self) -> Any:
        return json.loads(self.arguments)


@dataclass
class Answer:
    """What an answer's events say, without their order."""

    content: str
    reasoning: str
    calls: list[Call]


def pieces(text: str, cuts: Iterable[int]) -> list[str]:
    """`text`, cut at these places."""
    places = [0, *sorted({c for c in cuts if 0 < c < len(text)}), len(text)]
    return [text[a:b] for a, b in pairwise(places)]


def read(parser: AnswerParser, parts: Sequence[str]) -> list[Event]:
    """The parser's events, as few as possible, ids left out."""
    events = [event for part in parts for event in parser.push(part, ())] + parser.finish()
    assert all(getattr(event, "text", "x") for event in events), "an empty event"
    starts = [event for event in events if isinstance(event, CallStart)]
    assert [start.index for start in starts] == list(range(len(starts)))
    assert len({start.id for start in starts}) == len(starts)
    return joined(CallStart(e.index, "", e.name) if isinstance(e, CallStart) else e for e in events)


def answer(events: Iterable[Event]) -> Answer:
    """What the events say."""
    said = Answer("", "", [])
    for event in events:
        match event:
            case Content(text):
                said.content += text
            case Reasoning(text):
                said.reasoning += text
            case CallStart(_, _, name):
                said.calls.append(Call(name, ""))
            case CallArguments(index, text):
                assert index == len(said.calls) - 1
                said.calls[-1].arguments += text
    return said


def whole(parser: AnswerParser, text: str) -> Answer:
    """What the parser makes of a whole answer."""
    return answer(read(parser, [text]))


cuts = st.one_of(
    st.just(range(1, 10_000)),  # one character at a time
    st.lists(st.integers(1, 400), max_size=40),
    st.integers(2, 6).map(lambda n: range(n, 10_000, n)),
)

Arguments = Mapping[str, Any]

names = st.sampled_from(["get_weather", "f", "create_order", "a_1"])
json_text = st.text(
    st.one_of(st.sampled_from("ab \n\"\\'{}[]<>/|,:;()=東é🎉\u2028\x7f"), st.characters(codec="utf-8")),
    max_size=12,
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-999, 10**12) | st.floats(-1e6, 1e6) | json_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(json_text, inner, max_size=3),
    max_leaves=6,
)
argument_names = st.sampled_from(["city", "unit", "n", "items", "customer", "note"])
arguments = st.dictionaries(argument_names, json_values, max_size=4)
calls = st.lists(st.tuples(names, arguments), min_size=1, max_size=3)
# Prose in which nothing begins a call of any format that has marks.
prose = st.text(st.sampled_from("Hello, wrd.\n ?!<>/|東é🎉'"), max_size=20).map(
    lambda t: t.replace("<|", "<")
)
