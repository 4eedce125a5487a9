"""Texts that a vLLM server was made to write, and what its Hermes parser made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jaxserve.server.parsing.answer_format import make_answer_format
from tests.server.tool_parsers.replaying import Answer, Call, answer, pieces, read

RECORDED = Path(__file__).parents[2] / "data" / "vllm" / "forced"
CHECKED = {path.stem: json.loads(path.read_text()) for path in sorted(RECORDED.glob("forced-*.json"))}

# Where we differ on purpose: what we say, and why.
DIFFERENCES: dict[str, tuple[Answer, str]] = {
    "forced-arguments-first-stream": (
        Answer("", "", [Call("get_weather", '{"city": "Paris"}')]),
        "the peer's stream adds the name to the arguments",
    ),
    "forced-call-then-text": (
        Answer("\nDone.", "", [Call("get_weather", '{"city": "Paris", "unit": "celsius"}')]),
        "text behind a call is kept",
    ),
    "forced-compact-json": (
        Answer("", "", [Call("get_weather", '{"city":"Paris","n":1.50}')]),
        "arguments are the model's own text",
    ),
    "forced-mention-stream": (Answer("Use <tool_call> to call.", "", []), "a mark in prose loses no text"),
    "forced-no-arguments-key": (
        Answer("", "", [Call("get_weather", "{}")]),
        "a call without arguments is one, as in the peer's stream",
    ),
    "forced-unicode": (
        Answer("", "", [Call("get_weather", '{"city": "東京 🎉", "note": "a\\u00e9\\n\\"q\\""}')]),
        "arguments are the model's own text",
    ),
}


def _peer(response: dict[str, Any]) -> Answer:
    """What the peer said."""
    said = Answer("", "", [])
    if response.get("body") is not None:
        messages = [choice["message"] for choice in response["body"]["choices"]]
    else:
        events = [line.removeprefix("data: ") for line in response["sse"] if line.startswith("data: {")]
        messages = [choice["delta"] for event in events for choice in json.loads(event)["choices"]]
    for message in messages:
        said.content += message.get("content") or ""
        for call in message.get("tool_calls") or ():
            if call["function"].get("name"):
                said.calls.append(Call(call["function"]["name"], ""))
            said.calls[-1].arguments += call["function"].get("arguments") or ""
    return said


def test_the_recordings_are_there():
    assert len(CHECKED) > 15
    assert DIFFERENCES.keys() <= CHECKED.keys()


@pytest.mark.parametrize("name", CHECKED)
def test_the_peer_is_followed_but_for_what_is_listed(name):
    recorded = CHECKED[name]
    body = recorded["request"]["body"]
    (text,) = body["structured_outputs"]["choice"]
    answer_format = make_answer_format("hermes", None)
    for step in (1, 3, len(text)):
        parts = pieces(text, range(step, len(text), step))
        ours = answer(read(answer_format.parser(tools=body["tools"]), parts))
        if name in DIFFERENCES:
            assert ours == DIFFERENCES[name][0]
            assert ours != _peer(recorded["response"]), f"{name} is no difference any more"
        else:
            assert ours == _peer(recorded["response"])
