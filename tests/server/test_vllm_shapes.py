"""Our answers beside recorded ones of vLLM: the same statuses, keys, order and reasons."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.scripted import Script, echo
from tests.server import openai_shapes
from tests.server.differences import DIFFERENCES, Difference, difference
from tests.server.recorded import NAMES, SETS, Recording, joined, load, replay, whole
from tests.server.serving import Answer, Serving, serving

# What is null there and here.
NULLABLE = {"logprobs", "finish_reason", "refusal", "token_strs", "content"}


@dataclass
class Peers:
    """A server for each set of recordings, started when first asked, which says what it is told to."""

    stack: ExitStack
    script: Script = echo
    servers: dict[str, Serving] = field(default_factory=dict)

    def server(self, name: str) -> Serving:
        if name not in self.servers:
            settings = dict(SETS[name])
            info = {"vocab_size": 49152} | {
                key: settings.pop(key) for key in ("max_model_len", "max_logprobs") if key in settings
            }
            self.servers[name] = self.stack.enter_context(
                serving(lambda request: self.script(request), info=info, **settings)
            )
        return self.servers[name]

    async def ask(self, recording: Recording, **changes: Any) -> Answer:
        self.script, body, _ = replay(recording)
        data = recording.raw_body if body is None else json.dumps({**body, **changes})
        return await self.server(recording.set).request(
            recording.method, recording.path, data=data, headers=recording.headers
        )


@pytest.fixture(scope="module")
def peers() -> Iterator[Peers]:
    with ExitStack() as stack:
        yield Peers(stack)


@pytest.mark.parametrize("name", NAMES)
async def test_same_as_vllm(name: str, peers: Peers):
    recording, ours_differs = load(name), difference(name)
    answer = await peers.ask(recording)
    assert answer.status == (ours_differs.status or recording.status), answer.data
    check_openai_shape(recording, answer)
    if answer.status >= 400:
        check_error(recording, answer, ours_differs)
    elif ours_differs.status is None and recording.chunks is not None:
        check_stream(recording, answer, ours_differs)
        unstreamed = await peers.ask(recording, stream=False, stream_options=None)
        assert whole(unstreamed.json) == joined(answer.chunks)
    elif ours_differs.status is None and isinstance(recording.answer, dict):
        if ours_differs.choices is None:
            check_keys(recording.answer, answer.json, ours_differs.left_out, name)
        _, _, expected = replay(recording)
        assert whole(answer.json) == list(ours_differs.choices or expected)


def test_every_difference_is_one():
    """A difference that is none any more would hide the next one."""
    for name in NAMES:
        ours, theirs = difference(name), load(name)
        assert ours.status != theirs.status, name
        assert ours.choices is None or list(ours.choices) != replay(theirs)[2], name
    assert not set(DIFFERENCES) - set(NAMES)


def check_openai_shape(recording: Recording, answer: Answer) -> None:
    if answer.headers.get("content-type", "").startswith("text/event-stream"):
        for chunk in answer.chunks:
            openai_shapes.check_chunk(recording.path, chunk)
    elif answer.status == 200:
        openai_shapes.check_whole(recording.path, answer.data)
    elif answer.status >= 400 and answer.data:
        openai_shapes.check(answer.json, openai_shapes.ERROR)


def check_error(recording: Recording, answer: Answer, ours_differs: Difference) -> None:
    if recording.method == "HEAD":
        return
    error = answer.error
    assert error["message"].endswith((".", "?"))
    if recording.status == 401:
        assert error["type"] == "AuthenticationError"
        return
    theirs = recording.answer.get("error") if isinstance(recording.answer, dict) else None
    if not isinstance(theirs, dict) or ours_differs.status is not None:
        if answer.status == 400:
            assert error["param"] == ours_differs.param
        return
    assert error["type"] == theirs["type"].replace("Bad Request", "BadRequestError")
    named = ours_differs.param
    if named is None and theirs.get("param") is not None:
        named = theirs["param"].removeprefix("body.").split(".")[0]
    assert error["param"] is not None
    assert error["param"] == named


def check_stream(recording: Recording, answer: Answer, ours_differs: Difference) -> None:
    assert recording.chunks is not None
    chunks = answer.chunks
    _, _, expected = replay(recording)
    assert joined(chunks) == list(ours_differs.choices or expected)
    if ours_differs.choices is None:
        for their_shape, our_shape in zip(outline(recording.chunks), outline(chunks), strict=True):
            assert our_shape == their_shape
        theirs = keys_with_values(recording.chunks) - ours_differs.left_out
        assert theirs <= keys_with_values(chunks)
        assert keys_with_values(chunks) - theirs <= {"refusal"}
    for chunk in chunks:  # no empty chunks
        for piece in chunk["choices"]:
            says = piece["delta"] if "delta" in piece else piece["text"]
            assert says or piece["finish_reason"], chunk


def outline(chunks: list[Any]) -> list[Any]:
    """The chunks by kind, runs of one kind taken together, choices apart (their order is chance)."""
    lines: dict[int, list[Any]] = {}
    for chunk in chunks:
        if not chunk["choices"]:
            lines.setdefault(-1, []).append("usage")
        for piece in chunk["choices"]:
            line = lines.setdefault(piece["index"], [])
            for kind in kinds(piece):
                if not line or line[-1] != kind:
                    line.append(kind)
            if piece["finish_reason"] is not None:
                line.append(piece["finish_reason"])
    ends_with_usage = [-1 in lines and chunks[-1]["choices"] == []]
    # Text may come with the chunk that ends the choice, so its absence before means nothing.
    return [[step for step in lines[i] if step != "text"] for i in sorted(lines)] + ends_with_usage


def kinds(piece: Any) -> list[str]:
    delta = piece.get("delta", {})
    if delta.get("role"):
        return ["role"]
    calls = ["call" if "id" in call else "arguments" for call in delta.get("tool_calls") or ()]
    return calls or ["text"]


def keys_with_values(value: Any) -> set[str]:
    """Names of all keys, at any depth, that hold something."""
    if isinstance(value, list):
        return set().union(*(keys_with_values(item) for item in value)) if value else set()
    if isinstance(value, dict):
        found = {key for key, item in value.items() if item is not None}
        # Below these, keys are data.
        return found.union(*(keys_with_values(v) for k, v in value.items() if k != "top_logprobs"))
    return set()


def check_keys(theirs: Any, ours: Any, left_out: frozenset[str], where: str) -> None:
    """Every key that holds something there is here, with the same type; nothing else is."""
    if isinstance(theirs, list) and isinstance(ours, list):
        for their_item, our_item in zip(theirs, ours, strict=False):
            check_keys(their_item, our_item, left_out, where + "[]")
        return
    if not isinstance(theirs, dict):
        if theirs is not None:
            number = (int, float)
            kind = number if isinstance(theirs, number) else type(theirs)
            # A message of calls alone has null content here and sometimes "" there.
            assert isinstance(ours, kind) or (theirs == "" and ours is None), where
        return
    assert isinstance(ours, dict), where
    if where.endswith(("top_logprobs[]", "prompt_logprobs[]")) and "token" not in theirs:
        return  # keys are tokens
    full = {key for key, value in theirs.items() if value is not None} - left_out
    assert full <= set(ours), f"{where}: {full - set(ours)} missing"
    for key in set(ours) - full:
        assert key in NULLABLE, f"{where}.{key} is not there in vLLM's answer"
        assert ours[key] is None, f"{where}.{key} is null in vLLM's answer"
    for key in full:
        check_keys(theirs[key], ours[key], left_out, f"{where}.{key}")
